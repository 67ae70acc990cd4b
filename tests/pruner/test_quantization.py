"""Quantized checkpoints: every tensor of a kept layer moves, every list of modules follows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trsp.bench.pico_checkpoint import pico_text, write_pico_checkpoint
from trsp.pruner import api
from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import read_layer_map
from trsp.pruner.quantization import MODULE_LISTS, Renumbering, rewrite_quantization

KEPT = (0, 2, 3, 5, 7)
DENSE_MLP = ["lm_head", "model.layers.1.mlp", "model.layers.3.mlp.down_proj", "model.layers.7"]
DENSE_MLP_AFTER = ["lm_head", "model.layers.2.mlp.down_proj", "model.layers.4"]

Tensors = dict[str, Tensor]


def fp8(name: str, weight: Tensor) -> Tensors:
    scale = torch.rand(1, 1)
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scale}


def awq(name: str, weight: Tensor) -> Tensors:
    rows, columns = weight.shape
    packed = torch.randint(0, 2**31, (columns, rows // 8), dtype=torch.int32)
    scales = torch.rand(1, rows).half()
    return {f"{name}.qweight": packed, f"{name}.qzeros": packed[:1], f"{name}.scales": scales}


def gptq(name: str, weight: Tensor) -> Tensors:
    return {**awq(name, weight), f"{name}.g_idx": torch.zeros(weight.shape[1], dtype=torch.int32)}


def compressed(name: str, weight: Tensor) -> Tensors:
    return {
        f"{name}.weight_packed": torch.randint(0, 255, weight.shape, dtype=torch.int32),
        f"{name}.weight_scale": torch.rand(weight.shape[0], 1).bfloat16(),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


# How a weight is stored, the config section before, what of it changes.
FORMS: dict[str, tuple[Callable[[str, Tensor], Tensors], dict[str, Any], dict[str, Any]]] = {
    "fp8": (
        fp8,
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": DENSE_MLP,
        },
        {"modules_to_not_convert": DENSE_MLP_AFTER},
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "modules_to_not_convert": DENSE_MLP},
        {"modules_to_not_convert": DENSE_MLP_AFTER},
    ),
    "gptq": (
        gptq,
        {
            "quant_method": "gptq",
            "modules_in_block_to_quantize": [["self_attn.q_proj"]],
            "dynamic": {r"-:model\.layers\.\d+\.mlp\.gate": {}},
        },
        {},
    ),
    "compressed-tensors": (
        compressed,
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {"targets": ["Linear", "model.layers.5.mlp.up_proj"]},
                "group_1": {"targets": [r"re:model\.layers\.[0-2]\.mlp.*"], "weights": None},
            },
            "ignore": ["lm_head", r"re:.*\.o_proj", "model.layers.4.mlp.up_proj"],
        },
        {
            "config_groups": {
                "group_0": {"targets": ["Linear", "model.layers.3.mlp.up_proj"]},
                "group_1": {
                    "targets": [
                        f"model.layers.{layer}.mlp.{name}_proj"
                        for layer in (0, 1)
                        for name in ("down", "gate", "up")
                    ],
                    "weights": None,
                },
            },
            "ignore": ["lm_head", r"re:.*\.o_proj"],
        },
    ),
}


def quantized(folder: Path, form: str) -> Path:
    """A pico Llama whose linear layers are stored as that method stores them; random numbers."""
    write_pico_checkpoint("llama", folder, dtype=torch.bfloat16)
    store, section, _ = FORMS[form]
    stored: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        stored |= store(module, tensor) if "_proj" in name else {name: tensor}
    stored = {name: tensor.contiguous().clone() for name, tensor in stored.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", quantization_config=section)
    return folder


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_checkpoint_is_compacted(form: str, tmp_path: Path) -> None:
    dense, out = quantized(tmp_path / "dense", form), tmp_path / "out"
    report = api.prune(dense, out, keep=KEPT, vllm="off")
    checks = {check["name"]: check for check in report["proof"]["checks"]}
    assert report["proof"]["passed"]
    assert checks["weights"]["status"] == "passed"
    assert checks["load"]["status"] == checks["logits"]["status"] == "skipped"
    assert f"the weights are quantized ({form})" in checks["load"]["detail"]
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, out))
    for old, tensor in before.items():
        parts = old.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in KEPT:
                continue
            parts[2] = str(KEPT.index(int(parts[2])))
        moved = after.pop(".".join(parts))
        assert moved.dtype == tensor.dtype
        assert torch.equal(moved.view(torch.uint8), tensor.view(torch.uint8))
    assert not after
    _, section, changed = FORMS[form]
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["quantization_config"] == {**section, **changed}
    changes = {
        change.field: change for change in read_layer_map(out / "layer_map.json").config_changes
    }
    assert ("quantization_config" in changes) == bool(changed)


def test_neither_stage_runs_on_quantized_weights(tmp_path: Path) -> None:
    dense = quantized(tmp_path / "dense", "fp8")
    text = tmp_path / "text.txt"
    text.write_text(pico_text(300), "utf-8")
    seen: list[str] = []
    with pytest.raises(UserError, match=r"quantized \(fp8\), and neither stage can run"):
        api.prune(
            dense, tmp_path / "out", layers=2, data=[text],
            progress=lambda task, done, total: seen.append(task),
        )  # fmt: skip
    with pytest.raises(UserError, match="neither stage can run"):
        api.plan(dense, tmp_path / "map.json", layers=2, data=[text])
    with pytest.raises(UserError, match="neither stage can run"):
        api.describe(dense, out=tmp_path / "out", layers=2, data=[text])
    assert not seen
    with pytest.raises(UserError, match="they can be moved"):
        load_model(open_checkpoint(dense))


def test_files_beside_the_config_follow(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    write_pico_checkpoint("llama", dense, dtype=torch.bfloat16)
    inner = {
        "quant_algo": "MIXED_PRECISION",
        "exclude_modules": ["lm_head", "model.layers.7.self_attn*", "model.layers.*.mlp*"],
        "quantized_layers": {"model.layers.1.mlp": {"a": 1}, "model.layers.2.mlp": {"a": 2}},
    }
    written = {"producer": {"name": "modelopt"}, "quantization": inner}
    (dense / "hf_quant_config.json").write_text(json.dumps(written))
    assert open_checkpoint(dense).quantization == "hf_quant_config.json"
    with pytest.raises(UserError, match=r"hf_quant_config.json: exclude_modules: the pattern"):
        api.prune(dense, tmp_path / "out", keep=KEPT, vllm="off")
    inner["exclude_modules"] = ["lm_head", "model.layers.7.self_attn", "model.layers.*.mlp*"]
    (dense / "hf_quant_config.json").write_text(json.dumps(written))
    api.prune(dense, tmp_path / "out", keep=KEPT, vllm="off")
    found = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text("utf-8"))
    assert found["producer"] == written["producer"]
    assert found["quantization"]["exclude_modules"] == [
        "lm_head", "model.layers.4.self_attn", "model.layers.*.mlp*",
    ]  # fmt: skip
    assert found["quantization"]["quantized_layers"] == {"model.layers.1.mlp": {"a": 2}}


MODULES = frozenset(
    f"model.layers.{layer}.{name}" for layer in range(8) for name in ("mlp.up_proj", "self_attn.o")
)
RENUMBERING = Renumbering("model.layers.", KEPT, 8, MODULES | {"lm_head", "visual.blocks.3.mlp"})


@pytest.mark.parametrize(
    ("entry", "new"),
    [
        ("model.layers.2.mlp", "model.layers.1.mlp"),
        ("model.layers.1.mlp", None),
        ("model.layers.1", None),
        # Shortened, as vLLM and AWQ have it, and with a wrapper's name before it.
        ("layers.2.mlp", "layers.1.mlp"),
        ("language_model.model.layers.2.mlp", "language_model.model.layers.1.mlp"),
        # A layer for drafting stands behind the others.
        ("model.layers.8.eh_proj", "model.layers.5.eh_proj"),
        ("visual.blocks.3.mlp", "visual.blocks.3.mlp"),
        ("lm_head", "lm_head"),
        ("Linear", "Linear"),
        ("re:.*o$", "re:.*o$"),
        ("model.layers.*.mlp.up_proj", "model.layers.*.mlp.up_proj"),
    ],
)
def test_an_entry_for_the_layers_that_stay(entry: str, new: str | None) -> None:
    section = {"quant_method": "mxfp4", "modules_to_not_convert": [entry]}
    rewritten = rewrite_quantization(section, RENUMBERING)["modules_to_not_convert"]
    assert rewritten == ([] if new is None else [new])


@pytest.mark.parametrize("method", MODULE_LISTS)
def test_nothing_named_changes_nothing(method: str) -> None:
    section = {"quant_method": method, "bits": 4, MODULE_LISTS[method][0]: None}
    assert rewrite_quantization(section, RENUMBERING) == section


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quant_method": "hqq"}, "quant_method is 'hqq', and nobody has checked"),
        ({}, "quant_method is 'None'"),
        ({"quant_method": "fp8", "ignored_layers": "lm_head"}, "expected a list of modules"),
        ({"quant_method": "awq", "modules_to_not_convert": [3]}, "names 3, expected a module"),
        ({"quant_method": "awq", "modules_to_not_convert": ["layers.[01].mlp"]}, "tells layers"),
        ({"quant_method": "awq", "modules_to_not_convert": ["tower.layers.1.mlp"]}, "of no stack"),
        ({"quant_method": "gptq", "dynamic": {r"+:.*\.3\.mlp": {}}}, "tells layers apart"),
        ({"quant_method": "gptq", "dynamic": {"-:(": {}}}, "is no regular expression"),
        ({"quant_method": "gptq", "dynamic": ["a"]}, "dynamic is .* expected an object"),
        ({"quant_method": "compressed-tensors", "ignore": ["re:" + "a" * 501]}, "at most 500"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": "Linear"}}},
            "config_groups.g.targets is 'Linear', expected a list",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": 3}},
            "config_groups.g is 3, expected an object",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_renumbered_is_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        rewrite_quantization(section, RENUMBERING)


def test_a_pattern_becomes_the_names_it_stands_for() -> None:
    section = {"quant_method": "compressed-tensors", "ignore": [r"re:model\.layers\.[23]\.self.*"]}
    assert rewrite_quantization(section, RENUMBERING)["ignore"] == [
        "model.layers.1.self_attn.o", "model.layers.2.self_attn.o",
    ]  # fmt: skip
