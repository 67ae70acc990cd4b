"""The command line: one clear line and exit 2 for a mistake, results on stdout, help in no time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from trsp.bench.cli import app
from trsp.pruner.layer_map import read_layer_map

FAST = [
    "--set", "calibration.num_sequences=8", "--set", "calibration.sequence_length=32",
    "--set", "selection.first_round_steps=4", "--set", "selection.round_steps=2",
    "--set", "selection.batch_size=2", "--set", "selection.verification_sequences=4",
    "--set", "transfer.steps=4", "--set", "transfer.batch_size=2",
]  # fmt: skip


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: Any) -> str:
    """The one line that a mistake gives; asserts exit 2, no traceback and nothing on stdout."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    return lines[-1]


@pytest.fixture
def copy(pico_llama: Path, tmp_path: Path) -> Path:
    """A copy of the pico checkpoint to damage."""
    return Path(shutil.copytree(pico_llama, tmp_path / "copy"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_prune_verify_eval_compact_and_map(
    pico_llama: Path, tmp_path: Path, text_file: Path, held_out_file: Path
) -> None:
    out = tmp_path / "out"
    pruned = call(
        "prune", pico_llama, "--out", out, "--ratio", 0.34, "--data", text_file,
        "--eval-data", held_out_file, "--vllm", "off", "--json", *FAST,
    )  # fmt: skip
    assert pruned.exit_code == 0, pruned.output
    report = json.loads(pruned.stdout)
    assert report["num_hidden_layers"] == {"before": 6, "after": 4}
    verified = call(
        "verify", out, "--against", tmp_path / "out.run" / "transferred", "--vllm", "off", "--json"
    )
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.stdout)["passed"]
    evaluated = call("eval", out, "--data", held_out_file, "--json")
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads(evaluated.stdout)["perplexity"] == pytest.approx(
        report["evaluation"]["pruned"]["perplexity"], rel=1e-6
    )
    dry = call(
        "compact", pico_llama, out / "layer_map.json", "--out", tmp_path / "one",
        "--prefix", 1, "--dry-run",
    )  # fmt: skip
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "one").exists()
    real = call(
        "compact", pico_llama, out / "layer_map.json", "--out", tmp_path / "one", "--prefix", 1
    )
    assert real.exit_code == 0, real.output
    assert json.loads((tmp_path / "one" / "config.json").read_text())["num_hidden_layers"] == 5
    dropped = read_layer_map(out / "layer_map.json").dropped
    listed = call("map", out / "layer_map.json", "--format", "llama-cpp")
    assert listed.stdout.strip() == ",".join(map(str, dropped))
    assert "layer_range" in call("map", out / "layer_map.json", "--format", "mergekit").stdout


