"""What a PEFT adapter names layers by, in the numbers of the dense model and of the pruned one.

What PEFT makes of the fields of adapter_config.json was read in huggingface/peft,
src/peft/tuners/tuners_utils.py (check_target_module_exists) and src/peft/utils/other.py
(get_pattern_key).
"""

import re
from collections.abc import Iterator, Mapping
from reprlib import repr as brief
from typing import Any

from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import LayerMap

CONFIG_NAME = "adapter_config.json"

_KEY_PREFIX = "base_model.model."
_LAYER = re.compile(r"((?:.*?\.)?(?:layers|h|blocks|block)\.)(0|[1-9][0-9]{0,8})(\..*|$)")
_NOT_LANGUAGE = re.compile(r"vision|visual|image|audio|speech|video|encoder|draft|mtp")
# In a model of several towers a bare layer number says nothing of the tower.
_SEVERAL_TOWERS = re.compile(r"language|text|thinker")
_NUMBER = re.compile(r"(^|\.)[0-9]+(\.|$)")
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_LORA_PART = re.compile(r"\.lora_[A-Za-z_]+(\.|$)")
_REFUSED = {
    "layer_replication": "repeats layers of the base model by number",
    "megatron_config": "describes the base model, whose layers are others now",
}
# Read and rewritten, or about the base model's name.
_HANDLED = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters"),
    *("base_model_name_or_path", "revision"),
}


class AdapterNames:
    """The adapter's tensor names, in the numbers of the dense model and of the pruned one."""

    def __init__(self, tensor_names: list[str], layer_map: LayerMap) -> None:
        layer_map.require_whole_layers()
        self._new = {old: new for new, old in enumerate(layer_map.kept)}
        self.num_layers = layer_map.base_model.num_hidden_layers
        for name in tensor_names:
            if not name.startswith(_KEY_PREFIX):
                raise UserError(
                    f"tensor {name!r} does not begin with {_KEY_PREFIX}, as PEFT writes it; save "
                    "the adapter with PEFT"
                )
        self._tensors = [name.removeprefix(_KEY_PREFIX) for name in tensor_names]
        stacks = {match[1] for name in self._tensors if (match := _LAYER.match(name))}
        language = {stack for stack in stacks if not _NOT_LANGUAGE.search(stack)}
        if len(language) != 1:
            raise UserError(
                "its tensors are of no decoder layer"
                if not language
                else f"cannot tell which of {', '.join(sorted(language))} are the decoder layers"
            )
        self.prefix = language.pop()
        self.several_towers = len(stacks) > 1 or bool(_SEVERAL_TOWERS.search(self.prefix))
        for name in self._tensors:
            match = _LAYER.match(name)
            if match and match[1] == self.prefix and int(match[2]) >= self.num_layers:
                raise UserError(
                    f"adapts layer {match[2]}, and the layer map is for a model of layers 0 to "
                    f"{self.num_layers - 1}"
                )
            if match is None and _NUMBER.search(name):
                raise UserError(f"tensor {name!r} has a number that is not known to be a layer's")
        if not any(self.in_kept_layer(name) for name in self._tensors):
            raise UserError("adapts removed layers only; nothing of it is left")

    def tensor(self, name: str) -> str | None:
        """A tensor's new name; None where its layer is removed."""
        renumbered = self.module(name.removeprefix(_KEY_PREFIX))
        return None if renumbered is None else _KEY_PREFIX + renumbered

    def module(self, name: str) -> str | None:
        """A module's new name; None where its layer is removed."""
        match = _LAYER.match(name)
        if match is None or match[1] != self.prefix:
            return name
        new = self._new.get(int(match[2]))
        return None if new is None else f"{self.prefix}{new}{match[3]}"

    def in_kept_layer(self, name: str) -> bool:
        match = _LAYER.match(name)
        return bool(match) and match[1] == self.prefix and int(match[2]) in self._new  # type: ignore[index]

    def layers(self, values: list[Any]) -> list[int]:
        """New numbers of those of these layers that are kept."""
        for value in values:
            if type(value) is not int or not 0 <= value < self.num_layers:
                raise UserError(
                    f"layers_to_transform names {brief(value)}, and the layer map is for a model "
                    f"of layers 0 to {self.num_layers - 1}"
                )
        return [self._new[value] for value in values if value in self._new]

    def adapted_modules(self) -> Iterator[tuple[str, str]]:
        """Old and new name of each module with LoRA tensors that is left, in the file's order."""
        seen = set()
        for name in self._tensors:
            part = _LORA_PART.search(name)
            if part is None or name[: part.start()] in seen:
                continue
            old = name[: part.start()]
            seen.add(old)
            if (new := self.module(old)) is not None:
                yield old, new


