"""What a quantized checkpoint's config says of its layers, renumbered for those that stay.

Compaction moves tensors and computes nothing, so weights in any number format can be made
shallower; only the lists that name modules must follow. Read: transformers 5.19,
utils/quantization_config.py, and vLLM 0.32, model_executor/layers/quantization, for fp8, awq, gptq,
compressed-tensors, modelopt, mxfp4 and bitsandbytes. Another method is refused by its name.

An entry is a module's name, part of one, or a pattern. A name with a layer's number gets the new
number or goes with its layer. A pattern stays, or gets new numbers, where it then takes of every
layer that stays what it took before: of each module that any layer has, as engines name them too.
Where neither does, compressed-tensors' patterns become the names they stand for, and others are
refused. So is a bare layer, as in model.layers.1, that some tools read as the layers 10 to 19 too.
"""

import re
from collections.abc import Iterable, Mapping
from reprlib import repr as brief
from typing import Any

from trsp.pruner.errors import UserError
from trsp.pruner.module_names import (
    ANY_READING,
    SHELL_ONLY,
    Renumbering,
    from_start,
    rewrite_entry,
    rewrite_or_expand,
    rewrite_pattern,
)

# By quant_method: the fields that name modules. A dict is keyed by patterns.
MODULE_LISTS: Mapping[str, tuple[str, ...]] = {
    "awq": ("modules_to_not_convert",),
    "bitsandbytes": ("llm_int8_skip_modules",),
    "compressed-tensors": ("ignore",),
    "fp8": ("modules_to_not_convert", "ignored_layers"),
    "gptq": ("dynamic", "modules_in_block_to_quantize"),
    "modelopt": ("ignore", "exclude_modules"),
    "mxfp4": ("modules_to_not_convert",),
}
# Files beside config.json that say the same once more.
SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def rewrite_quantization(section: Mapping[str, Any], renumbering: Renumbering) -> dict[str, Any]:
    """The quantization section of a config for the layers that stay; where all do, as it is.

    Raises:
        UserError: a method that nobody has checked, a field that is not what it must be, or a
            pattern that tells layers apart and cannot be written for the new numbers.
    """
    if len(renumbering.kept) == renumbering.num_layers:
        return dict(section)
    method = quantization_method(section)
    if method not in MODULE_LISTS:
        raise UserError(
            f"quant_method is {brief(method)}, and nobody has checked what it says of layers; "
            f"supported: {', '.join(MODULE_LISTS)}"
        )
    new = dict(section)
    for field in MODULE_LISTS[method]:
        value = section.get(field)
        if value:
            new[field] = _rewrite_field(field, value, method, renumbering)
    if method in ("compressed-tensors", "modelopt"):
        new |= _rewrite_groups(section, method, renumbering)
    # ModelOpt's own file has its fields one level down, and may name a scheme for each module.
    inner = section.get("quantization")
    if isinstance(inner, Mapping):
        new["quantization"] = rewrite_quantization({"quant_method": method, **inner}, renumbering)
        if "quant_method" not in inner:
            del new["quantization"]["quant_method"]
    schemes = section.get("quantized_layers")
    if isinstance(schemes, Mapping):
        new["quantized_layers"] = {
            name: scheme
            for old, scheme in schemes.items()
            if (name := rewrite_entry("quantized_layers", old, renumbering, SHELL_ONLY)) is not None
        }
    return new


def quantization_method(section: Mapping[str, Any]) -> str:
    """quant_method; ModelOpt's and AutoGPTQ's own files do not name theirs."""
    named = section.get("quant_method")
    if named is None and isinstance(section.get("quantization"), Mapping):
        return "modelopt"
    if named is None and {"bits", "group_size"} <= section.keys():
        return "awq" if "zero_point" in section else "gptq"
    return str(named)


def _rewrite_field(
    field: str, value: Any, method: str, renumbering: Renumbering
) -> list[Any] | dict[str, Any]:
    if field == "dynamic":
        if not isinstance(value, Mapping):
            raise UserError(f"{field} is {brief(value)}, expected an object")
        return _rewrite_dynamic(field, value, renumbering)
    if not isinstance(value, list | tuple):
        raise UserError(f"{field} is {brief(value)}, expected a list of modules")
    if field == "modules_in_block_to_quantize" and all(isinstance(x, list) for x in value):
        # One list for each step of quantizing a block; a step without modules is none.
        blocks = [_rewrite_list(field, block, method, renumbering) for block in value]
        new: list[Any] = [block for block in blocks if block]
    else:
        new = _rewrite_list(field, value, method, renumbering)
    if not new and field == "modules_in_block_to_quantize":
        raise UserError(f"{field} names dropped layers only, and an empty list would name all")
    return new


def _rewrite_dynamic(
    field: str, rules: Mapping[str, Any], renumbering: Renumbering
) -> dict[str, Any]:
    """GPTQModel: what differs for the modules that a pattern takes; the first that does counts."""
    new: dict[str, Any] = {}
    for key, rule in rules.items():
        sign = match[0] if (match := re.match(r"[+-]:", key)) else ""
        pattern = rewrite_pattern(field, key.removeprefix(sign), renumbering, (from_start,))
        if pattern is not None:
            new.setdefault(sign + pattern, rule)
    return new


def _rewrite_list(
    field: str, entries: Iterable[Any], method: str, renumbering: Renumbering
) -> list[str]:
    is_compressed = method == "compressed-tensors"
    readings = SHELL_ONLY if is_compressed or method == "modelopt" else ANY_READING
    new: list[str] = []
    for entry in entries:
        if not isinstance(entry, str):
            raise UserError(f"{field} names {brief(entry)}, expected a module")
        if is_compressed and entry.startswith("re:"):
            new += rewrite_or_expand(field, entry.removeprefix("re:"), renumbering)
        else:
            name = rewrite_entry(field, entry, renumbering, readings, is_whole=is_compressed)
            new += [] if name is None else [name]
    return new


def _rewrite_groups(
    section: Mapping[str, Any], method: str, renumbering: Renumbering
) -> dict[str, Any]:
    """The targets of each scheme, and what its sparsity leaves out."""
    new: dict[str, Any] = {}
    groups = section.get("config_groups")
    if isinstance(groups, Mapping):
        new["config_groups"] = {
            name: _with_lists(f"config_groups.{name}", group, ("targets",), method, renumbering)
            for name, group in groups.items()
        }
    if isinstance(section.get("sparsity_config"), Mapping):
        new["sparsity_config"] = _with_lists(
            "sparsity_config",
            section["sparsity_config"],
            ("targets", "ignore"),
            method,
            renumbering,
        )
    return new


def _with_lists(
    where: str, group: Any, fields: tuple[str, ...], method: str, renumbering: Renumbering
) -> dict[str, Any]:
    if not isinstance(group, Mapping):
        raise UserError(f"{where} is {brief(group)}, expected an object")
    new = dict(group)
    for field in fields:
        value = group.get(field)
        if isinstance(value, list | tuple):
            new[field] = _rewrite_list(f"{where}.{field}", value, method, renumbering)
        elif value is not None:
            raise UserError(f"{where}.{field} is {brief(value)}, expected a list")
    return new
