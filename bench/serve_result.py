"""The record of a speed experiment, put together from what the notebook holds."""

from collections.abc import Iterator, Mapping, Sequence

from trsp.bench.record import environment
from trsp.bench.serve_arms import Candidate
from trsp.bench.serve_design import Design
from trsp.bench.serve_plan import CONTROL, DENSE, Step, enough_requests
from trsp.bench.serve_record import Cell, Load, Ratio, ServeRecord, Start
from trsp.bench.serve_validity import config_problems, prompt_problems
from trsp.bench.speed_analysis import ratios
from trsp.bench.speed_backend import SpeedBackend
from trsp.bench.speed_experiment import Notebook
from trsp.bench.statistics import CONFIDENCE

_MIN_REQUESTS_FOR_P99 = 1000
_FEW_BLOCKS = 5
_JUDGED = (
    "output_throughput", "mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "avg_latency_ms",
    "tokens_per_second",
    "generation_throughput", "prompt_throughput",
)  # fmt: skip


def kept_cells(notebook: Notebook, steps: Sequence[Step]) -> list[Cell]:
    """Every measurement of the plan that was made, in the plan's order."""
    kept = (notebook.cell(step, load) for step in steps for load in step.loads)
    return [cell for cell in kept if cell is not None]


def assemble(
    settled: Design,
    backend: SpeedBackend,
    loads: Sequence[Load],
    notebook: Notebook,
    cells: Sequence[Cell],
    steps: Sequence[Step],
) -> ServeRecord:
    """The record of what is there; partial when the plan is not done."""
    options, candidates = settled.options, settled.candidates
    loads = list(loads)
    if "equal-memory" in settled.memories and settled.saturating not in loads:
        loads.append(settled.saturating)
    planned = sum(len(step.loads) for step in steps)
    found, uncompared = ratios(
        cells,
        loads,
        settled.workload,
        {candidate.arm.name: candidate.cost for candidate in candidates},
        steps=steps,
    )
    problems, explained = config_problems(notebook.starts, DENSE, CONTROL)
    surroundings = {**environment(), "engine_variables": dict(backend.environment)}
    partial = len(cells) < planned or not steps
    missing = [f"{planned - len(cells)} of {planned} planned measurements"] if partial else []
    return ServeRecord(
        backend=options.backend,
        engine=backend.engine,
        label=_label(surroundings, candidates),
        partial=partial,
        num_blocks=len({cell.block for cell in cells}),
        confidence=CONFIDENCE,
        arms=[candidate.arm for candidate in candidates],
        loads=loads,
        workload=settled.workload,
        memories=list(settled.memories),
        starts=_without_configs(notebook.starts),
        cells=list(cells),
        ratios=found,
        invalid=[*problems, *prompt_problems(cells), *_noise(found)],
        explained=explained,
        not_measured=[*missing, *uncompared, *_not_measured(settled, loads, notebook.starts)],
        commands=[surroundings["command"], *_commands(notebook.starts)],
        hashes=_hashes(candidates, cells),
        environment=surroundings,
    )


def _label(surroundings: Mapping[str, object], candidates: Sequence[Candidate]) -> str | None:
    words = []
    if surroundings["gpu"] is None:
        words.append("CPU, not a serving claim")
    if candidates[0].arm.weights == "dummy":
        words.append("random weights: speed only")
    return "; ".join(words) or None


def _noise(found: Sequence[Ratio]) -> Iterator[str]:
    """Loads whose noise floor is no floor: the dense model against itself misses 1.

    One interval in twenty does so by chance, so a load is judged by more than half of the figures
    that it is read by.
    """
    control = [r for r in found if r.arm == CONTROL and r.metric in _JUDGED]
    for memory, load in dict.fromkeys((r.memory, r.load) for r in control):
        here = [r for r in control if (r.memory, r.load) == (memory, load)]
        missed = [r for r in here if r.low is not None and not r.low <= 1 <= (r.high or 0)]
        if len(missed) > len(here) / 2:
            worst = max(missed, key=lambda r: abs(r.estimate - 1))
            yield (
                f"{load}, {memory}: the noise floor misses 1 in {len(missed)} of {len(here)} "
                f"figures, most in {worst.metric} ({worst.estimate:.3f} x): two servers of the "
                "same model differed"
            )


def _not_measured(settled: Design, loads: Sequence[Load], starts: Sequence[Start]) -> Iterator[str]:
    options, candidates = settled.options, settled.candidates
    if options.num_blocks < _FEW_BLOCKS:
        yield f"more than {options.num_blocks} of {_FEW_BLOCKS} blocks, which steady the intervals"
    if "equal-memory" not in settled.memories and options.backend != "transformers":
        if options.backend == "latency":
            yield "equal GPU memory: one batch gains nothing by room in the KV cache"
        else:
            yield "equal GPU memory (what the freed room for the KV cache gains): give --memory-gib"
    sent, fills = settled.saturating.num_requests, settled.cache_requests
    if fills is not None and sent <= fills:
        yield (
            f"what the freed room for the KV cache gains: the dense cache holds {fills} requests "
            f"and {sent} were sent, so it never filled; give a smaller --memory-gib, or more "
            "--num-requests"
        )
    if starts and len(starts) == len({(start.arm, start.memory) for start in starts}):
        yield "differences from start to start: one engine of each arm served every block"
    if options.backend == "serve":
        for load in loads:
            enough = enough_requests(load.concurrency or 1)
            if load.num_requests < enough:
                yield f"load {load.name}: {load.num_requests} requests, {enough} are advised"
        few = [load.name for load in loads if load.num_requests < _MIN_REQUESTS_FOR_P99]
        if few:
            yield f"p99: under {_MIN_REQUESTS_FOR_P99} requests in {', '.join(few)}"
        if not options.shares:
            yield "open loop (Poisson arrivals): no --rate was given"
    for candidate in candidates:
        if not candidate.arm.quality and candidate.arm.role != "control":
            dummy = candidate.arm.weights == "dummy"
            why = "random weights" if dummy else "no evaluation beside it"
            yield f"quality of {candidate.arm.name}: {why}"
    if starts and all(start.weights_gib is None for start in starts):
        yield "memory of the weights as the engine counts it: it does not say"
    if options.backend == "serve":
        yield "energy; several GPUs; prompts of mixed lengths"


def _without_configs(starts: Sequence[Start]) -> list[Start]:
    """The first start keeps its engine's configuration; the others were compared with it."""
    return [
        start if n == 0 else start.model_copy(update={"engine_config": {}})
        for n, start in enumerate(starts)
    ]


def _commands(starts: Sequence[Start]) -> list[str]:
    """One command line for each arm and memory; ports differ from start to start."""
    return list({(start.memory, start.arm): start.command for start in starts}.values())


def _hashes(candidates: Sequence[Candidate], cells: Sequence[Cell]) -> dict[str, str]:
    hashes = {
        f"weights of {candidate.arm.name} (sampled)": candidate.weights_sha256
        for candidate in candidates
        if candidate.weights_sha256 is not None and candidate.arm.role != "control"
    }
    for cell in cells:
        if cell.prompts_sha256 is not None:
            hashes.setdefault(f"prompts of {cell.load}", cell.prompts_sha256)
    return hashes
