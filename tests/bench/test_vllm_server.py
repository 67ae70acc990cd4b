"""Our server process: waited for, asked, and gone afterwards, however it behaves."""

import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trsp.bench import process_group, vllm_server
from trsp.bench.vllm_server import VllmServer, flattened, free_port
from trsp.pruner.errors import Interrupted, RunError, UserError

_spec = importlib.util.spec_from_file_location("stand_in", Path(__file__).with_name("stand_in.py"))
assert _spec is not None
assert _spec.loader is not None
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)

Make = Callable[..., VllmServer]


def nothing() -> None:
    """Nobody wants us to stop."""


def wait_for_end(server: VllmServer) -> None:
    deadline = time.monotonic() + 30
    while server.group.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Start a stand-in of a kind; none may be left in the end, not even a child of a child."""
    monkeypatch.setattr(process_group, "_GRACE_SECONDS", 1.0)
    monkeypatch.setattr(vllm_server, "_POLL_SECONDS", 0.05)
    token = str(tmp_path)

    def started(kind: str, *, port: int | None = None, **environment: str) -> VllmServer:
        return VllmServer(
            [sys.executable, str(stand_in.SERVER), "--dtype", "float32"],
            log=tmp_path / "server.log",
            environment={"STAND_IN": kind, stand_in.TOKEN: token, **environment},
            port=port,
        )

    yield started
    stand_in.wait_until_gone(token)


def test_a_healthy_server_is_asked_and_ended(make: Make) -> None:
    with make("uneven") as server:
        server.wait_until_healthy(60, nothing)
        assert 0 < server.load_seconds < 60
        assert server.engine_config() == {
            "model_config.model": "no model",
            "model_config.num_hidden_layers": "8",
            "model_config.dtype": "float32",
            "model_config.max_model_len": "0",
            "cache_config.kv_cache_memory_bytes": "0",
            "compilation_config.ops": '["none", "+silu"]',
            "compilation_config.passes.0.fuse": "true",
        }
        assert server.counters()["vllm:prefix_cache_hits_total"] == 2.0
        assert "process_open_fds" not in server.counters()
        assert server.kv_cache() == (72 * 16, 72)
        assert server.weights_gib() == 0.25
        assert server.command_line.endswith(f"--dtype float32 --port {server.port}")
        group = server.group.process.pid
        assert stand_in.group_members(group) == [group]
    assert stand_in.group_members(group) == []


def test_counters_are_summed_over_labels(make: Make) -> None:
    with make("", STAND_IN_HITS="5") as server:
        server.wait_until_healthy(60, nothing)
        assert server.counters()["vllm:prefix_cache_hits_total"] == 7.0


def test_it_listens_on_this_machine_only(make: Make) -> None:
    with make("") as server:
        server.wait_until_healthy(60, nothing)
        assert server.base_url == f"http://127.0.0.1:{server.port}"


def test_a_proxy_of_the_user_is_not_asked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with make("") as server:
        server.wait_until_healthy(60, nothing)


def test_a_server_that_says_nothing_of_its_cache(make: Make) -> None:
    with make("bare") as server:
        server.wait_until_healthy(60, nothing)
        assert server.kv_cache() is None
        assert server.counters() == {}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("dies", "exit code 3: ValueError: no such thing"),
        ("oom", "exit code 1: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
        ("unservable", "exit code 1: ValueError: Model architectures ['Odd'] are not supported"),
        ("dies,parent", "exit code 3: ValueError: no such thing"),
    ],
)
def test_a_server_that_ends_is_one_line_with_its_last_words(
    kind: str, told: str, make: Make
) -> None:
    server = make(kind)
    with pytest.raises(RunError, match="the server ended") as raised, server:
        server.wait_until_healthy(60, nothing)
    message = str(raised.value)
    assert told in message
    assert "server.log" in message
    assert "\n" not in message
    assert stand_in.group_members(server.group.process.pid) == []


@pytest.mark.parametrize("kind", ["silent", "unhealthy", "silent,deaf", "unhealthy,parent,deaf"])
def test_a_server_that_never_gets_healthy_is_ended(kind: str, make: Make) -> None:
    with (
        pytest.raises(RunError, match=r"not healthy after 1 s .*Model loading took") as raised,
        make(kind) as server,
    ):
        server.wait_until_healthy(1.0, nothing)
    assert "\n" not in str(raised.value)


def test_a_server_that_takes_calls_and_says_nothing_does_not_hold_us_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def impatient() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise Interrupted(15)

    before = time.monotonic()
    with pytest.raises(Interrupted), make("mute") as server:
        server.wait_until_healthy(600, impatient)
    # Twice a second is promised; the health question itself must not take half a minute.
    assert time.monotonic() - before < 20


def test_a_stop_while_waiting_is_passed_on(make: Make) -> None:
    def stop() -> None:
        raise Interrupted(2)

    with pytest.raises(Interrupted), make("silent,parent") as server:
        server.wait_until_healthy(600, stop)


def test_a_server_that_dies_after_its_health_tells_why(make: Make) -> None:
    server = make("mortal")
    with pytest.raises(RunError, match=r"exit code 7: .*the engine fell over"), server:  # noqa: PT012
        server.wait_until_healthy(60, nothing)
        wait_for_end(server)
        server.require_alive()


@pytest.mark.parametrize("question", ["engine_config", "counters", "kv_cache"])
def test_a_question_to_a_dead_server_tells_why_it_died(question: str, make: Make) -> None:
    server = make("mortal")
    with pytest.raises(RunError, match=r"exit code 7: .*the engine fell over"), server:  # noqa: PT012
        server.wait_until_healthy(60, nothing)
        wait_for_end(server)
        getattr(server, question)()


def test_a_question_that_a_living_server_does_not_answer_is_one_line(make: Make) -> None:
    with make("") as server:
        server.wait_until_healthy(60, nothing)
        with pytest.raises(RunError, match="404"):
            server._get("/nowhere")


def test_another_server_on_the_port_is_not_taken_for_ours(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port is free when we look and another's when our server binds it."""
    with make("") as other:
        other.wait_until_healthy(60, nothing)
        monkeypatch.setattr(vllm_server, "free_port", lambda: other.port)
        with (  # noqa: PT012
            pytest.raises(RunError, match=r"the server ended .*Address already in use"),
            make("") as ours,
        ):
            wait_for_end(ours)
            ours.wait_until_healthy(60, nothing)


