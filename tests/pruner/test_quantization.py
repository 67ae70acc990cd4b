"""Quantized checkpoints: every tensor of a kept layer moves, every list of modules follows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.quantizers.quantizers_utils import should_convert_module

from trsp.bench.pico_checkpoint import pico_text, write_pico_checkpoint
from trsp.pruner import api
from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import read_layer_map
from trsp.pruner.module_names import Renumbering
from trsp.pruner.quantization import MODULE_LISTS, rewrite_quantization

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
            "dynamic": {
                r"-:model\.layers\.\d+\.mlp\.gate": {},
                r"-:.*\.1\.mlp.*": {},
                r"+:.*\.(4|5|7)\.(?:self_attn|mlp).*": {"bits": 8},
            },
        },
        {
            "dynamic": {
                r"-:model\.layers\.\d+\.mlp\.gate": {},
                r"+:.*\.((?!)|3|4)\.(?:self_attn|mlp).*": {"bits": 8},
            },
        },
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
        "exclude_modules": ["lm_head", "model.layers.[67].mlp*"],
        "quantized_layers": {"model.layers.1.mlp": {"a": 1}, "model.layers.2.mlp": {"a": 2}},
    }
    written = {"producer": {"name": "modelopt"}, "quantization": inner}
    (dense / "hf_quant_config.json").write_text(json.dumps(written))
    assert open_checkpoint(dense).quantization == "hf_quant_config.json"
    with pytest.raises(UserError, match=r"hf_quant_config.json: exclude_modules: the pattern"):
        api.prune(dense, tmp_path / "out", keep=KEPT, vllm="off")
    # As NVIDIA's own checkpoints have it.
    inner["exclude_modules"] = ["lm_head", "model.layers.7.self_attn*", "model.layers.*.mlp*"]
    (dense / "hf_quant_config.json").write_text(json.dumps(written))
    api.prune(dense, tmp_path / "out", keep=KEPT, vllm="off")
    found = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text("utf-8"))
    assert found["producer"] == written["producer"]
    assert found["quantization"]["exclude_modules"] == [
        "lm_head", "model.layers.4.self_attn*", "model.layers.*.mlp*",
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
        ({"quant_method": "gptq", "dynamic": {r"+:.*\.[23]\.mlp": {}}}, "tells layers apart"),
        ({"quant_method": "gptq", "dynamic": {r"+:.*\.3\.odd": {}}}, "number, and takes no module"),
        ({"quant_method": "gptq", "dynamic": {r"-:.*\.[34]\.odd": {}}}, "and takes no module"),
        (
            {"quant_method": "gptq", "modules_in_block_to_quantize": ["layers.1.mlp"]},
            "would name all",
        ),
        ({"quant_method": "fp8", "ignored_layers": ["3.mlp"]}, "begins with a number"),
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


# Layers 1 and 10 to 12 begin with the same digit; layer 12 alone has eh_proj, as a draft does.
DEEP = Renumbering(
    "model.layers.",
    (0, 2, 3, 5, 7, 10, 11),
    12,
    frozenset(
        f"model.layers.{layer}.{name}"
        for layer in range(13)
        for name in ("mlp.up_proj", "mlp.experts.1.w1", "self_attn.q_proj")
    )
    | {"lm_head", "model.layers.12.eh_proj", "model.layers.3.linear_attn.in_proj"},
)


@pytest.mark.parametrize(
    ("method", "entry", "new"),
    [
        # A module that one layer alone has: the pattern is of that layer, not of all that have it.
        ("compressed-tensors", r"re:.*layers\.12\.eh_proj", r"re:.*layers\.7\.eh_proj"),
        ("compressed-tensors", r"re:.*\.3\.linear_attn.*", r"re:.*\.2\.linear_attn.*"),
        # Engines' names for what the checkpoint has in parts.
        ("compressed-tensors", r"re:.*\.3\.self_attn\.qkv_proj", r"re:.*\.2\.self_attn\.qkv_proj"),
        ("compressed-tensors", r"re:.*\.1\.mlp.*", None),
        ("compressed-tensors", r"re:.*experts\.1\.w1", r"re:.*experts\.1\.w1"),
        ("compressed-tensors", "model.layers.1", None),
        ("modelopt", "model.layers.11.self_attn*", "model.layers.6.self_attn*"),
        ("modelopt", "model.layers.12*", "model.layers.7*"),
        ("modelopt", "model.layers.10.*", "model.layers.5.*"),
        ("modelopt", "model.layers.1.*", None),
        ("gptq", "model.layers.3.mlp.up_proj", "model.layers.2.mlp.up_proj"),
        ("fp8", "model.layers.11", "model.layers.6"),
    ],
)
def test_an_entry_of_a_deep_model(method: str, entry: str, new: str | None) -> None:
    field = MODULE_LISTS[method][-1]
    section = {"quant_method": method, field: ["lm_head", entry]}
    found = rewrite_quantization(section, DEEP)[field]
    assert found == ["lm_head", *([] if new is None else [new])]


@pytest.mark.parametrize(
    ("method", "entry", "said"),
    [
        ("fp8", "model.layers.1", "beginning of other layers' names too"),
        ("modelopt", "model.layers.1*", "beginning of other layers' names too"),
        # As regular expressions: every layer, and 1 with 10 and on.
        ("fp8", "model.layers.1*", "tells layers apart"),
        ("fp8", "model.layers.1.*", "tells layers apart"),
    ],
)
def test_a_layer_that_may_be_the_beginning_of_others_is_refused(
    method: str, entry: str, said: str
) -> None:
    section = {"quant_method": method, MODULE_LISTS[method][0]: [entry]}
    with pytest.raises(UserError, match=said):
        rewrite_quantization(section, DEEP)


def test_the_beginning_of_others_after_pruning_is_refused_too() -> None:
    """Layer 2 is no beginning of another one; as layer 1 it is one of layer 10's."""
    modules = frozenset(f"model.layers.{layer}.mlp" for layer in range(20))
    renumbering = Renumbering("model.layers.", (0, *range(2, 20)), 20, modules)
    section = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.2"]}
    with pytest.raises(UserError, match="beginning of other layers' names too"):
        rewrite_quantization(section, renumbering)


