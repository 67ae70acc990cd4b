"""The stream of the dense checkpoint's weights is, name by name, what compaction writes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trsp.pruner.checkpoint import Checkpoint, open_checkpoint
from trsp.pruner.compaction import compact
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import BaseModel, LayerMap
from trsp.serving.weight_stream import LayerRenumbering, needed_files

STACK = LayerRenumbering("model.layers.", kept=(0, 2, 10), num_source_layers=12)


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("model.layers.0.mlp.weight", "model.layers.0.mlp.weight"),
        ("model.layers.2.mlp.weight", "model.layers.1.mlp.weight"),
        ("model.layers.10.mlp.weight", "model.layers.2.mlp.weight"),
        ("model.layers.1.mlp.weight", None),
        ("model.layers.11.mlp.weight", None),
        # A number further right belongs to an expert.
        ("model.layers.2.mlp.experts.10.weight", "model.layers.1.mlp.experts.10.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        # Another stack: a vision tower, a draft head.
        ("vision.model.layers.1.mlp.weight", "vision.model.layers.1.mlp.weight"),
        ("mtp.layers.1.weight", "mtp.layers.1.weight"),
    ],
)
def test_a_name_is_kept_renumbered_or_dropped(name: str, renamed: str | None) -> None:
    assert STACK.rename(name) == renamed


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.12.mlp.weight",
        "model.layers.01.mlp.weight",
        "model.layers.-1.mlp.weight",
        "model.layers.\u0661.mlp.weight",
        "model.layers.\u00b2.mlp.weight",
        "model.layers.norm.weight",
        "model.layers.2",
        "model.layers.",
    ],
)
def test_a_name_in_the_stack_that_the_map_says_nothing_of_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="none of its layers 0 to 11"):
        STACK.rename(name)


def test_no_two_tensors_get_one_name() -> None:
    names = [f"model.layers.{layer}.w" for layer in range(12)]
    renamed = [new for new, _ in STACK.apply((name, None) for name in names)]
    assert renamed == [f"model.layers.{layer}.w" for layer in range(3)]


@pytest.fixture(scope="module")
def sharded(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The pico Llama, each layer in a shard of its own and the rest in another."""
    import json
    import shutil

    folder = tmp_path_factory.mktemp("sharded") / "base"
    shutil.copytree(pico_llama, folder)
    (folder / "model.safetensors").unlink()
    tensors = load_file(pico_llama / "model.safetensors")
    weight_map = {}
    for name in tensors:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        weight_map[name] = f"part-{part}.safetensors"
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    # No part of the checkpoint: the index does not name it.
    save_file({"model.layers.7.w": torch.zeros(1)}, folder / "consolidated.safetensors")
    return open_checkpoint(folder)


def stream(checkpoint: Checkpoint, layer_map: LayerMap) -> Iterator[tuple[str, torch.Tensor]]:
    renumbering = LayerRenumbering.of(checkpoint, layer_map)
    for file in needed_files(checkpoint, renumbering):
        with safe_open(file, framework="pt") as shard:
            yield from renumbering.apply((name, shard.get_tensor(name)) for name in shard.keys())  # noqa: SIM118


@pytest.mark.parametrize("dropped", [[], [0], [5], [4, 1], [1, 2, 3], [0, 1, 2, 3, 4]])
def test_the_stream_is_bit_for_bit_the_compacted_checkpoint(
    sharded: Checkpoint, dropped: list[int], tmp_path: Path
) -> None:
    layer_map = LayerMap.from_drop(BaseModel("base", 6, sharded.fingerprint), dropped)
    streamed = dict(stream(sharded, layer_map))
    compacted = {}
    for file in compact(sharded, layer_map, tmp_path / "pruned").glob("*.safetensors"):
        compacted |= load_file(file)
    assert streamed.keys() == compacted.keys()
    assert all(torch.equal(streamed[name], compacted[name]) for name in compacted)


def test_shards_that_hold_dropped_layers_alone_are_not_read(sharded: Checkpoint) -> None:
    layer_map = LayerMap.from_drop(BaseModel("base", 6, sharded.fingerprint), [1, 4])
    files = needed_files(sharded, LayerRenumbering.of(sharded, layer_map))
    names = [file.name for file in files]
    assert names == [f"part-{part}.safetensors" for part in (0, 2, 3, 5, "rest")]


def test_a_shard_with_one_kept_tensor_is_read(pico_llama: Path) -> None:
    checkpoint = open_checkpoint(pico_llama)
    layer_map = LayerMap.from_drop(BaseModel("base", 6, checkpoint.fingerprint), [1, 4])
    files = needed_files(checkpoint, LayerRenumbering.of(checkpoint, layer_map))
    assert files == [pico_llama / "model.safetensors"]


def test_a_shard_that_went_away_is_named(sharded: Checkpoint, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(sharded.path, folder)
    checkpoint = open_checkpoint(folder)
    (folder / "part-2.safetensors").unlink()
    layer_map = LayerMap.from_drop(BaseModel("base", 6, checkpoint.fingerprint), [1, 4])
    with pytest.raises(UserError, match=r"part-2\.safetensors: is missing"):
        needed_files(checkpoint, LayerRenumbering.of(checkpoint, layer_map))