def test_a_damaged_output_fails_verification_with_exit_1(pico_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("prune", pico_llama, "--out", out, "--keep", "0-3", "--vllm", "off").exit_code == 0
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"].mul_(1.01)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    result = call("verify", out, "--against", pico_llama, "--vllm", "off")
    assert result.exit_code == 1, result.output
    assert "failed" in result.stdout


def test_dry_run_writes_nothing(pico_llama: Path, tmp_path: Path, text_file: Path) -> None:
    result = call(
        "prune", pico_llama, "--out", tmp_path / "out", "--data", text_file, "--dry-run", *FAST
    )
    assert result.exit_code == 0, result.output
    assert "of 6 layers go" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_what_is_asked(pico_llama: Path, tmp_path: Path, text_file: Path) -> None:
    prune = ["prune", pico_llama, "--out", tmp_path / "out"]
    learn = [*prune, "--data", text_file, *FAST]
    assert "nowhere" in refused("prune", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert "ratio" in refused(*learn, "--ratio", 0)
    assert "ratio" in refused(*learn, "--ratio", 1)
    assert "removing 6 of 6" in refused(*learn, "--layers", 6)
    assert "unprotected" in refused(*learn, "--layers", 4, "--set", "selection.protected=[0,1,2]")
    assert "9" in refused(*prune, "--keep", "0,9")
    assert "layer 1 twice" in refused(*prune, "--keep", "0,1,1")
    assert "--data" in refused(*prune)
    assert "section.name=value" in refused(*learn, "--set", "whatever")
    assert "transfer.lamda2" in refused(*learn, "--set", "transfer.lamda2=1")
    assert "preset" in refused(*learn, "--preset", "best")
    assert "--vllm" in refused(*prune, "--keep", "0-3", "--vllm", "maybe")
    assert "no unfinished run" in refused(*learn, "--resume")
    existing = tmp_path / "existing"
    existing.mkdir()
    assert "exists" in refused("prune", pico_llama, "--out", existing, "--keep", "0-3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["existing"]


def test_mistakes_in_the_text(pico_llama: Path, tmp_path: Path) -> None:
    prune = ["prune", pico_llama, "--out", tmp_path / "out", "--data"]
    assert "missing.txt" in refused(*prune, tmp_path / "missing.txt")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "token" in refused(*prune, short)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9 ".encode("latin-1") * 4000)
    line = refused(*prune, latin)
    assert "UTF-8" in line
    assert "latin.txt" in line


def test_mistakes_in_a_layer_map(pico_llama: Path, tmp_path: Path) -> None:
    assert call("prune", pico_llama, "--out", tmp_path / "a", "--keep", "0-3").exit_code == 0
    document = json.loads((tmp_path / "a" / "layer_map.json").read_text())
    broken = tmp_path / "broken.json"
    for change in (
        {"kept": [0, 1, 2, 4], "dropped": [4, 5]},
        {"kept": [0, 1, 2, 3, 3]},
        {"dropped": [4, 7]},
        {"schema_version": 99},
        {"base_model": {**document["base_model"], "fingerprint": "0" * 64}},
    ):
        broken.write_text(json.dumps({**document, **change}))
        refused("prune", pico_llama, "--out", tmp_path / "b", "--map", broken)
        refused("compact", pico_llama, broken, "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_checkpoints_that_are_not_what_they_seem(copy: Path, tmp_path: Path) -> None:
    prune = ["prune", copy, "--out", tmp_path / "out", "--keep", "0-3"]
    config = (copy / "config.json").read_text()
    edit_config(copy, num_hidden_layers=8)
    assert "8 layers" in refused(*prune)
    edit_config(copy, num_hidden_layers=5)
    assert "5 layers" in refused(*prune)
    edit_config(copy, num_hidden_layers=6, auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "--trust-remote-code" in refused(*prune)
    (copy / "config.json").unlink()
    assert "config.json" in refused(*prune)
    (copy / "config.json").write_text(config)
    weights = copy / "model.safetensors"
    weights.rename(copy / "model-00001-of-00001.safetensors")
    names = load_file(copy / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../model-00001-of-00001.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "../" in refused(*prune)
    (copy / "model.safetensors.index.json").unlink()
    (copy / "model-00001-of-00001.safetensors").rename(tmp_path / "aside")
    torch.save({}, copy / "pytorch_model.bin")
    assert "pickle" in refused(*prune)


def test_a_tokenizer_of_another_vocabulary_is_refused(copy: Path, text_file: Path) -> None:
    from trsp.bench.base_model import train_tokenizer

    train_tokenizer([text_file.read_text()], 320).save_pretrained(copy)
    line = refused("prune", copy, "--out", copy.parent / "out", "--data", text_file, *FAST)
    assert "319" in line
    assert "tokenizer" in line


def test_a_nan_loss_exits_1_with_step_and_batch(copy: Path, text_file: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.embed_tokens.weight"][5:].fill_(float("nan"))
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    result = call(
        "prune", copy, "--out", copy.parent / "out", "--data", text_file, "--vllm", "off", *FAST
    )
    assert result.exit_code == 1
    line = result.stderr.strip().splitlines()[-1]
    assert "nan at step 0, calibration sequences [" in line
    assert not (copy.parent / "out").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = call("--debug", "prune", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_resumable_run(
    pico_llama: Path, tmp_path: Path, text_file: Path, number: int
) -> None:
    out = tmp_path / "out"
    arguments = [
        "prune", str(pico_llama), "--out", str(out), "--data", str(text_file), "--vllm", "off",
        *FAST, "--set", "transfer.steps=4000",
    ]  # fmt: skip
    command = [sys.executable, "-c", "from trsp.bench.cli import main; main()", *arguments]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        deadline = time.monotonic() + 120
        while not (tmp_path / "out.run" / "layer_map.json").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1.0)  # let stage 2 begin
        process.send_signal(number)
        assert process.wait(60) == 128 + number, (tmp_path / "log").read_text()
    assert "can be resumed" in (tmp_path / "log").read_text()
    assert not out.exists()
    assert (tmp_path / "out.run" / "run.json").exists()


def test_help_names_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for command in ("prune", "plan", "compact", "verify", "eval", "demo", "map"):
        assert command in result.stdout