def test_a_port_that_is_taken_is_refused_before_anything_starts(make: Make, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is taken .* --port"):
            make("", port=port)
    assert not (tmp_path / "server.log").exists()


def test_a_port_is_free_again_after_its_server(make: Make) -> None:
    port = free_port()
    for _ in range(2):
        with make("", port=port) as server:
            server.wait_until_healthy(60, nothing)
            assert server.port == port
            assert server.counters()


@pytest.mark.parametrize(
    ("line", "compiled"),
    [
        ("INFO Avg generation throughput: 5.0 tokens/s, recorded\n", False),
        ("INFO [backends.py] Compiling a graph for dynamic shape takes 4.2 s\n", True),
        ("INFO Capturing CUDA graphs (decode)\n", True),
        ("WARNING torch._dynamo hit config.recompile_limit (8)\n", True),
        ("WARNING Triton kernel JIT compilation during inference: _fwd_kernel.\n", True),
        ("WARNING TileLang kernel JIT compilation during inference: mhc. latency spike\n", True),
    ],
)
def test_compilation_is_seen_in_the_window_only(line: str, compiled: bool, make: Make) -> None:
    with make("") as server:
        with server.group.log.open("a") as log:
            log.write("INFO Starting torch.compile; Capturing CUDA graphs\n")
            log.flush()
            size = server.log_size()
            assert not server.compiled_since(size)
            log.write(line)
            log.flush()
        assert server.compiled_since(size) is compiled


def test_a_configuration_is_flattened() -> None:
    assert flattened({"a": {"b": 1, "c": None}, "d": [1, 2], "e": [{"f": "g"}], "h": True}) == {
        "a.b": "1",
        "a.c": "null",
        "d": "[1, 2]",
        "e.0.f": "g",
        "h": "true",
    }
    assert flattened({"a": {}, "b": []}) == {"b": "[]"}


def test_no_descriptor_leaks(make: Make) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(2):
        with pytest.raises(RunError), make("dies") as server:
            server.wait_until_healthy(60, nothing)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