def rewrite_config(config: Mapping[str, Any], names: AdapterNames) -> dict[str, Any]:
    """The adapter's config for the pruned model: each field that names layers is rewritten.

    Raises:
        UserError: a field names layers in a way that cannot be rewritten exactly.
    """
    for field, reason in _REFUSED.items():
        if config.get(field):
            raise UserError(f"{CONFIG_NAME}: {field} is not supported: it {reason}")
    new = dict(config)
    if _names_layers(config, names):
        # Every adapted module has its tensors in the file, so their names are the exact list.
        if config.get("target_parameters"):
            raise UserError(
                f"{CONFIG_NAME}: target_parameters beside target_modules or exclude_modules that "
                "name layers is not supported; name the modules without layer numbers"
            )
        modules = [module for _, module in names.adapted_modules()]
        new |= {"target_modules": modules, "layers_to_transform": None, "layers_pattern": None}
        if "exclude_modules" in new:
            new["exclude_modules"] = None
    elif config.get("layers_to_transform") not in (None, []):
        chosen = config["layers_to_transform"]
        layers = names.layers(chosen if isinstance(chosen, list) else [chosen])
        if not layers:
            raise UserError(f"{CONFIG_NAME}: layers_to_transform names removed layers only")
        new["layers_to_transform"] = layers if isinstance(chosen, list) else layers[0]
    for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if pattern := config.get(field):
            new[field] = _rewrite_pattern(pattern, config.get(default), names, field)
    for field in ("modules_to_save", "target_parameters"):
        if config.get(field):
            new[field] = _rewrite_names(config[field], names, field)
    for field, value in config.items():
        if field not in _HANDLED and (text := _text_with_a_layer(value)):
            raise UserError(
                f"{CONFIG_NAME}: {field} names a layer ({brief(text)}), which is not understood "
                "there; remove it"
            )
    return new


def _names_layers(config: Mapping[str, Any], names: AdapterNames) -> bool:
    """Whether the choice of modules depends on layer numbers beyond a plain layers_to_transform."""
    for field in ("target_modules", "exclude_modules"):
        value = config.get(field)
        if value is None or value == "all-linear":
            continue
        if isinstance(value, str):
            return True
        _require_text(value, field)
        if any(_NUMBER.search(item) for item in value):
            return True
    return config.get("layers_to_transform") not in (None, []) and names.several_towers


def _rewrite_pattern(pattern: Any, default: Any, names: AdapterNames, field: str) -> dict[str, Any]:
    """rank_pattern or alpha_pattern: keys are regular expressions for the end of a module's name.

    Where one could depend on a number, each module left gets its own entry instead.
    """
    if not isinstance(pattern, dict):
        raise UserError(f"{CONFIG_NAME}: {field} is {brief(pattern)}, expected an object")
    if all(_PLAIN_NAME.fullmatch(key) and not _NUMBER.search(key) for key in pattern):
        return dict(pattern)
    try:
        expressions = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]
    except re.error as error:
        raise UserError(f"{CONFIG_NAME}: {field}: {error} in a regular expression") from error
    rewritten = {}
    for old, new in names.adapted_modules():
        value = next((value for found, value in expressions if found.match(old)), default)
        if value != default:
            rewritten[new] = value
    return rewritten


def _rewrite_names(values: Any, names: AdapterNames, field: str) -> list[str]:
    """Names of modules or parameters of which some may be in a numbered layer."""
    _require_text(values, field)
    rewritten = []
    for value in values:
        if _NUMBER.search(value):
            match = _LAYER.match(value)
            if match is None or match[1] != names.prefix:
                raise UserError(
                    f"{CONFIG_NAME}: {field} names {value!r}, whose number is not known to be a "
                    f"layer's; write it as {names.prefix}N..."
                )
            renumbered = names.module(value)
            if renumbered is not None:
                rewritten.append(renumbered)
        elif not _PLAIN_NAME.fullmatch(value):
            raise UserError(f"{CONFIG_NAME}: {field} names {value!r}, which is no module's name")
        else:
            rewritten.append(value)
    return rewritten


def _require_text(values: Any, field: str) -> None:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{CONFIG_NAME}: {field} is {brief(values)}, expected a list of names")


def _text_with_a_layer(value: Any) -> str | None:
    """The first text in a JSON value that names a numbered layer."""
    if isinstance(value, str):
        return value if re.search(r"(^|\W)(layers|h|blocks|block)\W+[0-9]", value) else None
    children = value if isinstance(value, list) else []
    if isinstance(value, dict):
        children = [*value, *value.values()]
    return next((text for child in children if (text := _text_with_a_layer(child))), None)
