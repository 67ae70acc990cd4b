"""What a speed experiment will measure, settled before anything is started.

Everything that a user can get wrong is found here: models that do not fit together, loads that
mean nothing, memory that does not suffice.
"""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsp.bench import serve_arms
from trsp.bench.serve_arms import Candidate
from trsp.bench.serve_plan import DENSE, closed_loads, open_loads, saturating_load
from trsp.bench.serve_record import Backend, Load, Memory, Workload
from trsp.bench.speed_backend import ArmModel
from trsp.bench.transformers_backend import loads as transformers_loads
from trsp.bench.transformers_speed import PaperProtocol
from trsp.pruner.errors import UserError
from trsp.serving.server_flags import flag_names

GIB = 2**30
_MIN_SLACK_TOKENS = 16
# What a GPU keeps beside weights and KV cache: activations, graphs, the CUDA context.
_GPU_RESERVE_BYTES = 6 * GIB
_GPU_SHARE = 0.9
# An engine beside others: its process, and activations.
_ENGINE_OVERHEAD_BYTES = 3 * GIB
_SET = "is set by the experiment; use its own option for it"
_BYTES = "would make weights or cache take other bytes than the bounds and the memory arms count"
# vLLM's flags that the experiment sets itself, or that would falsify what it tells.
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("--model", "--port", "--host", "--served-model-name", "--kv-cache-memory-bytes", "--seed",
         "--load-format", "--dtype", "--max-model-len", "--gpu-memory-utilization"),
        _SET,
    ),
    **dict.fromkeys(
        ("--quantization", "-q", "--kv-cache-dtype", "--num-gpu-blocks-override",
         "--cpu-offload-gb"),
        _BYTES,
    ),
    **dict.fromkeys(
        ("--speculative-config", "-sc", "--spec-method", "--spec-model"),
        "would have a second model make the tokens",
    ),
    "--config": "would bring flags that the record does not show; give them here",
    "--hf-overrides": "would make every arm another model than the record tells",
    "--hf-config-path": "would make every arm another model than the record tells",
    "--disable-log-stats": "would hide the counters that tell prefix-cache hits and preemptions",
    "--enable-prefix-caching": "would answer repeated prompts from the cache",
}  # fmt: skip
_PARALLEL = {
    "--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size",
    "-dp",
}  # fmt: skip
# vLLM's latency benchmark draws token ids below this.
_LATENCY_VOCABULARY = 10_000
# Requests at equal memory: so many times what the dense cache holds, within reason.
_CACHE_FILLS = 2
_MAX_SATURATING_REQUESTS = 4000


@dataclass(frozen=True)
class ServeOptions:
    """What the user asked for; see the command's help.

    Attributes:
        dense, pruned: folders. With `shape` or `remove` the pruned arms have random weights.
        memory_gib: weights + KV cache of each arm at equal memory.
        kv_tokens: room in the KV cache of every arm at equal KV.
        flags: passed to vLLM, the same for every arm.
    """

    out: Path
    backend: Backend = "serve"
    dense: Path | None = None
    pruned: tuple[Path, ...] = ()
    shape: str | None = None
    remove: tuple[int, ...] = ()
    load_format: str = "auto"
    dtype: str | None = None
    num_blocks: int = 5
    concurrencies: tuple[int, ...] = (1, 4, 16)
    shares: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    num_requests: int | None = None
    input_len: int = 256
    output_len: int = 128
    ttft_slo_ms: float = 2000.0
    tpot_slo_ms: float = 100.0
    memories: tuple[Memory, ...] = ("equal-kv", "equal-memory")
    memory_gib: float | None = None
    kv_tokens: int | None = None
    residency: str = "auto"
    port: int | None = None
    seed: int = 0
    num_iterations: int = 30
    prompt_tokens: int = 2048
    health_timeout_seconds: float = 1800.0
    cell_timeout_seconds: float = 3600.0
    flags: tuple[str, ...] = ()
    resume: bool = False
    record: Path | None = None


