"""Layer maps that drop a branch of a layer: order, prefixes, JSON, and who refuses them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trsp.pruner.adapter_names import AdapterNames
from trsp.pruner.layer_lists import to_llama_cpp, to_mergekit_slices
from trsp.pruner.layer_map import (
    BaseModel,
    DroppedSublayer,
    LayerMap,
    LayerMapError,
    Removal,
    read_layer_map,
    write_layer_map,
)

NUM_LAYERS = 6
BASE = BaseModel("pico", NUM_LAYERS, "f" * 64)


MLP_1 = DroppedSublayer(1, "mlp", 0)


def mixed() -> LayerMap:
    """The attention of 4 goes, then layer 2, the MLP of 1, and at last what is left of 4."""
    return LayerMap.from_removals(BASE, [(4, "attention"), 2, (1, "mlp"), (4, "mlp")])


@st.composite
def removal_orders(draw: st.DrawFn) -> list[Removal]:
    """Any order of branches, some of them as whole layers; one layer stays whole."""
    branches = [(layer, part) for layer in range(1, NUM_LAYERS) for part in ("attention", "mlp")]
    chosen = draw(st.permutations(branches))[: draw(st.integers(0, len(branches)))]
    whole = draw(st.sets(st.integers(1, NUM_LAYERS - 1)))
    removals: list[Removal] = [branch for branch in chosen if branch[0] not in whole]
    for layer in sorted(whole):
        removals.insert(draw(st.integers(0, len(removals))), layer)
    return removals


def without(removals: list[Removal]) -> set[tuple[int, str]]:
    """The branches that are gone after these removals."""
    gone: set[tuple[int, str]] = set()
    for removal in removals:
        if isinstance(removal, tuple):
            gone.add(removal)
        else:
            gone |= {(removal, "attention"), (removal, "mlp")}
    return gone


def without_by(layer_map: LayerMap) -> set[tuple[int, str]]:
    whole = {(layer, part) for layer in layer_map.dropped for part in ("attention", "mlp")}
    return whole | set(layer_map.missing_branches.items())


def test_the_second_branch_takes_the_layer() -> None:
    layer_map = mixed()
    assert layer_map.dropped == (2, 4)
    assert layer_map.kept == (0, 1, 3, 5)
    assert layer_map.missing_branches == {1: "mlp"}
    assert layer_map.removals == ((4, "attention"), 2, (1, "mlp"), 4)
    assert layer_map.schema_version == 2


@given(removal_orders())
@settings(max_examples=40, deadline=None)
def test_every_prefix_is_what_was_gone_by_then(removals: list[Removal]) -> None:
    layer_map = LayerMap.from_removals(BASE, removals)
    assert LayerMap.from_json(layer_map.to_json()) == layer_map
    assert len(layer_map.removals) == len(removals)
    for count in range(len(removals) + 1):
        prefix = layer_map.prefix(count)
        assert without_by(prefix) == without(removals[:count])
        assert LayerMap.from_json(prefix.to_json()) == prefix


def test_a_map_of_whole_layers_is_written_as_ever() -> None:
    layer_map = LayerMap.from_removals(BASE, [3, 1])
    assert layer_map == LayerMap.from_removal_order(BASE, [3, 1])
    document = json.loads(layer_map.to_json())
    assert document["schema_version"] == 1
    assert "dropped_sublayers" not in document
    assert mixed().prefix(0).to_json() == LayerMap.from_removal_order(BASE, []).to_json()


def test_an_older_trsp_refuses_by_version() -> None:
    """It reads version 1 alone, and would refuse the unknown field too."""
    assert json.loads(mixed().to_json())["schema_version"] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 1}, "schema_version is 1, expected 2"),
        ({"dropped_sublayers": ()}, "schema_version is 2, expected 1"),
        (
            {
                "dropped_sublayers": (
                    DroppedSublayer(1, "mlp", 0),
                    DroppedSublayer(1, "attention", 0),
                )
            },
            "names layer 1 twice; a layer without attention and mlp belongs in removal_order",
        ),
        ({"dropped_sublayers": (DroppedSublayer(6, "mlp", 0),)}, "layers are 0 to 5"),
        ({"dropped_sublayers": (DroppedSublayer(1, "mlp", 3),)}, "is 3, expected 0 to 2"),
        (
            {"dropped_sublayers": (DroppedSublayer(1, "mlp", 1), DroppedSublayer(0, "mlp", 0))},
            "is 0, expected 1 to 2",
        ),
        ({"dropped_sublayers": (DroppedSublayer(2, "mlp", 1),)}, "layer 2, which went before it"),
        ({"dropped_sublayers": [{"source_layer": 1}]}, "expected a DroppedSublayer"),
    ],
)
def test_unsound_sublayers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerMapError, match=message):
        replace(mixed(), **fields)


@pytest.mark.parametrize(
    ("removals", "message"),
    [
        ([(1, "norm")], "sublayer is 'norm', expected attention or mlp"),
        ([(1, "mlp"), (1, "mlp")], "the mlp of layer 1 is named twice"),
        ([(1, "mlp"), (1, "norm")], "the norm of layer 1 is named twice"),
        ([(True, "mlp")], "removal is True, expected an integer"),
        ([(1, "mlp", 2)], "expected an integer"),
        ([1, (1, "mlp")], "layer 1, which went before it"),
        ([(1, "mlp"), (1, "attention"), 1], "names layer 1 twice"),
    ],
    ids=str,
)
def test_removals_that_cannot_be(removals: list[Any], message: str) -> None:
    with pytest.raises(LayerMapError, match=message):
        LayerMap.from_removals(BASE, removals)


@pytest.mark.parametrize(
    "use",
    [to_llama_cpp, to_mergekit_slices, lambda layer_map: AdapterNames([], layer_map)],
    ids=["llama.cpp", "mergekit", "adapters"],
)
def test_what_knows_whole_layers_only_refuses(use: Any) -> None:
    with pytest.raises(LayerMapError, match="drops the attention of layer 4 and not the layer"):
        use(mixed())


def test_a_file_is_read_where_sublayers_are_known(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    write_layer_map(mixed(), file)
    assert read_layer_map(file, sublayers=True) == mixed()
    with pytest.raises(LayerMapError, match=r"map\.json: the layer map drops the attention"):
        read_layer_map(file)
