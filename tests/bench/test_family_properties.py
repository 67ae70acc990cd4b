"""The properties of compaction hold on every family, and each can fail."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from trsp.bench import family_properties
from trsp.bench.family_properties import Subject, app, check_keep_list, prove_family, refusal
from trsp.bench.pico_families import PICO_CONFIGS
from trsp.pruner import compaction, config_surgery

REFUSED = {"gemma3n_text": "cannot be pruned", "gpt2_scaled_by_depth": "scale_attn_by_inverse"}


@pytest.mark.parametrize("family", sorted(set(PICO_CONFIGS) - set(REFUSED)))
def test_every_property_holds(family: str) -> None:
    """On one keep list of each checkpoint; the record in bench/records has more."""
    assert prove_family(family, 2, seed=1) == 10


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name(family: str) -> None:
    reason = refusal(family)
    assert reason is not None
    assert REFUSED[family] in reason


def keeping(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewritten configs come out otherwise."""
    honest = config_surgery.rewrite_config

    def rewrite(config: dict[str, Any], kept: Any) -> Any:
        new, changes = honest(config, kept)
        change(new)
        return new, changes

    monkeypatch.setattr(compaction, "rewrite_config", rewrite)


def test_lists_that_are_built_anew_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject("gemma3_text", tmp_path, sharded=False)
    keeping(monkeypatch, lambda config: config["layer_types"].sort())
    with pytest.raises(AssertionError, match="masked, kept"):
        check_keep_list(subject, [0, 2, 3, 5], random.Random(0))


def test_layers_in_each_others_place_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject("llama", tmp_path, sharded=True)
    honest = compaction.plan_compaction

    def swapped(checkpoint: Any, layer_map: Any) -> Any:
        plan = honest(checkpoint, layer_map)
        for shard in plan.shards:
            names = {name: name.replace("layers.0.", "layers.1.") for name, _ in shard.tensors}
            other = {name: name.replace("layers.1.", "layers.0.") for name, _ in shard.tensors}
            tensors = tuple(
                (names[name] if "layers.0." in name else other[name], entry)
                for name, entry in shard.tensors
            )
            header = compaction.header_bytes(
                ((name, entry.dtype, entry.shape, entry.num_bytes) for name, entry in tensors), {}
            )
            object.__setattr__(shard, "tensors", tensors)
            object.__setattr__(shard, "header", header)
        return plan

    monkeypatch.setattr(compaction, "plan_compaction", swapped)
    with pytest.raises(AssertionError, match="masked, kept"):
        check_keep_list(subject, [1, 4, 6], random.Random(0))


def test_a_config_that_drifts_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("llama", tmp_path, sharded=False)
    keeping(monkeypatch, lambda config: config.update(seen=config.get("seen", 0) + 1))
    with pytest.raises(AssertionError, match="again, kept"):
        check_keep_list(subject, [0, 2, 3], random.Random(0))


def test_a_stale_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("llama", tmp_path, sharded=False)
    honest = family_properties.load_model

    def load(*words: Any, **named: Any) -> Any:
        model = honest(*words, **named)
        for layer in model.model.layers:
            layer.self_attn.layer_idx = 0
        return model

    monkeypatch.setattr(family_properties, "load_model", load)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check_keep_list(subject, [0, 2, 3], random.Random(0))


def test_a_failure_is_told_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_properties, "_logits", lambda model: torch.rand(2, 3))
    out = tmp_path / "record.json"
    words = ["--lists", "1", "--family", "llama", "--family", "gemma3n_text", "--out", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "llama: FAILED: masked, kept" in result.output
    assert '"refused": {' in out.read_text("utf-8")
    assert CliRunner().invoke(app, ["--family", "lama"]).exit_code == 2