ALWAYS_WRITTEN = {
    *("model.layers.{}.mlp", "layers.{}.self_attn.q_proj", "model.layers.{}.self*"),
    *("model.layers.{}.mlp.experts.1.w1", r".*layers\.{}\.mlp\..*", "up_proj"),
}


@given(
    number=st.integers(0, 12),
    form=st.sampled_from(
        [
            *("model.layers.{}", "{}.mlp"),
            *("model.layers.{}.*", "model.layers.{}*", r".*\.{}\.mlp.*", r".*\.({}|4)\..*proj"),
            *("model.layers.*.mlp", "eh_proj$", *sorted(ALWAYS_WRITTEN)),
        ]
    ),
    dropped=st.sets(st.integers(0, 11), min_size=1, max_size=10),
)
@settings(max_examples=300, deadline=None)
def test_transformers_converts_what_it_did(number: int, form: str, dropped: set[int]) -> None:
    """Its own reading of an entry, before and after, on every module that stays."""
    kept = [layer for layer in range(12) if layer not in dropped]
    renumbering = Renumbering("model.layers.", kept, 12, DEEP.modules)
    old = form.format(number)
    section = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": [old]}
    try:
        new = rewrite_quantization(section, renumbering)["llm_int8_skip_modules"]
    except UserError:
        event(f"refused: {form}")
        # These can always be written: a refusal would hide what is not.
        if form in ALWAYS_WRITTEN:
            raise
        return
    event("rewritten" if new else "gone")
    for module in DEEP.modules:
        renamed = renumbering.name(module)
        if renamed is not None:
            before, after = (
                should_convert_module(module, [old]),
                should_convert_module(renamed, new),
            )
            assert before == after, (old, new, module, renamed)


def test_nothing_is_refused_where_nothing_goes() -> None:
    whole = Renumbering("model.layers.", range(12), 12, DEEP.modules)
    section = {"quant_method": "hqq", "modules_to_not_convert": ["model.layers.1"]}
    assert rewrite_quantization(section, whole) == section
