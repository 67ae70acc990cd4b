"""What a quantized checkpoint's config says of its layers, renumbered for those that stay.

Compaction moves tensors and computes nothing, so weights in any number format can be made
shallower; only the lists that name modules must follow. Read: transformers 5.19,
utils/quantization_config.py, and vLLM 0.32, model_executor/layers/quantization, for fp8, awq, gptq,
compressed-tensors, modelopt, mxfp4 and bitsandbytes. Another method is refused by its name.

An entry is a module's name, part of one, or a pattern. A name with a layer's number gets the new
number or goes with its layer. A pattern stays where it treats all layers alike; where it does not,
compressed-tensors' patterns become the names they stand for, and others are refused.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any

from trsp.pruner.errors import UserError

# By quant_method: the fields that name modules. A dict is keyed by patterns.
MODULE_LISTS: Mapping[str, tuple[str, ...]] = {
    "awq": ("modules_to_not_convert",),
    "bitsandbytes": ("llm_int8_skip_modules",),
    "compressed-tensors": ("ignore",),
    "fp8": ("modules_to_not_convert", "ignored_layers"),
    "gptq": ("dynamic",),
    "modelopt": ("ignore", "exclude_modules"),
    "mxfp4": ("modules_to_not_convert",),
}
# Files beside config.json that say the same once more.
SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_NUMBERED = re.compile(r"((?:.*\.)?(?:layers|h|blocks|block)\.)(0|[1-9][0-9]{0,8})(?=\.|$)(.*)")
_MAX_PATTERN = 500
_PATTERN = re.compile(r"[*?\[\]()|\\^$+{}]")


@dataclass(frozen=True)
class Renumbering:
    """The layers that stay and the names of all modules.

    Attributes:
        prefix: what stands before a decoder layer's number, as in "model.layers.".
        kept: source layers, ascending.
        num_layers: of the unpruned model.
        modules: every module that has a tensor, by its full name.
    """

    prefix: str
    kept: Sequence[int]
    num_layers: int
    modules: frozenset[str]

    def name(self, module: str) -> str | None:
        """A module's new name; None where its layer goes.

        Raises:
            UserError: it has a number, and nothing tells of which layers.
        """
        match = _NUMBERED.fullmatch(module)
        if match is None:
            return module
        stack, number, rest = match[1], int(match[2]), match[3]
        if not self._is_ours(stack):
            if any(known.startswith(stack) for known in self.modules):
                return module  # a tower's
            raise UserError(f"{brief(module)} names a layer of no stack that is in the weights")
        if number >= self.num_layers:
            return f"{stack}{number - self.num_layers + len(self.kept)}{rest}"
        return f"{stack}{list(self.kept).index(number)}{rest}" if number in self.kept else None

    def treats_alike(self, matches: Callable[[str], bool]) -> bool:
        """Whether a pattern takes a module of one layer just where it takes it of all that have it.

        A pattern that does so for all layers does it for those that stay.
        """
        verdicts: dict[str, bool] = {}
        for module in self.modules:
            match = _NUMBERED.fullmatch(module)
            if match is not None and match[1] == self.prefix:
                verdict = matches(module)
                if verdicts.setdefault(match[3], verdict) != verdict:
                    return False
        return True

    def _is_ours(self, stack: str) -> bool:
        """Whether `stack` is the decoder's prefix, whole, shortened or with more before it."""
        dotted = f".{self.prefix}"
        return dotted.endswith(f".{stack}") or f".{stack}".endswith(dotted)


@dataclass(frozen=True)
class _Matcher:
    """Which modules a regular expression takes; tools differ in where it may begin."""

    pattern: re.Pattern[str]

    def from_start(self, module: str) -> bool:
        return self.pattern.match(module) is not None

    def anywhere(self, module: str) -> bool:
        return self.pattern.search(module) is not None


