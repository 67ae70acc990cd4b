"""What must hold of a rewritten config of every model type, for any layers kept.

Compared are the configs that transformers' own classes make of it.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from trsp.bench.pico_families import PICO_CONFIGS
from trsp.pruner import config_surgery
from trsp.pruner.config_surgery import layers_that_must_stay, num_hidden_layers, rewrite_config
from trsp.pruner.family_registry import Family, Registry, registry

# Thresholds that the classes fill in lie below, between and beyond these.
DEPTHS = (2, 8, 40)
REFUSED = {"gemma3n_text", "gpt2_scaled_by_depth"}
FAMILIES = sorted(set(PICO_CONFIGS) - REFUSED)
# Read for layer_types alone, which are compared.
ONLY_FOR_LISTS = {
    "full_attention_interval", "layer_switch", "max_window_layers", "no_rope_layer_interval",
    "order_of_interleaved_layers", "sliding_window_pattern", "_sliding_window_pattern",
}  # fmt: skip


def spelled(config: dict[str, Any]) -> dict[str, Any]:
    """Every field that the class has in the end, with those it fills in or derives."""
    made = AutoConfig.for_model(**json.loads(json.dumps(config)))
    document = json.loads(made.to_json_string(use_diff=False))
    assert isinstance(document, dict)
    return document


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    """What the class makes of a config, without the fields that only feed its lists."""
    document = spelled(config)
    for section in (document, document.get("text_config") or {}):
        for name in ONLY_FOR_LISTS:
            section.pop(name, None)
    return document


def minimal(model_type: str, num_layers: int) -> dict[str, Any]:
    """A config that leaves to the class all it can."""
    made = AutoConfig.for_model(model_type)
    count = made.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return {"model_type": model_type, count: num_layers}


@functools.cache
def pico(family: str) -> str:
    return str(PICO_CONFIGS[family]().to_json_string(use_diff=False))


def draw_kept(data: st.DataObject, config: dict[str, Any]) -> list[int]:
    must_stay = layers_that_must_stay(config)
    layers = st.sets(st.integers(0, num_hidden_layers(config) - 1), min_size=not must_stay)
    return sorted({*data.draw(layers), *must_stay})


def composed(outer: Sequence[int], inner: Sequence[int]) -> list[int]:
    return [outer[layer] for layer in inner]


@pytest.mark.parametrize("model_type", registry().supported())
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_is_left_to_the_class_is_carried_over_as_well(
    model_type: str, data: st.DataObject
) -> None:
    config = minimal(model_type, data.draw(st.sampled_from(DEPTHS)))
    kept = draw_kept(data, config)
    from_spelled, _ = rewrite_config(spelled(config), kept)
    assert meaning(rewrite_config(config, kept)[0]) == meaning(from_spelled)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_two_cuts_are_one(family: str, data: st.DataObject) -> None:
    config = json.loads(pico(family))
    kept = draw_kept(data, config)
    once, _ = rewrite_config(config, kept)
    inner = draw_kept(data, once)
    twice, _ = rewrite_config(once, inner)
    assert meaning(twice) == meaning(rewrite_config(config, composed(kept, inner))[0])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_each_layer_keeps_its_own_kind(family: str, data: st.DataObject) -> None:
    config = json.loads(pico(family))
    kept = draw_kept(data, config)
    before, after = spelled(config), spelled(rewrite_config(config, kept)[0])
    before, after = before.get("text_config") or before, after.get("text_config") or after
    lists = {name for name in config_surgery._PER_LAYER if isinstance(before.get(name), list)}
    for name in lists:
        assert after[name] == [before[name][layer] for layer in kept], name
    for name in ("moe_layers", "mlp_only_layers"):
        if before.get(name):
            wanted = [layer for layer, old in enumerate(kept) if old in before[name]]
            # Qwen's class has further dense layers by a step, which go into the list.
            assert set(wanted) <= set(after[name]), name
    for name in config_surgery._THRESHOLDS & before.keys():
        below = sum(layer < before[name] for layer in kept)
        assert min(after[name], len(kept)) == min(below, len(kept)), name


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma3_text", "qwen3_next", "smollm3"])
def test_an_entry_that_says_nothing_is_found(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the class of the family derived nothing."""
    config, kept = minimal(model_type, 8), [1, 3, 4, 5]
    honest = meaning(rewrite_config(config, kept)[0])
    known = registry()
    planted = Registry({**known.families, model_type: Family()}, known.multimodal)
    monkeypatch.setattr(config_surgery, "registry", lambda: planted)
    assert meaning(rewrite_config(config, kept)[0]) != honest
