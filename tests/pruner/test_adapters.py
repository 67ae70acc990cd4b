"""LoRA adapters of the dense model give on the pruned one what they gave on the dense one, masked.

Adapters are made and loaded by PEFT itself; what PEFT cannot make is written by hand.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from trsp.bench.pico_families import NUM_LAYERS, PICO_CONFIGS, VOCAB_SIZE
from trsp.pruner.adapter_names import CONFIG_NAME
from trsp.pruner.adapters import WEIGHTS_NAME, renumber_adapter
from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.compaction import compact
from trsp.pruner.durable import verify_manifest
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.layer_map import BaseModel, LayerMap, read_layer_map

pytestmark = pytest.mark.usefixtures("one_thread")

KEPT = (0, 2, 3, 5, 7)
BASE = BaseModel("org/dense", NUM_LAYERS, "f" * 64)
MAP = LayerMap.from_keep(BASE, KEPT)
PREFIX = "base_model.model.model.layers."


class Pair:
    """A pico model with random weights, dense and pruned, on disk."""

    def __init__(self, family: str, folder: Path) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(PICO_CONFIGS[family]())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        self.dense, self.pruned = folder / "dense", folder / "pruned"
        model.save_pretrained(self.dense)
        checkpoint = open_checkpoint(self.dense)
        base = BaseModel("org/dense", NUM_LAYERS, checkpoint.fingerprint)
        compact(checkpoint, LayerMap.from_keep(base, KEPT), self.pruned)
        self.tokens = torch.arange(40).reshape(2, 20) * 7 % VOCAB_SIZE

    def adapt(self, folder: Path, **words: Any) -> Path:
        """An adapter of the dense model, random in all its tensors, as PEFT saves it."""
        torch.manual_seed(1)
        config = LoraConfig(**{"r": 4, "init_lora_weights": False, **words})
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(self.dense), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(folder)
        return folder

    def logits(self, model: Path, adapter: Path | None, dropped: tuple[int, ...] = ()) -> Tensor:
        base = AutoModelForCausalLM.from_pretrained(model)
        if adapter is not None:
            # PEFT puts its layers into the model it is given.
            PeftModel.from_pretrained(base, str(adapter))
        with GatedModel(base.eval()) as gated, torch.no_grad(), gated.masking(dropped):
            return gated.logits(self.tokens)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("llama", tmp_path_factory.mktemp("llama"))


def config_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    return document


def layers_in(folder: Path) -> set[int]:
    names = load_file(folder / WEIGHTS_NAME)
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names if ".layers." in name}


ADAPTERS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*\.layers\.[2-6]\..*(q_proj|up_proj)"},
    "expression of no layer": {"target_modules": r".*\.(v_proj|gate_proj)"},
    "numbered names": {
        "target_modules": ["model.layers.2.self_attn.q_proj", "5.mlp.up_proj", "4.mlp.up_proj"]
    },
    "head and embedding": {"target_modules": ["lm_head", "embed_tokens", "7.mlp.up_proj"]},
    "chosen layers": {"target_modules": ["q_proj"], "layers_to_transform": [2, 3, 4, 7]},
    "one layer": {
        "target_modules": ["q_proj"], "layers_to_transform": 5, "layers_pattern": "layers",
    },
    "excluded names": {
        "target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.3.self_attn.q_proj"],
    },
    "excluded expression": {
        "target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.[357]\.mlp\..*",
    },
    "ranks and alphas": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.2.self_attn.q_proj": 6, r"layers\.[3-5]\..*down_proj": 2},
        "alpha_pattern": {r".*\.5\.self_attn\.q_proj": 32, "down_proj": 4},
    },
    "ranks by name": {
        "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"mlp.down_proj": 3},
    },
    "ranks and expression": {
        "target_modules": r".*\.[0-5]\..*_proj", "rank_pattern": {r"[25]\..*\.o_proj": 7},
    },
    "dora": {"target_modules": ["o_proj"], "use_dora": True, "use_rslora": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "saved norms of layers": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["model.layers.4.input_layernorm", "model.layers.5.input_layernorm"],
    },
}  # fmt: skip


@pytest.mark.parametrize("words", ADAPTERS.values(), ids=ADAPTERS)
def test_logits_are_those_of_the_dense_model_with_its_adapter_and_layers_masked(
    llama: Pair, tmp_path: Path, words: dict[str, Any]
) -> None:
    adapter = llama.adapt(tmp_path / "adapter", **words)
    out = renumber_adapter(adapter, MAP, tmp_path / "out")
    expected = llama.logits(llama.dense, adapter, MAP.dropped)
    found = llama.logits(llama.pruned, out)
    assert torch.equal(found, expected)
    bare = llama.logits(llama.pruned, None)
    assert not torch.allclose(found, bare, rtol=1e-2), "the adapter must matter"


@pytest.mark.parametrize(
    ("family", "modules"), [("gpt2", ["c_attn"]), ("gpt_neox", ["dense"]), ("gemma2", ["q_proj"])]
)
def test_other_families(tmp_path: Path, family: str, modules: list[str]) -> None:
    pair = Pair(family, tmp_path)
    adapter = pair.adapt(tmp_path / "adapter", target_modules=modules)
    out = renumber_adapter(adapter, MAP, tmp_path / "out")
    found = pair.logits(pair.pruned, out)
    assert torch.equal(found, pair.logits(pair.dense, adapter, MAP.dropped))


def test_what_is_written(llama: Pair, tmp_path: Path) -> None:
    adapter = llama.adapt(
        tmp_path / "adapter", target_modules=["q_proj"], layers_to_transform=[2, 4, 5]
    )
    (adapter / "tokenizer.json").write_text("{}", "utf-8")
    (adapter / "tokenizer.py").write_text("raise SystemExit", "utf-8")
    (adapter / "optimizer.pt").write_bytes(b"x")
    out = renumber_adapter(adapter, MAP, tmp_path / "out", base_model="org/pruned")
    assert {path.name for path in out.iterdir()} == {
        CONFIG_NAME, WEIGHTS_NAME, "tokenizer.json", "layer_map.json", "manifest.json"
    }  # fmt: skip
    verify_manifest(out)
    assert read_layer_map(out / "layer_map.json") == MAP
    before, after = load_file(adapter / WEIGHTS_NAME), load_file(out / WEIGHTS_NAME)
    assert layers_in(out) == {1, 3}
    for name, tensor in after.items():
        old = name.replace(".layers.1.", ".layers.2.").replace(".layers.3.", ".layers.5.")
        assert torch.equal(tensor, before[old])
    was, now = config_of(adapter), config_of(out)
    changed = {field for field in was if was[field] != now[field]}
    assert changed == {"layers_to_transform", "base_model_name_or_path"}
    assert now["layers_to_transform"] == [1, 3]
    assert (now["base_model_name_or_path"], now["revision"]) == ("org/pruned", None)


def test_the_base_model_is_left_where_none_is_given(tmp_path: Path) -> None:
    adapter = write(tmp_path, revision="v2", base_model_name_or_path="org/dense")
    now = config_of(renumber_adapter(adapter, MAP, tmp_path / "out"))
    assert (now["base_model_name_or_path"], now["revision"]) == ("org/dense", "v2")


def lora(layers: Any, module: str = "self_attn.q_proj", prefix: str = PREFIX) -> dict[str, Tensor]:
    return {
        f"{prefix}{layer}.{module}.lora_{part}.weight": torch.full((2, 3), float(layer))
        for layer in layers
        for part in "AB"
    }


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    """An adapter folder written by hand."""
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(lora(range(NUM_LAYERS)) if tensors is None else tensors, adapter / WEIGHTS_NAME)
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **fields
    }  # fmt: skip
    (adapter / CONFIG_NAME).write_text(json.dumps(config), "utf-8")
    return adapter


def test_the_vision_tower_keeps_its_numbers(tmp_path: Path) -> None:
    """A bare layer number would be of both towers: the config gets the modules by name."""
    tower = "base_model.model.model.vision_tower.vision_model.encoder.layers."
    language = "base_model.model.model.language_model.layers."
    tensors = lora((2, 4), prefix=tower) | lora((2, 4), prefix=language)
    adapter = write(tmp_path, tensors, layers_to_transform=[2, 4])
    out = renumber_adapter(adapter, MAP, tmp_path / "out")
    expected = lora((2, 4), prefix=tower).keys() | lora((1,), prefix=language).keys()
    assert load_file(out / WEIGHTS_NAME).keys() == expected
    now = config_of(out)
    assert now["layers_to_transform"] is None
    assert sorted(now["target_modules"]) == sorted(
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for name in expected if name.endswith("lora_A.weight")
    )  # fmt: skip


def test_parameters_of_numbered_layers(tmp_path: Path) -> None:
    names = [f"model.layers.{n}.mlp.experts.gate_up_proj" for n in (4, 5)]
    adapter = write(tmp_path, target_parameters=[*names, "experts.down_proj"])
    now = config_of(renumber_adapter(adapter, MAP, tmp_path / "out"))
    assert now["target_parameters"] == [
        "model.layers.3.mlp.experts.gate_up_proj", "experts.down_proj"
    ]  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_renumbering_twice_is_renumbering_by_the_composed_map(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("twice")
    kept = sorted(data.draw(st.sets(st.integers(0, NUM_LAYERS - 1), min_size=2)))
    again = sorted(data.draw(st.sets(st.integers(0, len(kept) - 1), min_size=1)))
    both = [kept[layer] for layer in again]
    adapted = data.draw(st.sets(st.integers(0, NUM_LAYERS - 1))) | {both[0]}
    adapter = write(folder, lora(sorted(adapted)), layers_to_transform=sorted(adapted))
    first = renumber_adapter(adapter, LayerMap.from_keep(BASE, kept), folder / "first")
    pruned = BaseModel("org/pruned", len(kept), "e" * 64)
    second = renumber_adapter(first, LayerMap.from_keep(pruned, again), folder / "second")
    at_once = renumber_adapter(adapter, LayerMap.from_keep(BASE, both), folder / "at_once")
    assert config_of(second) == config_of(at_once)
    assert (second / WEIGHTS_NAME).read_bytes() == (at_once / WEIGHTS_NAME).read_bytes()
    found = load_file(at_once / WEIGHTS_NAME)
    expected = [(new, old) for new, old in enumerate(both) if old in adapted]
    assert found.keys() == lora(new for new, _ in expected).keys()
    for new, old in expected:
        assert (found[f"{PREFIX}{new}.self_attn.q_proj.lora_A.weight"] == old).all()
    shutil.rmtree(folder)


CONFIGS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "'PROMPT_TUNING'; only LORA"),
    "no type": ({"peft_type": None}, "peft_type is None"),
    "replication": ({"layer_replication": [[0, 4], [2, 8]]}, "layer_replication .* repeats"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config .* describes the base"),
    "text for a list": ({"target_modules": [3]}, r"target_modules is \[3\], expected a list"),
    "names of another kind": ({"exclude_modules": {"a": 1}}, "exclude_modules is .* expected"),
    "too deep a layer": ({"layers_to_transform": [2, 8]}, "names 8, .* layers 0 to 7"),
    "a negative layer": ({"layers_to_transform": -1}, "names -1"),
    "true for a layer": ({"layers_to_transform": [True]}, "names True"),
    "removed layers": ({"layers_to_transform": [1, 4]}, "names removed layers only"),
    "a list of ranks": ({"rank_pattern": [8]}, r"rank_pattern is \[8\], expected an object"),
    "a broken pattern": ({"alpha_pattern": {"(": 8}}, "alpha_pattern: .* regular expression"),
    "an unknown number": (
        {"modules_to_save": ["adapters.3.norm"]}, "'adapters.3.norm', whose number is not known",
    ),
    "no module": ({"modules_to_save": [".*norm"]}, r"'\.\*norm', which is no module's name"),
    "text for modules": ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected"),
    "parameters and an expression": (
        {"target_modules": ".*q_proj", "target_parameters": ["experts.up"]},
        "target_parameters beside target_modules",
    ),
    "a layer in an unknown field": (
        {"loftq_config": {"map": {"model.layers.3.mlp": 4}}},
        r"loftq_config names a layer \('model.layers.3.mlp'\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"), CONFIGS_REFUSED.values(), ids=CONFIGS_REFUSED
)  # fmt: skip
def test_configs_that_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    adapter = write(tmp_path, **fields)
    with pytest.raises(UserError, match=message) as caught:
        renumber_adapter(adapter, MAP, tmp_path / "out")
    assert str(caught.value).startswith(str(adapter))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


TENSORS_REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "a deeper model": (lora((2, 8)), "adapts layer 8, .* layers 0 to 7"),
    "removed layers": (lora((1, 4, 6)), "adapts removed layers only; nothing of it is left"),
    "no layer": ({"base_model.model.lm_head.lora_A.weight": torch.ones(1)}, "no decoder layer"),
    "not PEFT's names": (lora((2,), prefix="model.layers."), "does not begin with base_model"),
    "two towers": (
        lora((2,)) | lora((2,), prefix="base_model.model.other.layers."),
        r"cannot tell which of model.layers., other.layers. are",
    ),
    "an unknown number": (
        lora((2,)) | {"base_model.model.connector.3.lora_A.weight": torch.ones(1)},
        "'connector.3.lora_A.weight' has a number",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), TENSORS_REFUSED.values(), ids=TENSORS_REFUSED)
def test_tensors_that_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    adapter = write(tmp_path, tensors)
    with pytest.raises(UserError, match=message) as caught:
        renumber_adapter(adapter, MAP, tmp_path / "out")
    assert str(caught.value).startswith(str(adapter))


def unpack_pickle(adapter: Path) -> None:
    (adapter / WEIGHTS_NAME).rename(adapter / "adapter_model.bin")


def cut(adapter: Path) -> None:
    with (adapter / WEIGHTS_NAME).open("r+b") as file:
        file.truncate(os.fstat(file.fileno()).st_size - 1)


def link_out(name: str) -> Callable[[Path], None]:
    def link(adapter: Path) -> None:
        outside = adapter.parent / "outside"
        shutil.move(adapter / name, outside) if (adapter / name).exists() else outside.touch()
        (adapter / name).symlink_to(outside)

    return link


FOLDERS_REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda adapter: (adapter / CONFIG_NAME).unlink(), f"has no {CONFIG_NAME}; give"),
    "no weights": (lambda adapter: (adapter / WEIGHTS_NAME).unlink(), "save it as safetensors"),
    "a pickle": (unpack_pickle, "adapter_model.bin is a pickle and never opened"),
    "cut weights": (cut, "is truncated"),
    "not JSON": (lambda adapter: (adapter / CONFIG_NAME).write_text("{"), CONFIG_NAME),
    "a list": (lambda adapter: (adapter / CONFIG_NAME).write_text("[]"), CONFIG_NAME),
    "a config from outside": (link_out(CONFIG_NAME), "is a link out of the"),
    "weights from outside": (link_out(WEIGHTS_NAME), "is a link out of the"),
    "a tokenizer from outside": (link_out("tokenizer.json"), "is a link out of the"),
}


@pytest.mark.parametrize(("damage", "message"), FOLDERS_REFUSED.values(), ids=FOLDERS_REFUSED)
def test_folders_that_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    adapter = write(tmp_path)
    damage(adapter)
    with pytest.raises(UserError, match=message):
        renumber_adapter(adapter, MAP, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.tmp*"))


def test_what_is_there_is_replaced_only_on_demand(tmp_path: Path) -> None:
    adapter, out = write(tmp_path), tmp_path / "out"
    renumber_adapter(adapter, MAP, out)
    (out / "stale").touch()
    with pytest.raises(UserError, match="already exists"):
        renumber_adapter(adapter, MAP, out)
    assert (out / "stale").exists()
    renumber_adapter(adapter, LayerMap.from_keep(BASE, (7,)), out, overwrite=True)
    assert layers_in(out) == {0}
    assert not (out / "stale").exists()


def test_neither_the_adapter_nor_what_is_no_adapter_is_overwritten(tmp_path: Path) -> None:
    adapter = write(tmp_path)
    for out, message in ((adapter, "replaces model folders only"), (tmp_path, "holds")):
        with pytest.raises(UserError, match=message):
            renumber_adapter(adapter, MAP, out, overwrite=True)
    renumbered = renumber_adapter(adapter, MAP, tmp_path / "out")
    with pytest.raises(UserError, match="holds the adapter that is read"):
        renumber_adapter(renumbered, LayerMap.from_keep(BASE, (0,)), renumbered, overwrite=True)
    assert layers_in(renumbered) == set(range(len(KEPT)))


def test_weights_cut_while_they_are_read_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trsp.pruner import adapters

    adapter = write(tmp_path)
    read = adapters.read_header

    def and_cut(*words: Any) -> Any:
        found = read(*words)
        cut(adapter)
        return found

    monkeypatch.setattr(adapters, "read_header", and_cut)
    with pytest.raises(RunError, match="changed since it was opened"):
        renumber_adapter(adapter, MAP, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["adapter"]
