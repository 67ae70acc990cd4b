"""vLLM's OpenAI server under vLLM's own serving client."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trsp.bench.load_client import ClientResult, LoadClient
from trsp.bench.serve_record import Load, Memory, Start, Workload
from trsp.bench.serve_validity import cell_problems
from trsp.bench.speed_backend import ArmModel, Measured, Session, with_variables
from trsp.bench.vllm_server import VllmServer
from trsp.pruner.errors import RunError
from trsp.serving.server_command import server_command

SERVED_NAME = "model"
PERCENTILES = (90, 99)
# vLLM's keys that become metrics; a p99 of fewer requests than these is an accident.
MIN_REQUESTS_FOR_P99 = 1000
_THROUGHPUTS = ("request_throughput", "output_throughput", "total_token_throughput")
_LATENCIES = ("ttft", "tpot", "itl", "e2el")
_OPEN_WARMUPS = 8
_MAX_WARMUPS = 64


@dataclass
class ServeBackend:
    """Starts servers as `trsp serve` does, and one client for all of them.

    Args:
        server_flags: the same for every arm, among them the user's.
        environment: for servers and client.
        logs: folder for their logs.
        port: of the only server at a time; None takes free ones.
    """

    engine: str
    server_flags: Sequence[str]
    environment: Mapping[str, str]
    workload: Workload
    logs: Path
    port: int | None
    health_timeout_seconds: float
    cell_timeout_seconds: float
    _client: LoadClient | None = field(default=None, init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False)
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False)

    def __enter__(self) -> "ServeBackend":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.close()

    def server_command(self, model: ArmModel, memory: Memory) -> list[str]:
        """The server's command line for an arm, without its port."""
        room = str(model.kv_cache_bytes[memory])
        flags = ["--kv-cache-memory-bytes", room, *self.server_flags]
        command = server_command(model.folder, flags, name=SERVED_NAME, with_map=False)
        return list(command.arguments)

    @contextlib.contextmanager
    def session(
        self, model: ArmModel, memory: Memory, block: int, waiting: Callable[[], None]
    ) -> Iterator[Session]:
        """See SpeedBackend."""
        client = self._started_client(waiting)
        slug = model.arm.name.replace(" ", "-")
        log = self.logs / f"server-{next(self._numbers)}-{memory}-{slug}.log"
        log.unlink(missing_ok=True)
        with VllmServer(
            self.server_command(model, memory),
            log=log,
            environment=self.environment,
            port=self.port,
        ) as server:
            server.wait_until_healthy(self.health_timeout_seconds, waiting)
            room = server.kv_cache()
            start = Start(
                arm=model.arm.name,
                memory=memory,
                block=block,
                command=with_variables(self.environment, server.command_line),
                load_seconds=server.load_seconds,
                weights_gib=server.weights_gib(),
                kv_cache_tokens=room[0] if room else None,
                num_kv_blocks=room[1] if room else None,
                engine_config=server.engine_config(),
            )
            yield _ServeSession(self, server, client, model, start, waiting)

    def _started_client(self, waiting: Callable[[], None]) -> LoadClient:
        if self._client is None:
            client = self._stack.enter_context(
                LoadClient(log=self.logs / "client.log", environment=self.environment)
            )
            client.wait_until_ready(waiting)
            self._client = client
        return self._client


