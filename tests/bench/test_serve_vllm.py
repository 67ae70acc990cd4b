"""`trsp bench serve` and the offline program with a real vLLM; two cores and no GPU will do."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trsp.bench.model_shapes import write_shape
from trsp.bench.offline_program import call_line
from trsp.bench.serve_record import read_serve_record
from trsp.pruner.vllm_process import has_vllm

_spec = importlib.util.spec_from_file_location("stand_in", Path(__file__).with_name("stand_in.py"))
assert _spec is not None
assert _spec.loader is not None
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed"),
]
RUN_CLI = "import sys; from trsp.bench.cli import main; sys.argv[0] = 'trsp'; main()"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def run(
    words: list[str], folder: Path, token: str, *, seconds: float
) -> "subprocess.CompletedProcess[str]":
    process = subprocess.Popen(
        [sys.executable, "-P", *words],
        cwd=folder,
        env={**os.environ, **QUIET, stand_in.TOKEN: token},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    finally:
        for pid in stand_in.carriers(token):
            os.kill(pid, signal.SIGKILL)
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def test_three_servers_are_measured_and_a_resumed_run_starts_none(tmp_path: Path) -> None:
    out, token = tmp_path / "out", str(tmp_path)
    words = [
        *("-c", RUN_CLI, "bench", "serve", "--shape", "pico", "--remove", "2"),
        *("--num-blocks", "1", "--concurrency", "2", "--no-open", "--memory", "equal-kv"),
        *("--num-requests", "4", "--input-len", "16", "--output-len", "4"),
        *("--servers", "resident", "--out", str(out)),
    ]
    done = run(words, tmp_path, token, seconds=900)
    assert done.returncode == 0, done.stderr
    stand_in.wait_until_gone(token)
    record = read_serve_record(out / "record.json")
    assert [arm.name for arm in record.arms] == ["dense", "dense again", "pico-minus-2"]
    assert [arm.num_hidden_layers for arm in record.arms] == [8, 8, 6]
    assert len(record.starts) == 3
    assert len({start.num_kv_blocks for start in record.starts}) == 1
    assert record.starts[0].num_kv_blocks
    assert all(start.load_seconds > 0 for start in record.starts)
    assert [cell.arm for cell in record.cells] == [
        *("dense", "dense again", "pico-minus-2"),
        *("pico-minus-2", "dense again", "dense"),
    ]
    for cell in record.cells:
        assert (cell.completed, cell.failed) == (4, 0)
        assert (cell.total_input_tokens, cell.total_output_tokens) == (64, 16)
        # Counted, and none: the counters have the names that we ask for.
        assert cell.prefix_cache_hits == 0
        assert cell.num_preemptions == 0
        assert cell.metrics["output_throughput"] > 0
        # Of so short a window a crowded machine may say that the client was busy, and nothing else.
        assert [line for line in cell.invalid if "of a core" not in line] == []
    assert len({cell.prompts_sha256 for cell in record.cells}) == 1
    assert record.invalid == []
    # /server_info leaves the model's own config out. As many blocks, as counted above, in 6/8 of
    # the bytes: the engine has 6 layers.
    (told,) = record.explained
    rooms = re.fullmatch(
        r"pico-minus-2, equal-kv: cache_config.kv_cache_memory_bytes is (\d+), dense (\d+)", told
    )
    assert rooms is not None, told
    assert int(rooms[1]) * 8 == int(rooms[2]) * 6
    assert not record.partial
    assert record.label is not None
    assert "random weights" in record.label

    before = (out / "starts.json").stat().st_mtime_ns
    started = time.monotonic()
    again = run([*words, "--resume", "--json"], tmp_path, token, seconds=120)
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - started < 60
    assert "starting" not in again.stderr
    assert (out / "starts.json").stat().st_mtime_ns == before
    assert len(json.loads(again.stdout)["cells"]) == 6


def test_the_offline_program_measures_latency_and_tells_of_its_engine(tmp_path: Path) -> None:
    model, out = write_shape("pico", tmp_path / "pico", num_layers=2), tmp_path / "result.json"
    words = [
        *("-m", "trsp.bench.offline_program", "latency", str(out), "--model", str(model)),
        *("--load-format", "dummy", "--input-len", "16", "--output-len", "4", "--batch-size", "2"),
        *("--num-iters", "3", "--num-iters-warmup", "1", "--max-model-len", "20"),
        *("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "67108864"),
        *("--enforce-eager", "--disable-detokenize", "--no-enable-prefix-caching"),
    ]
    done = run(words, tmp_path, str(tmp_path), seconds=600)
    assert done.returncode == 0, done.stderr
    stand_in.wait_until_gone(str(tmp_path))
    document = json.loads(out.read_text())
    assert len(document["latencies"]) == 3
    assert document["avg_latency"] > 0
    assert {"50", "90"} <= document["percentiles"].keys()
    told = json.loads(Path(f"{out}.engine.json").read_text())
    # One warm-up and three timed iterations, all with the same two prompts.
    assert [call["prompt_lens"] for call in told["calls"]] == [[16, 16]] * 4
    assert [call["output_lens"] for call in told["calls"]] == [[4, 4]] * 4
    assert len({call["prompts_sha256"] for call in told["calls"]}) == 1
    assert [call_line(n) in done.stderr for n in range(5)] == [True] * 4 + [False]
    config = told["vllm_config"]
    assert config["model_config"]["max_model_len"] == 20
    assert config["cache_config"]["enable_prefix_caching"] is False
    assert isinstance(config["cache_config"]["num_gpu_blocks"], int)