@dataclass(frozen=True)
class Design:
    """A sound experiment.

    Attributes:
        loads: closed loads, or the batches of an offline backend; open loads follow from the
            capacity, which is measured first.
        models: by arm, in the order of the palindrome's first half.
        resident: all engines stay up, instead of one at a time.
        saturating: every request at once: it shows the capacity, and what room in the cache gains.
        cache_requests: requests of the workload that fill the dense model's cache at equal memory;
            None without that arm.
    """

    options: ServeOptions
    candidates: tuple[Candidate, ...]
    workload: Workload
    loads: tuple[Load, ...]
    memories: tuple[Memory, ...]
    models: dict[str, ArmModel]
    resident: bool
    saturating: Load
    cache_requests: int | None

    @property
    def max_model_len(self) -> int:
        """Of every engine: the workload, and some room where the model has it.

        vLLM's random prompts are token ids turned into text, which a byte-level tokenizer may read
        back as a few tokens more; without room for them their answers would be cut short.
        """
        needed = self.workload.input_len + self.workload.output_len
        room = max(_MIN_SLACK_TOKENS, self.workload.input_len // 8)
        context = serve_arms.context_length(self.candidates[0].folder)
        return needed if context is None else max(needed, min(needed + room, context))

    def plan(self) -> dict[str, Any]:
        """Everything that a resumed run must have in common with the one before."""
        return {
            "schema_version": 1,
            "backend": self.options.backend,
            "arms": [_identity(candidate) for candidate in self.candidates],
            "workload": self.workload.model_dump(),
            "loads": [load.model_dump() for load in self.loads],
            "saturating": self.saturating.model_dump(),
            "shares": list(self.options.shares),
            "memories": list(self.memories),
            "kv_cache_bytes": {
                name: dict(model.kv_cache_bytes) for name, model in self.models.items()
            },
            "num_blocks": self.options.num_blocks,
            "flags": list(self.options.flags),
            "max_model_len": self.max_model_len,
            "num_iterations": self.options.num_iterations,
            "prompt_tokens": self.options.prompt_tokens,
        }


def design(options: ServeOptions) -> Design:
    """Settle the experiment that was asked for.

    Raises:
        UserError: it cannot be, or means nothing; one line with the remedy.
    """
    check(options)
    candidates = _candidates(options)
    loads = _loads(options)
    workload = Workload(
        input_len=options.input_len,
        output_len=options.output_len,
        dtype=options.dtype or serve_arms.config_dtype(candidates[0].folder),
        seed=options.seed,
        ttft_slo_ms=options.ttft_slo_ms,
        tpot_slo_ms=options.tpot_slo_ms,
    )
    memories, budget = _memories(options, candidates)
    tokens = options.input_len + options.output_len
    in_flight = max(load.concurrency or 0 for load in loads)
    kv_tokens = options.kv_tokens or 2 * max(16, in_flight) * tokens
    models = _models(candidates, memories, kv_tokens, budget)
    fills = None
    if "equal-memory" in memories:
        room = models[DENSE].kv_cache_bytes["equal-memory"]
        fills = room // (candidates[0].cost.kv_bytes_per_token * tokens)
    return Design(
        options=options,
        candidates=tuple(candidates),
        workload=workload,
        loads=tuple(loads),
        memories=memories,
        models=models,
        resident=_resident(options, models, memories),
        saturating=_saturating(options, loads, fills),
        cache_requests=fills,
    )


def check(options: ServeOptions) -> None:
    """Refuse what cannot be, before anything is read.   Raises: UserError."""
    if options.shape is not None and (options.dense or options.pruned):
        raise UserError("--shape takes no model folders: it is a config with random weights")
    if options.shape is None and options.dense is None:
        raise UserError("name the dense model and the pruned ones, or a --shape with --remove")
    if options.remove and options.pruned:
        raise UserError("--remove makes the pruned arms itself; leave out the pruned folders")
    if options.shape is None and not options.remove and not options.pruned:
        raise UserError("one model alone is no comparison: name a pruned one, or use --remove")
    if options.remove and options.shape is None and options.load_format != "dummy":
        raise UserError(
            "--remove cuts a config and has no weights for it: add --load-format dummy, or name "
            "pruned checkpoints"
        )
    if options.load_format not in ("auto", "dummy"):
        raise UserError(f"--load-format {options.load_format!r}: choose auto or dummy")
    if options.residency not in ("auto", "resident", "restart"):
        raise UserError(f"--servers {options.residency!r}: choose auto, resident or restart")
    if options.out.resolve() == Path.cwd() or not options.out.name:
        raise UserError(f"--out {options.out}: give a folder of its own")
    for name, amount in (
        ("--memory-gib", options.memory_gib),
        ("--kv-tokens", options.kv_tokens),
        ("--ttft-slo", options.ttft_slo_ms),
        ("--tpot-slo", options.tpot_slo_ms),
        ("--health-timeout", options.health_timeout_seconds),
        ("--cell-timeout", options.cell_timeout_seconds),
    ):
        if amount is not None and not (math.isfinite(amount) and amount > 0):
            raise UserError(f"{name} {amount}: expected a number above 0")
    for name, count in (
        ("--num-blocks", options.num_blocks),
        ("--input-len", options.input_len),
        ("--output-len", options.output_len),
        ("--num-iters", options.num_iterations),
        ("--prompt-tokens", options.prompt_tokens),
    ):
        if count < 1:
            raise UserError(f"{name} {count}: expected at least 1")
    if options.output_len < 2 and options.backend == "serve":
        raise UserError("--output-len 1 has no time between tokens; give at least 2")
    # Concurrencies and shares are looked at before a model's folder is.
    closed_loads(options.concurrencies, options.num_requests)
    open_loads(options.shares, 1.0, options.num_requests)
    _refuse_flags(options)
    if options.backend != "serve" and options.port is not None:
        raise UserError(f"--port means nothing to --backend {options.backend}")
    if options.backend == "serve" and options.port is not None and options.residency == "resident":
        raise UserError("--port is one port, and --servers resident needs one for each arm")


def _refuse_flags(options: ServeOptions) -> None:
    for refused, why in _REFUSED.items():
        if _is_given(refused, options):
            raise UserError(f"{refused} {why}")
    several = sorted(name for name in _PARALLEL if _is_given(name, options))
    if options.memory_gib is not None and several:
        raise UserError(
            f"{several[0]}: equal memory is computed for one GPU; leave out --memory-gib and give "
            "--memory equal-kv"
        )


def _is_given(name: str, options: ServeOptions) -> bool:
    """Whether a flag is given in any spelling of vLLM's: underscores, dots, or cut short."""
    return any(
        given == name or (given.startswith("--") and len(given) > 3 and name.startswith(given))
        for given in flag_names(options.flags)
    )


def _candidates(options: ServeOptions) -> list[Candidate]:
    if options.shape is not None or options.remove:
        shape = options.shape if options.shape is not None else options.dense
        if shape is None:
            raise UserError("--remove needs a model folder or a --shape")
        folder = options.out.with_name(options.out.name + ".shapes")
        candidates = serve_arms.from_shape(shape, options.remove, folder, dtype=options.dtype)
    else:
        if options.dense is None:
            raise UserError("name the dense model")
        candidates = serve_arms.from_folders(
            options.dense,
            options.pruned,
            dtype=options.dtype,
            dummy_weights=options.load_format == "dummy",
        )
    if options.backend == "latency":
        for candidate in candidates:
            size = serve_arms.vocabulary_size(candidate.folder)
            if size < _LATENCY_VOCABULARY:
                raise UserError(
                    f"{candidate.folder}: has {size} tokens, and vLLM's latency benchmark draws "
                    f"ids below {_LATENCY_VOCABULARY}; use --backend throughput"
                )
    return candidates


def _loads(options: ServeOptions) -> list[Load]:
    """Closed loads, or their counterpart offline: one batch each."""
    if options.backend == "transformers":
        return transformers_loads(max(options.concurrencies), PaperProtocol.prompts)
    closed = closed_loads(options.concurrencies, options.num_requests)
    if options.backend == "serve":
        return closed
    if options.backend == "latency":
        return [
            load.model_copy(
                update={
                    "name": f"batch {load.concurrency}",
                    "kind": "batch",
                    "num_requests": (load.concurrency or 1) * options.num_iterations,
                }
            )
            for load in closed
        ]
    last = closed[-1]
    return [Load(name=f"{last.num_requests} prompts", kind="batch", num_requests=last.num_requests)]


def _saturating(options: ServeOptions, loads: Sequence[Load], fills: int | None) -> Load:
    """All requests at once; at equal memory more than the dense cache holds, unless counted."""
    if options.backend != "serve":
        return loads[-1]
    count = options.num_requests
    if count is None:
        wanted = 0 if fills is None else _CACHE_FILLS * fills
        count = min(max(loads[-1].num_requests, wanted), _MAX_SATURATING_REQUESTS)
    return saturating_load(count)


def _memories(
    options: ServeOptions, candidates: Sequence[Candidate]
) -> tuple[tuple[Memory, ...], int | None]:
    """The memory arms that can be measured, and the bytes of the equal-memory one."""
    # One batch, or no engine's cache: more room gains nothing, by construction.
    if options.backend in ("transformers", "latency") or "equal-memory" not in options.memories:
        return ("equal-kv",), None
    parallel = any(_is_given(name, options) for name in _PARALLEL)
    budget = None if parallel else _gpu_budget()
    if options.memory_gib is not None:
        budget = int(options.memory_gib * GIB)
    if budget is None:
        if "equal-kv" not in options.memories:
            raise UserError(
                "--memory equal-memory without a GPU of its own: say how much with --memory-gib"
            )
        # serve_result says that it was not measured.
        return ("equal-kv",), None
    least = max(candidate.cost.weight_bytes for candidate in candidates)
    if budget <= least:
        raise UserError(
            f"--memory-gib {budget / GIB:.2f}: the dense weights alone take {least / GIB:.2f} GiB"
        )
    return tuple(dict.fromkeys(options.memories)), budget


def _gpu_budget() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    total = torch.cuda.get_device_properties(0).total_memory
    return int(_GPU_SHARE * total) - _GPU_RESERVE_BYTES


def _models(
    candidates: Sequence[Candidate],
    memories: Sequence[Memory],
    kv_tokens: int,
    budget: int | None,
) -> dict[str, ArmModel]:
    models = {}
    for candidate in candidates:
        room: dict[Memory, int] = {"equal-kv": kv_tokens * candidate.cost.kv_bytes_per_token}
        if budget is not None and "equal-memory" in memories:
            room["equal-memory"] = budget - candidate.cost.weight_bytes
        models[candidate.arm.name] = ArmModel(candidate.arm, candidate.folder, room)
    return models


def _resident(
    options: ServeOptions, models: dict[str, ArmModel], memories: Sequence[Memory]
) -> bool:
    """Whether all servers stay up at once: when asked for, or when they fit and may."""
    if options.backend in ("latency", "throughput") or options.port is not None:
        return False
    if options.residency == "restart":
        return False
    if options.residency == "resident":
        return True
    if any(_is_given(name, options) for name in _PARALLEL):
        return False
    import torch

    if torch.cuda.is_available():
        available = int(_GPU_SHARE * torch.cuda.get_device_properties(0).total_memory)
    else:
        available = available_memory()
    needed = max(
        sum(
            model.arm.weight_bytes + model.kv_cache_bytes[memory] + _ENGINE_OVERHEAD_BYTES
            for model in models.values()
        )
        for memory in memories
    )
    return needed <= available


def available_memory() -> int:
    """Bytes that new processes can take: free pages, and on Linux what the page cache gives up."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        # macOS does not tell: one engine at a time is always safe.
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _identity(candidate: Candidate) -> dict[str, Any]:
    """What identifies an arm's model."""
    return {
        "name": candidate.arm.name,
        "model": candidate.arm.model,
        "layers": candidate.arm.num_hidden_layers,
        "fingerprint": candidate.arm.fingerprint,
        "weights_sha256": candidate.weights_sha256,
        "config_sha256": _sha256(candidate.folder / "config.json"),
    }
