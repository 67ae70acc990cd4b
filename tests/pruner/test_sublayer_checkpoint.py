"""The folder for vLLM's DeciLM: the tensors that stay, byte for byte, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from trsp.bench.pico_checkpoint import write_pico_checkpoint
from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.compaction import plan_compaction
from trsp.pruner.durable import verify_manifest
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import BaseModel, LayerMap, LayerMapError, Removal, read_layer_map
from trsp.pruner.sublayer_checkpoint import export_sublayers

REMOVALS: list[Removal] = [5, (2, "mlp"), (3, "attention"), (7, "attention")]
MakeDense = Callable[..., Path]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> MakeDense:
    """dense(name, **changes): a family's checkpoint, fields of its config.json changed."""
    made: dict[str, Path] = {}

    def make(name: str, **changes: object) -> Path:
        key = f"{name} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(name) / "dense"
            write_pico_checkpoint(name, folder, max_shard_size="60KB")
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **changes}))
            made[key] = folder
        return made[key]

    return make


def layer_map(folder: Path, removals: list[Removal]) -> LayerMap:
    base = BaseModel("pico", 8, open_checkpoint(folder).fingerprint)
    return LayerMap.from_removals(base, removals)


def tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_what_stays_is_renumbered_and_what_goes_is_gone(
    name: str, dense: MakeDense, tmp_path: Path
) -> None:
    source = dense(name)
    chosen = layer_map(source, REMOVALS)
    out = export_sublayers(open_checkpoint(source), chosen, tmp_path / "out")
    before, after = tensors(source), tensors(out)
    gone = {2: ("mlp", "post_attention_layernorm"), 3: ("self_attn", "input_layernorm")}
    gone[7] = gone[3]
    expected = {}
    for key, tensor in before.items():
        _, number, rest = (key + ".x").partition(".layers.")
        if not number:
            expected[key] = tensor
            continue
        old, part = int(rest.split(".")[0]), rest.split(".")[1]
        if old == 5 or part in gone.get(old, ()):
            continue
        new = old - (old > 5)
        expected[key.replace(f".layers.{old}.", f".layers.{new}.")] = tensor
    assert set(after) == set(expected)
    assert all(after[key].equal(tensor) for key, tensor in expected.items())
    assert len(before) - len(after) == 9 + 4 + 5 + 5
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)
    assert all(key in load_file(out / file) for key, file in index["weight_map"].items())
    verify_manifest(out)


def test_the_config_tells_which_branch_is_missing(dense: MakeDense, tmp_path: Path) -> None:
    source = dense("llama")
    chosen = layer_map(source, REMOVALS)
    out = export_sublayers(open_checkpoint(source), chosen, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    blocks = config["block_configs"]
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["num_hidden_layers"] == len(blocks) == 7
    assert [block["attention"]["no_op"] for block in blocks] == [n in (3, 6) for n in range(7)]
    assert [block["ffn"]["no_op"] for block in blocks] == [n == 2 for n in range(7)]
    assert {block["attention"]["n_heads_in_group"] for block in blocks} == {2}
    written = read_layer_map(out / "layer_map.json", sublayers=True)
    assert written.removals == chosen.removals
    assert {change.field for change in written.config_changes} == {
        *("num_hidden_layers", "architectures", "model_type", "block_configs"),
    }


@pytest.mark.parametrize(
    "name", ["mistral", "qwen2", "qwen3", "gemma2", "mixtral", "cohere2", "opt"]
)
def test_another_shape_than_llama_is_refused(name: str, dense: MakeDense, tmp_path: Path) -> None:
    source = dense(name)
    with pytest.raises(UserError, match=r"model type '.*' has no form in vLLM"):
        export_sublayers(open_checkpoint(source), layer_map(source, [(3, "mlp")]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("removals", "message"),
    [
        ([(0, "attention")], "layer 0 is the first that is kept and has lost its attention"),
        ([0, 1, (2, "attention")], "layer 2 is the first that is kept and has lost its attention"),
        ([3], "leaves every kept layer whole; trsp compact"),
        ([(3, "mlp"), (3, "attention")], "leaves every kept layer whole; trsp compact"),
    ],
    ids=str,
)
def test_maps_that_decilm_cannot_be(
    removals: list[Removal], message: str, dense: MakeDense, tmp_path: Path
) -> None:
    source = dense("llama")
    with pytest.raises(UserError, match=message):
        export_sublayers(open_checkpoint(source), layer_map(source, removals), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and DeciLM in vLLM has silu alone"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"the weights are quantized \(fp8\)"),
    ],
    ids=str,
)
def test_models_that_decilm_cannot_be(
    changes: dict[str, object], message: str, dense: MakeDense, tmp_path: Path
) -> None:
    source = dense("llama", **changes)
    with pytest.raises(UserError, match=message):
        export_sublayers(open_checkpoint(source), layer_map(source, [(3, "mlp")]), tmp_path / "out")


def test_a_map_for_another_model_is_refused(dense: MakeDense, tmp_path: Path) -> None:
    chosen = layer_map(dense("llama_tied"), REMOVALS)
    with pytest.raises(UserError, match="the layer map is for another model"):
        export_sublayers(open_checkpoint(dense("llama")), chosen, tmp_path / "out")


def test_a_plain_checkpoint_of_it_is_refused(dense: MakeDense) -> None:
    source = dense("llama")
    with pytest.raises(LayerMapError, match=r"drops the mlp of layer 2.*sublayer_checkpoint"):
        plan_compaction(open_checkpoint(source), layer_map(source, REMOVALS))
