"""The properties of compaction hold on every family, and each can fail."""

import os
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from trsp.bench import family_properties
from trsp.bench.family_properties import (
    PROPERTIES,
    Subject,
    app,
    check_keep_list,
    prove_family,
    refusal,
)
from trsp.bench.pico_families import PICO_CONFIGS
from trsp.pruner import compaction, config_surgery
from trsp.pruner.errors import UserError
from trsp.pruner.family_registry import Registry, registry
from trsp.pruner.layer_map import LayerMap

REFUSED = {"gemma3n_text": "cannot be pruned", "gpt2_scaled_by_depth": "scale_attn_by_inverse"}


# Keep lists of each checkpoint; the first is the smallest. The record in bench/records has more.
NUM_EXAMPLES = int(os.environ.get("TRSP_PROPERTY_EXAMPLES", "2"))


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("family", sorted(set(PICO_CONFIGS) - set(REFUSED)))
def test_every_property_holds(family: str, sharded: bool, tmp_path: Path) -> None:
    subject = Subject(family, tmp_path, sharded=sharded)
    assert (len(subject.checkpoint.shards) > 1) == sharded
    free = [layer for layer in range(subject.num_layers) if layer not in subject.must_stay]
    chosen = st.sets(st.sampled_from(free), min_size=not subject.must_stay, max_size=len(free) - 1)

    # Without a seed of its own every family would draw the same lists: they come from the code of
    # the function. The assertion names the layers, and to shrink eight of them takes minutes.
    @seed(zlib.crc32(f"{family} {sharded}".encode()))
    @settings(
        max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate],
    )  # fmt: skip
    @given(chosen=chosen, generator=st.randoms(use_true_random=False))
    def check(chosen: set[int], generator: random.Random) -> None:
        kept = sorted({*chosen, *subject.must_stay})
        nothing_more_can_go = len(kept) == max(1, len(subject.must_stay))
        num_cases = len(PROPERTIES) - nothing_more_can_go
        assert check_keep_list(subject, kept, generator) == num_cases

    check()


def test_the_command_takes_turns_with_both_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[bool, int]] = []

    def check(subject: Subject, kept: list[int], generator: random.Random) -> int:
        num_cases = check_keep_list(subject, kept, generator)
        turns.append((len(subject.checkpoint.shards) > 1, num_cases))
        return num_cases

    monkeypatch.setattr(family_properties, "check_keep_list", check)
    total = prove_family("llama", 3, seed=1)
    assert [sharded for sharded, _ in turns] == [False, False, True]
    assert total == sum(num_cases for _, num_cases in turns) >= 3 * (len(PROPERTIES) - 1)


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


def test_lists_that_are_left_to_the_class_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tensors belong to the other kind of layer: the cut does not even open."""
    subject = Subject("qwen3_next", tmp_path, sharded=False)
    keeping(monkeypatch, lambda config: config.pop("layer_types"))
    with pytest.raises(UserError, match="weights disagree: 20 missing keys"):
        check_keep_list(subject, [0, 2, 3, 5, 7], random.Random(0))


def test_a_hybrid_may_lose_its_last_full_attention_for_another(tmp_path: Path) -> None:
    """Drawn lists have it always: choices leave it in place."""
    subject = Subject("qwen3_next", tmp_path, sharded=True)
    assert subject.must_stay == {7}
    assert check_keep_list(subject, [1, 2, 3, 6], random.Random(0)) == len(PROPERTIES)


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


def test_a_first_layer_that_image_features_enter_behind_cannot_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if Qwen3-VL's entry did not say that it must stay; text alone would not tell."""
    known = registry()
    planted = {**known.multimodal}
    planted["qwen3_vl"] = replace(planted["qwen3_vl"], feeds_first_layers=None)
    monkeypatch.setattr(config_surgery, "registry", lambda: Registry(known.families, planted))
    subject = Subject("qwen3_vl", tmp_path, sharded=False)
    with pytest.raises(AssertionError, match="masked, kept"):
        check_keep_list(subject, [1, 2, 3, 5], random.Random(0))
    monkeypatch.setattr(family_properties, "image_inputs", lambda config: None)
    assert check_keep_list(subject, [1, 2, 3, 5], random.Random(0)) == len(PROPERTIES)


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
    with pytest.raises(AssertionError, match="cache, kept"):
        check_keep_list(subject, [0, 2, 3], random.Random(0))


def test_a_prefix_of_another_length_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, honest = Subject("llama", tmp_path, sharded=False), LayerMap.prefix
    monkeypatch.setattr(LayerMap, "prefix", lambda order, count: honest(order, count - 1))
    with pytest.raises(AssertionError, match="prefix, first"):
        check_keep_list(subject, [0, 2, 3], random.Random(0))


@pytest.mark.parametrize("seed", range(4))
def test_a_config_that_counts_the_cuts_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    subject, honest = Subject("llama", tmp_path, sharded=False), config_surgery.rewrite_config

    def rewrite(config: dict[str, Any], kept: Any) -> Any:
        new, changes = honest(config, kept)
        return {**new, "cuts": config.get("cuts", 0) + bool(changes)}, changes

    monkeypatch.setattr(compaction, "rewrite_config", rewrite)
    with pytest.raises(AssertionError, match="composed, config, kept"):
        check_keep_list(subject, [0, 2, 3], random.Random(seed))


def test_a_second_cut_that_moves_other_layers_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the second cut took the first cut's last layers, whatever its map says."""
    subject, honest = Subject("llama", tmp_path, sharded=False), compaction.plan_compaction

    def plan(checkpoint: Any, layer_map: Any) -> Any:
        if (checkpoint.path / compaction.LAYER_MAP_NAME).exists():
            num_layers = checkpoint.num_hidden_layers
            last = range(num_layers - len(layer_map.kept), num_layers)
            layer_map = LayerMap.from_keep(layer_map.base_model, last)
        return honest(checkpoint, layer_map)

    monkeypatch.setattr(compaction, "plan_compaction", plan)
    with pytest.raises(AssertionError, match="composed, kept"):
        check_keep_list(subject, [0, 2, 3, 4, 6], random.Random(1))


def test_a_layer_alone_has_no_cut_of_the_cut(tmp_path: Path) -> None:
    subject = Subject("llama", tmp_path, sharded=False)
    assert check_keep_list(subject, [5], random.Random(0)) == len(PROPERTIES) - 1


def test_a_failure_is_told_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_properties, "_logits", lambda model: torch.rand(2, 3))
    out = tmp_path / "record.json"
    words = ["--lists", "1", "--family", "llama", "--family", "gemma3n_text", "--out", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "llama: FAILED: masked, kept" in result.output
    assert '"refused": {' in out.read_text("utf-8")
    assert CliRunner().invoke(app, ["--family", "lama"]).exit_code == 2