@dataclass(frozen=True)
class _ServeSession:
    backend: ServeBackend
    server: VllmServer
    client: LoadClient
    model: ArmModel
    start: Start
    waiting: Callable[[], None]

    def measure(self, load: Load) -> Measured:
        """See Session. A window with compilation in it is thrown away, once."""
        found, compiled = self._measure(load)
        if compiled:
            found, compiled = self._measure(load)
            found.notes.append("measured again: the first window had compilation in it")
        if compiled:
            found.invalid.append("the engine compiled or captured graphs inside the window")
        return found

    def _measure(self, load: Load) -> tuple[Measured, bool]:
        before, logged = self.server.counters(), self.server.log_size()
        try:
            result = self.client.measure(
                client_arguments(load, self.backend.workload, self.model.folder, self.server),
                timeout_seconds=self.backend.cell_timeout_seconds,
                waiting=self.waiting,
            )
        except RunError:
            # A server that died is the better explanation of a client that failed.
            self.server.require_alive()
            raise
        self.server.require_alive()
        after = self.server.counters()

        def counted(name: str) -> int | None:
            return int(after[name] - before.get(name, 0.0)) if name in after else None

        found = measured(
            result,
            load,
            self.backend.workload,
            prefix_cache_hits=counted("vllm:prefix_cache_hits_total"),
            num_preemptions=counted("vllm:num_preemptions_total"),
        )
        return found, self.server.compiled_since(logged)


def client_arguments(
    load: Load, workload: Workload, tokenizer: Path, server: VllmServer
) -> list[str]:
    """The command line of `vllm bench serve` for one measurement."""
    arguments = {
        "--backend": "openai",
        "--base-url": server.base_url,
        "--endpoint": "/v1/completions",
        "--model": SERVED_NAME,
        "--tokenizer": str(tokenizer),
        "--dataset-name": "random",
        "--random-input-len": workload.input_len,
        "--random-output-len": workload.output_len,
        "--random-range-ratio": 0.0,
        "--num-prompts": load.num_requests,
        "--seed": workload.seed,
        "--temperature": 0,
        "--percentile-metrics": ",".join(_LATENCIES),
        "--metric-percentiles": ",".join(map(str, PERCENTILES)),
    }
    if load.kind == "open":
        arguments |= {"--request-rate": load.request_rate, "--num-warmups": _OPEN_WARMUPS}
    else:
        in_flight = load.concurrency or load.num_requests
        arguments |= {
            "--max-concurrency": in_flight,
            "--num-warmups": min(2 * in_flight, _MAX_WARMUPS),
        }
    flat = [str(item) for pair in arguments.items() for item in pair]
    goodput = [f"ttft:{workload.ttft_slo_ms:g}", f"tpot:{workload.tpot_slo_ms:g}"]
    return [*flat, "--goodput", *goodput, "--ignore-eos", "--disable-tqdm", "--save-detailed"]


def measured(
    result: ClientResult,
    load: Load,
    workload: Workload,
    *,
    prefix_cache_hits: int | None,
    num_preemptions: int | None,
) -> Measured:
    """A client's run as a measurement, with what invalidates it.

    Raises:
        RunError: not one request was completed.
    """
    document = result.document
    if not document["completed"]:
        errors = sorted({" ".join(str(error).split())[-200:] for error in document["errors"]})
        raise RunError(
            f"load {load.name}: not one of {load.num_requests} requests was completed: "
            f"{errors[0] if errors else 'no reason given'}"
        )
    names = [*_THROUGHPUTS, "request_goodput"]
    for latency in _LATENCIES:
        names += [f"{kind}_{latency}_ms" for kind in ("mean", "median", "p90")]
        if load.num_requests >= MIN_REQUESTS_FOR_P99:
            names.append(f"p99_{latency}_ms")
    notes = [f"{num_preemptions} preemptions"] if num_preemptions else []
    return Measured(
        metrics={name: float(document[name]) for name in names},
        completed=int(document["completed"]),
        failed=int(document["failed"]),
        total_input_tokens=int(document["total_input_tokens"]),
        total_output_tokens=int(document["total_output_tokens"]),
        raw=document,
        prompts_sha256=result.prompts_sha256,
        client_cpu_share=result.cpu_share,
        prefix_cache_hits=prefix_cache_hits,
        num_preemptions=num_preemptions,
        notes=notes,
        invalid=cell_problems(
            document,
            load,
            workload,
            cpu_share=result.cpu_share,
            prefix_cache_hits=prefix_cache_hits,
        ),
    )
