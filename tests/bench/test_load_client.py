"""The client that stays: asked over pipes, timed, and gone with us."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trsp.bench import load_client, process_group, serve_backend
from trsp.bench.load_client import LoadClient
from trsp.bench.serve_backend import client_arguments, measured
from trsp.bench.serve_record import Load, Workload
from trsp.bench.vllm_server import VllmServer
from trsp.pruner.errors import Interrupted, RunError

_spec = importlib.util.spec_from_file_location("stand_in", Path(__file__).with_name("stand_in.py"))
assert _spec is not None
assert _spec.loader is not None
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)

Make = Callable[..., LoadClient]
WORKLOAD = Workload(
    input_len=16, output_len=4, dtype="float32", seed=3, ttft_slo_ms=2000.0, tpot_slo_ms=100.5
)
CLOSED = Load(name="closed 2", kind="closed", concurrency=2, num_requests=6)
OPEN = Load(name="open 0.5", kind="open", share=0.5, request_rate=2.5, num_requests=6)


def nothing() -> None:
    """Nobody wants us to stop."""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Start a client of a kind over a vLLM that is a stand-in; none may be left in the end."""
    monkeypatch.setattr(process_group, "_GRACE_SECONDS", 1.0)
    environment = stand_in.install(tmp_path)

    def started(kind: str = "") -> LoadClient:
        return LoadClient(
            log=tmp_path / "client.log", environment={**environment, "STAND_IN_CLIENT": kind}
        )

    yield started
    stand_in.wait_until_gone(environment[stand_in.TOKEN])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VllmServer]:
    command = [sys.executable, str(stand_in.SERVER)]
    with VllmServer(command, log=tmp_path / "server.log", environment={}) as started:
        started.wait_until_healthy(60, nothing)
        yield started


def arguments(server: VllmServer, load: Load = CLOSED) -> list[str]:
    return client_arguments(load, WORKLOAD, Path("tokenizer"), server)


def test_one_client_measures_again_and_again(make: Make, server: VllmServer) -> None:
    with make() as client:
        client.wait_until_ready(nothing)
        results = [
            client.measure(arguments(server, load), timeout_seconds=60, waiting=nothing)
            for load in (CLOSED, CLOSED, OPEN)
        ]
        assert [result.document["completed"] for result in results] == [6, 6, 6]
        # The prompts are the requests', not the arrivals'.
        assert len({result.prompts_sha256 for result in results}) == 1
        assert all(0 <= result.cpu_share < 0.9 for result in results)
    assert "noise that vLLM prints" in client.group.log.read_text()


def test_other_prompts_have_another_hash(make: Make, server: VllmServer) -> None:
    with make("moody") as client:
        client.wait_until_ready(nothing)
        hashes = {
            client.measure(arguments(server), timeout_seconds=60, waiting=nothing).prompts_sha256
            for _ in range(2)
        }
        assert len(hashes) == 2


def test_a_client_that_takes_a_core_is_seen(make: Make, server: VllmServer) -> None:
    with make("busy") as client:
        client.wait_until_ready(nothing)
        result = client.measure(arguments(server), timeout_seconds=60, waiting=nothing)
    # Of a crowded machine it may get less than a core.
    assert result.cpu_share > 0.3
    found = measured(
        load_client.ClientResult(result.document, result.prompts_sha256, 0.95),
        CLOSED, WORKLOAD, prefix_cache_hits=0, num_preemptions=0,
    )  # fmt: skip
    assert found.invalid == ["the client took 95% of a core: it may be slower than the server"]


def test_an_error_is_one_line_and_the_client_stays(make: Make, server: VllmServer) -> None:
    with make("third") as client:
        client.wait_until_ready(nothing)
        for _ in range(2):
            client.measure(arguments(server), timeout_seconds=60, waiting=nothing)
        with pytest.raises(RunError, match=r"ValueError: Initial test run failed - .*is well") as e:
            client.measure(arguments(server), timeout_seconds=60, waiting=nothing)
        assert "\n" not in str(e.value)
        with pytest.raises(RunError, match="SystemExit: 2"):
            client.measure(["--unknown"], timeout_seconds=60, waiting=nothing)
        client.measure(arguments(server), timeout_seconds=60, waiting=nothing)


def test_a_client_that_ends_is_one_line(make: Make, server: VllmServer) -> None:
    with make("exits") as client:
        client.wait_until_ready(nothing)
        for _ in range(2):  # the second time it is gone before it is asked
            with pytest.raises(RunError, match=r"client ended: .*Connection reset by peer"):
                client.measure(arguments(server), timeout_seconds=60, waiting=nothing)