def rewrite_quantization(section: Mapping[str, Any], renumbering: Renumbering) -> dict[str, Any]:
    """The quantization section of a config for the layers that stay.

    Raises:
        UserError: a method that nobody has checked, a field that is not what it must be, or a
            pattern that tells layers apart and cannot be written for the new numbers.
    """
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
    if method == "compressed-tensors":
        new |= _rewrite_groups(section, renumbering)
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
            if (name := _rewrite_entry("quantized_layers", old, renumbering)) is not None
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
) -> list[str] | dict[str, Any]:
    if field == "dynamic":
        if not isinstance(value, Mapping):
            raise UserError(f"{field} is {brief(value)}, expected an object")
        for key in value:
            pattern = re.sub(r"^[+-]:", "", str(key))
            if not renumbering.treats_alike(_matcher(field, pattern).from_start):
                raise UserError(f"{field}: the pattern {brief(key)} tells layers apart")
        return dict(value)
    if not isinstance(value, list | tuple):
        raise UserError(f"{field} is {brief(value)}, expected a list of modules")
    return _rewrite_list(field, value, renumbering, expand=method == "compressed-tensors")


def _rewrite_list(
    field: str, entries: Iterable[Any], renumbering: Renumbering, *, expand: bool
) -> list[str]:
    new: list[str] = []
    for entry in entries:
        if not isinstance(entry, str):
            raise UserError(f"{field} names {brief(entry)}, expected a module")
        if expand and entry.startswith("re:"):
            matches = _matcher(field, entry.removeprefix("re:")).from_start
            if renumbering.treats_alike(matches):
                new.append(entry)
            else:
                taken = sorted(filter(matches, renumbering.modules))
                new += [name for old in taken if (name := renumbering.name(old)) is not None]
            continue
        name = _rewrite_entry(field, entry, renumbering)
        new += [] if name is None else [name]
    return new


def _rewrite_entry(field: str, entry: str, renumbering: Renumbering) -> str | None:
    """A name, or a pattern of shell's or regular expressions' kind that treats layers alike."""
    if not _PATTERN.search(entry):
        return renumbering.name(entry)
    # A star may be a shell's or a regular expression's: it must treat layers alike as either.
    as_shell = re.escape(entry).replace(r"\*", ".*").replace(r"\?", ".")
    for pattern in (as_shell, entry.removeprefix("re:")):
        found = _matcher(field, pattern)
        if not all(map(renumbering.treats_alike, (found.from_start, found.anywhere))):
            raise UserError(f"{field}: the pattern {brief(entry)} tells layers apart")
    return entry


def _rewrite_groups(section: Mapping[str, Any], renumbering: Renumbering) -> dict[str, Any]:
    """compressed-tensors: the targets of each scheme, and what its sparsity leaves out."""
    new: dict[str, Any] = {}
    groups = section.get("config_groups")
    if isinstance(groups, Mapping):
        new["config_groups"] = {
            name: _with_lists(f"config_groups.{name}", group, ("targets",), renumbering)
            for name, group in groups.items()
        }
    if isinstance(section.get("sparsity_config"), Mapping):
        new["sparsity_config"] = _with_lists(
            "sparsity_config", section["sparsity_config"], ("targets", "ignore"), renumbering
        )
    return new


def _with_lists(
    where: str, group: Any, fields: tuple[str, ...], renumbering: Renumbering
) -> dict[str, Any]:
    if not isinstance(group, Mapping):
        raise UserError(f"{where} is {brief(group)}, expected an object")
    new = dict(group)
    for field in fields:
        value = group.get(field)
        if isinstance(value, list | tuple):
            new[field] = _rewrite_list(f"{where}.{field}", value, renumbering, expand=True)
        elif value is not None:
            raise UserError(f"{where}.{field} is {brief(value)}, expected a list")
    return new


def _matcher(field: str, pattern: str) -> _Matcher:
    if len(pattern) > _MAX_PATTERN:
        raise UserError(f"{field}: a pattern has {len(pattern)} characters, at most {_MAX_PATTERN}")
    try:
        return _Matcher(re.compile(pattern))
    except re.error as error:
        raise UserError(f"{field}: {brief(pattern)} is no regular expression: {error}") from error
