"""vLLM's offline benchmarks, `latency` and `throughput`: a fresh engine for each measurement."""

import contextlib
import hashlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trsp.bench.offline_program import call_line
from trsp.bench.process_group import ProcessGroup, shown_command
from trsp.bench.serve_record import Load, Memory, Start, Workload
from trsp.bench.speed_backend import ArmModel, Measured, Session, with_variables
from trsp.bench.vllm_server import COMPILES, flattened
from trsp.pruner.errors import RunError

_PROGRAM = (sys.executable, "-P", "-m", "trsp.bench.offline_program")
_POLL_SECONDS = 0.5
_WEIGHTS = re.compile(r"Model loading took ([0-9.]+) GiB")


@dataclass
class OfflineBackend:
    """Runs `vllm bench latency` or `throughput` once for each measurement.

    Args:
        name: "latency" or "throughput".
        num_iterations: of latency; its metrics are over these.
    """

    name: str
    engine: str
    engine_flags: Sequence[str]
    environment: Mapping[str, str]
    workload: Workload
    logs: Path
    num_iterations: int
    timeout_seconds: float
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False)

    @contextlib.contextmanager
    def session(
        self, model: ArmModel, memory: Memory, block: int, waiting: Callable[[], None]
    ) -> Iterator[Session]:
        """See SpeedBackend."""
        yield _OfflineSession(self, model, memory, block, waiting)

    def arguments(self, model: ArmModel, memory: Memory, load: Load) -> list[str]:
        """The command line of vLLM's benchmark."""
        size = load.concurrency if self.name == "latency" else load.num_requests
        own: dict[str, Any] = {
            "--model": model.folder,
            "--kv-cache-memory-bytes": model.kv_cache_bytes[memory],
            "--seed": self.workload.seed,
        }
        if self.name == "latency":
            own |= {
                "--input-len": self.workload.input_len,
                "--output-len": self.workload.output_len,
                "--batch-size": size,
                "--num-iters": self.num_iterations,
                "--num-iters-warmup": 2,
            }
        else:
            own |= {
                "--dataset-name": "random",
                "--random-input-len": self.workload.input_len,
                "--random-output-len": self.workload.output_len,
                "--random-range-ratio": 0.0,
                "--num-prompts": size,
                "--num-warmups": min(8, size or 1),
            }
        flat = [str(item) for pair in own.items() for item in pair]
        return [*flat, "--disable-detokenize", *self.engine_flags]


class _OfflineSession:
    def __init__(
        self,
        backend: OfflineBackend,
        model: ArmModel,
        memory: Memory,
        block: int,
        waiting: Callable[[], None],
    ) -> None:
        self._backend, self._model, self._memory = backend, model, memory
        self._block, self._waiting = block, waiting
        self._start: Start | None = None

    @property
    def start(self) -> Start:
        """See Session."""
        if self._start is None:
            raise RunError("nothing was measured yet: an offline engine tells of itself at its end")
        return self._start

    def measure(self, load: Load) -> Measured:
        """See Session."""
        backend = self._backend
        stem = f"{backend.name}-{next(backend._numbers)}-{self._model.arm.name.replace(' ', '-')}"
        out, log = backend.logs / f"{stem}.json", backend.logs / f"{stem}.log"
        for old in (out, log):
            old.unlink(missing_ok=True)
        arguments = backend.arguments(self._model, self._memory, load)
        command = [*_PROGRAM, backend.name, str(out), *arguments]
        started = time.monotonic()
        group = ProcessGroup(command, log=log, environment=backend.environment)
        try:
            while group.is_alive():
                self._waiting()
                if time.monotonic() - started > backend.timeout_seconds:
                    raise RunError(
                        f"vllm bench {backend.name} was not done after "
                        f"{backend.timeout_seconds:.0f} s: {group.last_lines()} (whole log: {log})"
                    )
                time.sleep(_POLL_SECONDS)
        finally:
            code = group.stop()
        if code or not out.is_file():
            raise RunError(
                f"vllm bench {backend.name} ended with exit code {code}: {group.last_lines()} "
                f"(whole log: {log})"
            )
        document = json.loads(out.read_text(encoding="utf-8"))
        watched = json.loads(Path(f"{out}.engine.json").read_text(encoding="utf-8"))
        text = log.read_text(errors="replace")
        seconds = time.monotonic() - started
        self._start = self._told(command, text, watched["vllm_config"], document, seconds)
        timed = watched["calls"][-backend.num_iterations if backend.name == "latency" else -1 :]
        first = len(watched["calls"]) - len(timed)
        invalid = call_problems(timed, load, backend.workload)
        if COMPILES.search(text.partition(call_line(first))[2]):
            invalid.append("the engine compiled or captured graphs inside the window")
        return self._measured(document, timed, invalid)

    def _told(
        self,
        command: list[str],
        log: str,
        config: dict[str, Any],
        document: dict[str, Any],
        seconds: float,
    ) -> Start:
        weights = _WEIGHTS.findall(log)
        cache = config.get("cache_config", {})
        blocks, size = cache.get("num_gpu_blocks"), cache.get("block_size")
        has_room = isinstance(blocks, int) and isinstance(size, int)
        measuring = sum(document.get("latencies", [document.get("elapsed_time", 0.0)]))
        return Start(
            arm=self._model.arm.name,
            memory=self._memory,
            block=self._block,
            command=with_variables(self._backend.environment, shown_command(command)),
            load_seconds=max(0.0, seconds - measuring),
            weights_gib=sum(map(float, weights)) if weights else None,
            kv_cache_tokens=blocks * size if has_room else None,
            num_kv_blocks=blocks if has_room else None,
            engine_config=flattened(config),
        )

    def _measured(
        self, document: dict[str, Any], timed: Sequence[dict[str, Any]], invalid: list[str]
    ) -> Measured:
        if self._backend.name == "latency":
            metrics = {"avg_latency_ms": document["avg_latency"] * 1000}
            for percentile, seconds in document["percentiles"].items():
                if percentile != "99" or self._backend.num_iterations >= 1000:
                    metrics[f"p{percentile}_latency_ms"] = seconds * 1000
        else:
            metrics = {
                name: float(document[name]) for name in ("requests_per_second", "tokens_per_second")
            }
        prompts = sorted({call["prompts_sha256"] for call in timed})
        return Measured(
            metrics=metrics,
            completed=sum(len(call["output_lens"]) for call in timed),
            failed=0,
            total_input_tokens=sum(sum(call["prompt_lens"]) for call in timed),
            total_output_tokens=sum(sum(call["output_lens"]) for call in timed),
            raw=document,
            prompts_sha256=hashlib.sha256("".join(prompts).encode()).hexdigest(),
            invalid=invalid,
        )


def call_problems(timed: Sequence[dict[str, Any]], load: Load, workload: Workload) -> list[str]:
    """Why the timed calls of an engine do not count; empty when they do.

    A prompt of vLLM's throughput benchmark is token ids turned into text, which a tokenizer may
    read back as a few more or fewer: its length is not checked, and that every arm got the same is.
    """
    lengths = [length for call in timed for length in call["output_lens"]]
    problems = []
    if len(lengths) != load.num_requests:
        problems.append(f"{len(lengths)} requests were timed, planned {load.num_requests}")
    if any(length != workload.output_len for length in lengths):
        problems.append(f"outputs are not all {workload.output_len} tokens long")
    return problems
