"""The comparison with mergekit sees each fault that a stand-in for mergekit plants."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from trsp.bench.interop_mergekit import CASES, KEPT, main, same_weights
from trsp.bench.pico_families import NUM_LAYERS, PICO_CONFIGS

STAND_IN = Path(__file__).with_name("stand_in_mergekit.py")


def compare(tmp_path: Path, mode: str) -> tuple[int, dict[str, Any]]:
    """Exit status and record of a comparison of one case with the stand-in."""
    python, out = tmp_path / "python", tmp_path / "record.json"
    words = shlex.join([sys.executable, str(STAND_IN), mode])
    python.write_text(f'#!/bin/sh\nexec {words} "$@"\n', "utf-8")
    python.chmod(0o755)
    status = main(["--python", str(python), "--case", "llama", "--out", str(out)])
    return status, json.loads(out.read_text("utf-8")) if out.exists() else {}


def test_what_is_the_same(tmp_path: Path) -> None:
    status, record = compare(tmp_path, "faithful")
    assert (status, record["failed"], record["unusable"]) == (0, [], [])
    case = record["cases"]["llama"]
    assert (case["max_logit_difference"], case["config"]) == (0.0, {})
    # Nine of a layer, the embedding, the final norm, the head.
    assert case["num_tensors"] == 9 * len(KEPT) + 3


def test_one_bit_of_a_tensor(tmp_path: Path) -> None:
    status, record = compare(tmp_path, "changed")
    assert (status, record["failed"], record["unusable"]) == (1, ["llama"], ["llama"])
    assert record["cases"]["llama"]["different"] == ["model.norm.weight"]


def test_a_stop_behind_the_tensors_is_told_and_they_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, record = compare(tmp_path, "stops")
    assert (status, record["failed"], record["unusable"]) == (0, [], ["llama"])
    error = record["cases"]["llama"]["mergekit_error"]
    assert error == "mergekit failed with exit status 1: ValueError: `layer_types` (8)"
    assert f"llama: 48 tensors same; {error}\n" in capsys.readouterr().out


def test_a_layer_count_that_stays_is_another_model(tmp_path: Path) -> None:
    """transformers fills the layers that are missing with random weights."""
    status, record = compare(tmp_path, "count")
    assert (status, record["failed"], record["unusable"]) == (0, [], ["llama"])
    case = record["cases"]["llama"]
    assert case["config"] == {"num_hidden_layers": {"trsp": len(KEPT), "mergekit": NUM_LAYERS}}
    assert case["max_logit_difference"] > 0.01


def test_no_tensors_are_not_the_same_ones(tmp_path: Path) -> None:
    status, record = compare(tmp_path, "nothing")
    assert (status, record["failed"]) == (1, ["llama"])
    assert len(record["cases"]["llama"]["only_ours"]) == 48


def test_an_environment_without_mergekit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, "absent") == (2, {})
    assert "has no mergekit; make an environment" in capsys.readouterr().err
    assert main(["--python", str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"num_tensors": 0}, False),
        ({"only_ours": ["a"], "only_theirs": ["b"]}, True),
        ({"only_ours": ["a"], "only_theirs": ["b"], "max_logit_difference": None}, False),
        ({"only_ours": ["a"], "only_theirs": ["b"], "max_logit_difference": 1e-9}, False),
        ({"only_ours": ["a"]}, False),
        ({"only_ours": ["a"], "only_theirs": ["b"], "different": ["c"]}, False),
        ({"different": ["c"]}, False),
    ],
)
def test_other_names_need_equal_logits(change: dict[str, Any], same: bool) -> None:
    alike: dict[str, Any] = {"num_tensors": 3, "max_logit_difference": 0.0}
    alike |= {kind: [] for kind in ("only_ours", "only_theirs", "different")}
    assert same_weights(alike | change) is same


def test_the_cases_have_patterns_that_the_kept_layers_shift() -> None:
    assert CASES.keys() <= PICO_CONFIGS.keys()
    shifted = set()
    for name in CASES:
        types = getattr(PICO_CONFIGS[name](), "layer_types", None)
        if types and [types[layer] for layer in KEPT] != types[: len(KEPT)]:
            shifted.add(name)
    assert {"cohere2", "gemma3_text", "olmo3", "smollm3"} <= shifted
