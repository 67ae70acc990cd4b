"""`trsp bench serve` as typed: refusals, dry run, whole experiments over a stand-in for vLLM."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trsp.bench import load_client, serve_design, vllm_server
from trsp.bench.cli import app
from trsp.bench.serve_record import ServeRecord, read_serve_record
from trsp.serving import vllm_versions

_spec = importlib.util.spec_from_file_location("stand_in", Path(__file__).with_name("stand_in.py"))
assert _spec is not None
assert _spec.loader is not None
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)

RUN_CLI = "import sys; from trsp.bench.cli import main; sys.argv[0] = 'trsp'; main()"
PICO = ("--shape", "pico", "--remove", "2")
SMALL = (
    *PICO, "--num-blocks", "1", "--concurrency", "2", "--num-requests", "4", "--no-open",
    "--memory", "equal-kv", "--input-len", "16", "--output-len", "4",
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a", *PICO], "--shape takes no model folders"),
        ([], "name the dense model and the pruned ones, or a --shape with --remove"),
        (["a", "b", "--remove", "1"], "--remove makes the pruned arms itself"),
        (["a"], "one model alone is no comparison"),
        (["a", "--remove", "1"], "add --load-format dummy"),
        (["a", "b", "--load-format", "pt"], "--load-format 'pt': choose auto or dummy"),
        ([*PICO, "--servers", "many"], "--servers 'many': choose auto, resident or restart"),
        ([*PICO, "--num-blocks", "0"], "--num-blocks 0: expected at least 1"),
        ([*PICO, "--input-len", "0"], "--input-len 0: expected at least 1"),
        ([*PICO, "--output-len", "-3"], "--output-len -3: expected at least 1"),
        ([*PICO, "--num-iters", "0"], "--num-iters 0: expected at least 1"),
        ([*PICO, "--output-len", "1"], "--output-len 1 has no time between tokens"),
        ([*PICO, "--", "--dtype", "half"], "--dtype is set by the experiment"),
        ([*PICO, "--", "--port=3"], "--port is set by the experiment"),
        ([*PICO, "--", "--max_model_len", "9"], "--max-model-len is set by the experiment"),
        ([*PICO, "--", "--speculative-config.method", "x"], "--speculative-config would have a"),
        ([*PICO, "--", "--quantiz", "fp8"], "--quantization would make weights or cache take"),
        ([*PICO, "--", "--hf-overrides", "{}"], "--hf-overrides would make every arm another"),
        ([*PICO, "--memory-gib", "9", "--", "-tp", "2"], "-tp: equal memory is computed for one"),
        ([*PICO, "--backend", "latency", "--port", "1"], "--port means nothing to --backend lat"),
        ([*PICO, "--port", "1", "--servers", "resident"], "--port is one port"),
        ([*PICO, "--backend", "sglang"], "--backend 'sglang' is unknown; choose from serve"),
        ([*PICO, "--memory", "much"], "--memory 'much' is unknown; choose from equal-kv"),
        ([*PICO, "--memory-gib", "0.001"], "--memory-gib 0.00: the dense weights alone take"),
        ([*PICO, "--memory-gib", "nan"], "--memory-gib nan"),
        ([*PICO, "--kv-tokens", "0"], "--kv-tokens 0"),
        ([*PICO, "--kv-tokens", "-1"], "--kv-tokens -1"),
        ([*PICO, "--ttft-slo", "nan"], "--ttft-slo nan"),
        ([*PICO, "--concurrency", "0"], "--concurrency [0]: give one or more different"),
        ([*PICO, "--num-requests", "3"], "--num-requests 3 is less than --concurrency 16"),
        ([*PICO, "--rate", "0.5", "--no-open"], "--rate is an open loop"),
        ([*PICO, "--rate", "1.5"], "--rate [1.5]: give different shares of the capacity"),
        (["--shape", "gpt-9", "--remove", "1"], "--shape 'gpt-9' is unknown"),
        (["--shape", "pico", "--remove", "8"], "--remove [8]: pico has 8 layers"),
        (["--shape", "pico"], "--remove []: pico has 8 layers"),
        (["nowhere", "neither"], "nowhere: has no config.json"),
        ([*PICO, "--memory", "equal-memory"], "--memory equal-memory without a GPU"),
        ([*PICO, "--out", "."], "--out .: give a folder of its own"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_exit_2(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    at = words.index("--") if "--" in words else len(words)
    found = CliRunner().invoke(app, ["bench", "serve", *words[:at], "--dry-run", *words[at:]])
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith("error: ")
    assert told in found.stderr
    assert found.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_not_taken_for_vllms(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["bench", "serve", *PICO, "--max-num-seqs", "4"])
    assert found.exit_code == 2
    assert "No such option: --max-num-seqs" in found.stderr


class Bench:
    """`trsp bench serve` over the stand-in: in this process, or in one that can be killed."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.out, self.patch = folder, folder / "out", patch
        self.environment = stand_in.install(folder)
        self.token = self.environment[stand_in.TOKEN]

    def start(self, *words: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-P", "-c", RUN_CLI, "bench", "serve", "--out", "out", *words],
            cwd=self.folder, env={**self.environment, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *words: str, code: int = 0, **environment: str) -> tuple[str, str]:
        """(stdout, stderr) of a run that ends with `code` and leaves nothing running."""
        with self.patch.context() as patch:
            patch.chdir(self.folder)
            # The metadata of a vLLM, which is looked for along this process's path.
            patch.syspath_prepend(self.token)
            for name, value in {**self.environment, **environment}.items():
                patch.setenv(name, value)
            done = CliRunner().invoke(app, ["bench", "serve", "--out", "out", *words])
        assert done.exit_code == code, (done.output, done.exception)
        assert stand_in.carriers(self.token) == []
        return done.stdout, done.stderr

    def starts(self) -> list[str]:
        path = Path(self.environment["STAND_IN_STARTS"])
        return path.read_text().splitlines() if path.exists() else []

    def record(self) -> ServeRecord:
        return read_serve_record(self.out / "record.json")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(load_client, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(vllm_server, "_POLL_SECONDS", 0.05)
    made = Bench(tmp_path, monkeypatch)
    yield made
    stand_in.wait_until_gone(made.token)


def test_a_dry_run_tells_the_plan_and_writes_nothing(bench: Bench) -> None:
    before = sorted(path for path in bench.folder.rglob("*") if "packages" not in path.parts)
    stdout, _ = bench.run(*SMALL, "--dry-run", "--", "--max-num-seqs", "4")
    assert "block     dense, dense again, pico-minus-2, pico-minus-2, dense again, dense" in stdout
    assert "cells     6 measurements in 1 blocks" in stdout
    assert "--max-num-seqs 4" in stdout
    after = sorted(path for path in bench.folder.rglob("*") if "packages" not in path.parts)
    assert after == before
    assert bench.starts() == []


@pytest.mark.parametrize(("servers", "num_starts"), [("resident", 3), ("restart", 6)])
def test_a_whole_experiment_and_its_resumption(servers: str, num_starts: int, bench: Bench) -> None:
    words = [*SMALL, "--servers", servers, "--json"]
    stdout, _ = bench.run(*words, "--", "--max-num-seqs", "4")
    record = bench.record()
    assert json.loads(stdout) == json.loads(record.model_dump_json())
    assert len(record.cells) == 6
    assert record.invalid == []
    assert not record.partial
    assert len(record.starts) == len(bench.starts()) == num_starts
    assert all("--max-num-seqs 4" in line for line in bench.starts())
    _, stderr = bench.run(*words, "--", "--max-num-seqs", "4", code=2)
    assert "holds an experiment already" in stderr
    _, stderr = bench.run(*words, "--resume", code=2)
    assert "is another experiment (flags differ)" in stderr
    bench.run(*words, "--resume", "--", "--max-num-seqs", "4")
    assert len(bench.starts()) == num_starts


def test_a_resumed_run_keeps_to_what_auto_chose(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What memory is free changes from hour to hour; it must not make another experiment."""
    bench.run(*SMALL, code=1, STAND_IN_CLIENT="third")
    monkeypatch.setattr(serve_design, "available_memory", lambda: 1)
    bench.run(*SMALL, "--resume")
    assert not bench.record().partial


def test_a_resumed_run_does_not_change_how_engines_are_kept(bench: Bench) -> None:
    bench.run(*SMALL, "--servers", "resident", code=1, STAND_IN_CLIENT="third")
    _, stderr = bench.run(*SMALL, "--servers", "restart", "--resume", code=2)
    assert "its engines stayed up; leave out --servers" in stderr


def test_another_engine_is_another_experiment(bench: Bench) -> None:
    bench.run(*SMALL, code=1, STAND_IN_CLIENT="third")
    metadata = next(Path(bench.token).glob("*.dist-info/METADATA"))
    metadata.write_text(metadata.read_text().replace("0.32.0", "0.31.0"))
    _, stderr = bench.run(*SMALL, "--resume", code=2)
    assert "(engine differ)" in stderr


def test_a_refused_engine_leaves_no_folder_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> tuple[str, str]:
        raise ImportError("vLLM is not installed: pip install it")

    monkeypatch.setattr(vllm_versions, "installed_vllm", absent)
    _, stderr = bench.run(*SMALL, code=2)
    assert stderr == "error: vLLM is not installed: pip install it\n"
    assert not bench.out.exists()


@pytest.mark.parametrize(
    ("server", "told"),
    [
        ("dies,parent", "exit code 3: ValueError: no such thing"),
        ("oom", "CUDA out of memory"),
        ("unservable", "Model architectures ['Odd'] are not supported"),
        ("mortal", "the engine fell over"),
        ("unhealthy", "was not healthy after 2 s"),
    ],
)
def test_a_server_that_fails_is_one_line_and_exit_1(server: str, told: str, bench: Bench) -> None:
    _, stderr = bench.run(*SMALL, "--health-timeout", "2", code=1, STAND_IN=server)
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert told in last
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("client", "told"),
    [("fails", "not one of 4 requests was completed"), ("exits", "client ended")],
)
def test_a_client_that_fails_is_one_line_and_exit_1(client: str, told: str, bench: Bench) -> None:
    _, stderr = bench.run(*SMALL, code=1, STAND_IN_CLIENT=client)
    assert told in stderr.splitlines()[-1]


def test_a_failure_in_the_third_cell_keeps_two_and_resumes(bench: Bench) -> None:
    words = [*SMALL, "--servers", "resident"]
    _, stderr = bench.run(*words, code=1, STAND_IN_CLIENT="third")
    assert "2 measurements, marked partial" in stderr
    assert bench.record().partial
    assert "4 of 6 planned measurements" in bench.record().not_measured
    bench.run(*words, "--resume")
    assert len(bench.record().cells) == 6
    assert not bench.record().partial


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"STAND_IN": "uneven"}, "KV blocks, dense"),
        ({"STAND_IN": "opinionated"}, "model_config.max_num_seqs"),
        ({"STAND_IN_CLIENT": "moody"}, "different sets of prompts were sent"),
        ({"STAND_IN_CLIENT": "drops"}, "3 of 4 requests completed, 1 failed"),
        ({"STAND_IN": "bare"}, "does not count what came from its prefix cache"),
    ],
)
def test_a_planted_defect_makes_the_run_invalid(
    environment: dict[str, str], told: str, bench: Bench
) -> None:
    stdout, _ = bench.run(*SMALL, "--json", code=1, **environment)
    assert told in stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing_running(number: signal.Signals, bench: Bench) -> None:
    process = bench.start(*SMALL, "--servers", "resident", STAND_IN_CLIENT="stuck")
    assert process.stderr is not None
    deadline = time.monotonic() + 120
    while not (bench.out / "starts.json").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    stand_in.wait_until_gone(bench.token)