def test_a_client_that_cannot_start_is_one_line(make: Make, tmp_path: Path) -> None:
    with make() as client:
        client.wait_until_ready(nothing)
    (tmp_path / "packages/vllm/benchmarks/serve.py").write_text("import no_such_module\n")
    with (
        pytest.raises(RunError, match=r"client ended: .*No module named 'no_such_module'"),
        make() as client,
    ):
        client.wait_until_ready(nothing)


@pytest.mark.parametrize("why", ["timeout", "signal"])
def test_a_client_that_never_answers_is_ended(why: str, make: Make, server: VllmServer) -> None:
    asked = False

    def stop() -> None:
        if asked and why == "signal":
            raise Interrupted(2)

    with pytest.raises((RunError, Interrupted)) as raised, make("stuck") as client:  # noqa: PT012
        client.wait_until_ready(nothing)
        asked = True
        seconds = 0.6 if why == "timeout" else 60.0
        client.measure(arguments(server), timeout_seconds=seconds, waiting=stop)
    assert raised.type is (Interrupted if why == "signal" else RunError)
    assert stand_in.group_members(client.group.process.pid) == []


def test_the_client_ends_with_its_stdin_even_where_no_signal_tells_it(tmp_path: Path) -> None:
    environment = stand_in.install(tmp_path)
    client = subprocess.Popen(
        load_client.COMMAND, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert client.stdout is not None
    assert client.stdin is not None
    assert client.stdout.readline() == b'{"ready": true}\n'
    client.stdin.close()
    assert client.wait(timeout=30) == 0


def test_no_descriptor_leaks(make: Make) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with make() as client:
        client.wait_until_ready(nothing)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_the_command_line_is_that_of_the_experiment(server: VllmServer) -> None:
    closed, paced = arguments(server), arguments(server, OPEN)

    def value(words: list[str], name: str) -> str:
        return words[words.index(name) + 1]

    for words in (closed, paced):
        assert value(words, "--num-prompts") == "6"
        assert value(words, "--random-input-len") == "16"
        assert value(words, "--random-output-len") == "4"
        assert value(words, "--seed") == "3"
        assert value(words, "--tokenizer") == "tokenizer"
        assert words[words.index("--goodput") + 1 :][:2] == ["ttft:2000", "tpot:100.5"]
        assert "--ignore-eos" in words
    assert value(closed, "--max-concurrency") == "2"
    assert value(closed, "--num-warmups") == "4"
    assert "--request-rate" not in closed
    assert value(paced, "--request-rate") == "2.5"
    assert "--max-concurrency" not in paced


def test_zero_completed_requests_is_one_line(make: Make, server: VllmServer) -> None:
    with make("fails") as client:
        client.wait_until_ready(nothing)
        result = client.measure(arguments(server), timeout_seconds=60, waiting=nothing)
    with pytest.raises(RunError, match=r"closed 2: not one of 6 requests .*: Connect call failed"):
        measured(result, CLOSED, WORKLOAD, prefix_cache_hits=0, num_preemptions=0)


@pytest.mark.parametrize(("count", "has_p99"), [(999, False), (1000, True)])
def test_a_p99_needs_a_thousand_requests(
    count: int, has_p99: bool, make: Make, server: VllmServer
) -> None:
    load = Load(name="closed 2", kind="closed", concurrency=2, num_requests=count)
    with make() as client:
        client.wait_until_ready(nothing)
        result = client.measure(arguments(server, load), timeout_seconds=60, waiting=nothing)
    found = measured(result, load, WORKLOAD, prefix_cache_hits=0, num_preemptions=3)
    assert ("p99_ttft_ms" in found.metrics) is has_p99
    assert found.notes == ["3 preemptions"]
    assert found.invalid == []
    assert serve_backend.PERCENTILES == (90, 99)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is a signal on Linux only")
def test_the_client_does_not_outlive_us(tmp_path: Path) -> None:
    environment = stand_in.install(tmp_path)
    program = """
import sys, time
from pathlib import Path
from trsp.bench.load_client import LoadClient
client = LoadClient(log=Path(sys.argv[1]), environment={"STAND_IN_CLIENT": "stuck"})
client.wait_until_ready(lambda: None)
print(client.group.process.pid, flush=True)
time.sleep(600)
"""
    us = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "client.log")],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert us.stdout is not None
    group = int(us.stdout.readline())
    assert stand_in.group_members(group) == [group]
    us.send_signal(signal.SIGKILL)
    us.wait()
    deadline = time.monotonic() + 30
    while stand_in.group_members(group):
        assert time.monotonic() < deadline
        time.sleep(0.02)
