"""Plain transformers in this process as a speed backend: the paper's own protocol."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trsp.bench.serve_record import Load, Memory, Start, Workload
from trsp.bench.speed_backend import ArmModel, Measured, Session
from trsp.bench.transformers_speed import (
    LoadFormat,
    PaperProtocol,
    load_arm,
    measure_generation,
    measure_prompt,
    require_positions,
    synchronize,
)
from trsp.pruner.errors import RunError

PROMPT = "prompt"
GENERATION = "generation"


def loads(batch_size: int, prompts: int) -> list[Load]:
    """The two measurements of the protocol."""
    return [
        Load(name=PROMPT, kind="batch", concurrency=1, num_requests=prompts),
        Load(name=GENERATION, kind="batch", concurrency=batch_size, num_requests=batch_size),
    ]


@dataclass(frozen=True)
class TransformersBackend:
    """Loads a model for each session. `device`: cuda where there is one.

    There is no server and no client: `waiting` is asked between measurements only.
    """

    load_format: LoadFormat
    workload: Workload
    protocol: PaperProtocol
    device: str
    engine: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def session(
        self, model: ArmModel, memory: Memory, block: int, waiting: Callable[[], None]
    ) -> Iterator[Session]:
        """See SpeedBackend."""
        import torch

        require_positions(model.folder, self.protocol)
        started = time.monotonic()
        try:
            loaded = load_arm(
                model.folder,
                load_format=self.load_format,
                dtype=self.workload.dtype,
                device=self.device,
            )
            synchronize(self.device)
            seconds = time.monotonic() - started
            for seed in range(self.protocol.warmups):
                waiting()
                measure_prompt(loaded, self.protocol, device=self.device, seed=-1 - seed)
                measure_generation(loaded, self.protocol, device=self.device, seed=-1 - seed)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(model) from error
        start = Start(
            arm=model.arm.name,
            memory=memory,
            block=block,
            command=f"transformers, {model.arm.model}, {self.device}",
            load_seconds=seconds,
            weights_gib=sum(p.numel() * p.element_size() for p in loaded.parameters()) / 2**30,
            kv_cache_tokens=None,
            num_kv_blocks=None,
            engine_config={},
        )
        try:
            yield _TransformersSession(self, model, loaded, start, waiting)
        finally:
            del loaded
            gc.collect()
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()

    def _out_of_memory(self, model: ArmModel) -> RunError:
        return RunError(
            f"{model.arm.name}: out of memory on {self.device} with batch "
            f"{self.protocol.batch_size} of {self.protocol.input_len} + {self.protocol.output_len} "
            "tokens; give a smaller --concurrency, or --servers restart"
        )


@dataclass(frozen=True)
class _TransformersSession:
    backend: TransformersBackend
    model: ArmModel
    loaded: Any
    start: Start
    waiting: Callable[[], None]

    def measure(self, load: Load) -> Measured:
        """See Session."""
        import torch

        self.waiting()
        backend, protocol = self.backend, self.backend.protocol
        function = measure_prompt if load.name == PROMPT else measure_generation
        try:
            metrics = function(
                self.loaded, protocol, device=backend.device, seed=backend.workload.seed
            )
        except torch.OutOfMemoryError as error:
            raise backend._out_of_memory(self.model) from error
        tokens_in = protocol.batch_size * protocol.input_len
        tokens_out = protocol.batch_size * protocol.output_len
        if load.name == PROMPT:
            tokens_in, tokens_out = protocol.prompts * protocol.prompt_tokens, 0
        return Measured(
            metrics=metrics,
            completed=load.num_requests,
            failed=0,
            total_input_tokens=tokens_in,
            total_output_tokens=tokens_out,
            raw={"seed": backend.workload.seed},
        )
