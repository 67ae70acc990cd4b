"""LoRA adapters of the dense model, renumbered for the pruned one.

A PEFT adapter is a folder: adapter_config.json says which modules it adapts and how strongly,
adapter_model.safetensors has their tensors, named after the modules. Tensors of removed layers go,
those of kept layers get their layer's new number, byte for byte; every field of the config that
names layers is rewritten exactly or refused. What PEFT makes of these fields was read in
huggingface/peft, src/peft/tuners/tuners_utils.py (check_target_module_exists) and
src/peft/utils/other.py (get_pattern_key). Standard library only.

The result is exact where layers were only removed: the dense model with its adapter and those
layers masked has the same logits. After transfer the kept layers have other weights than the
adapter was trained on, and it is a start for further training.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.checkpoint import MAX_CONFIG_BYTES, contained_file
from trsp.pruner.durable import publish_folder, refuse_existing
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.layer_map import LayerMap, write_layer_map
from trsp.pruner.safetensors_header import Shard, TensorEntry, header_bytes, read_header

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LAYER_MAP_NAME = "layer_map.json"

_PIECE_BYTES = 2**20
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
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map*", "added_tokens*", "vocab*", "merges*"),
    *("*.model", "chat_template*", "LICENSE*", "NOTICE*"),
)
_COMPANION_SUFFIXES = {"", ".json", ".txt", ".md", ".model", ".jinja"}


def renumber_adapter(
    adapter: str | Path,
    layer_map: LayerMap,
    out: str | Path,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the LoRA adapter folder `adapter`, made for the dense model, for the pruned one.

    Args:
        layer_map: of the pruned model.
        base_model: what base_model_name_or_path becomes (its revision goes); None leaves both.
    Returns:
        `out`: adapter_config.json, adapter_model.safetensors, the tokenizer files that the adapter
        has, layer_map.json, manifest.json; published whole or not at all.
    Raises:
        UserError: no LoRA adapter in safetensors, or a damaged one; made for a model of more
            layers; a field names layers in a way that cannot be rewritten exactly; nothing of the
            adapter is left; `out` exists and `overwrite` is not set.
        RunError: the disk is full, or the adapter changed while it was read.
    """
    adapter, out = Path(adapter), Path(out)
    config = _read_config(adapter)
    weights = contained_file(adapter, WEIGHTS_NAME)
    shard, entries = read_header(weights, WEIGHTS_NAME)
    try:
        names = _Names([entry.name for entry in entries], layer_map)
        new_config = _rewrite_config(config, names)
    except UserError as error:
        raise UserError(f"{adapter}: {error}") from error
    if base_model is not None:
        new_config |= {"base_model_name_or_path": base_model, "revision": None}
    refuse_existing(out, overwrite=overwrite)
    if adapter.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: holds the adapter that is read; choose another output folder")
    kept = [(new, entry) for entry in entries if (new := names.tensor(entry.name)) is not None]
    num_bytes = sum(entry.num_bytes for _, entry in kept)
    digests: dict[str, str] = {}
    with publish_folder(out, overwrite=overwrite, num_bytes=num_bytes, digests=digests) as folder:
        digests[WEIGHTS_NAME] = _write_weights(weights, shard, kept, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(new_config, indent=2) + "\n", "utf-8")
        for path in _companions(adapter):
            shutil.copyfile(path, folder / path.name)
        write_layer_map(layer_map, folder / LAYER_MAP_NAME)
    return out


class _Names:
    """The adapter's tensor names, in the numbers of the dense model and of the pruned one."""

    def __init__(self, tensor_names: list[str], layer_map: LayerMap) -> None:
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


def _rewrite_config(config: Mapping[str, Any], names: _Names) -> dict[str, Any]:
    """The config for the pruned model: each field that names layers rewritten, or UserError."""
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


def _names_layers(config: Mapping[str, Any], names: _Names) -> bool:
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


def _rewrite_pattern(pattern: Any, default: Any, names: _Names, field: str) -> dict[str, Any]:
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


def _rewrite_names(values: Any, names: _Names, field: str) -> list[str]:
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


def _read_config(adapter: Path) -> dict[str, Any]:
    if not (adapter / CONFIG_NAME).is_file():
        raise UserError(f"{adapter}: has no {CONFIG_NAME}; give the folder of a PEFT adapter")
    config = read_json_object(contained_file(adapter, CONFIG_NAME), max_bytes=MAX_CONFIG_BYTES)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{adapter}: peft_type is {brief(config.get('peft_type'))}; only LORA is renumbered"
        )
    if not (adapter / WEIGHTS_NAME).exists():
        pickled = "adapter_model.bin is a pickle and never opened; " * bool(
            (adapter / "adapter_model.bin").exists()
        )
        raise UserError(f"{adapter}: has no {WEIGHTS_NAME}; {pickled}save it as safetensors")
    return config


def _companions(adapter: Path) -> list[Path]:
    found = {path for pattern in _COMPANIONS for path in adapter.glob(pattern)}
    return sorted(
        contained_file(adapter, path.name)
        for path in found
        if path.suffix in _COMPANION_SUFFIXES and not path.is_dir()
    )


def _write_weights(
    source: Path, shard: Shard, kept: list[tuple[str, TensorEntry]], target: Path
) -> str:
    """Copy the tensors in the order of their bytes; the new file's sha256 (hex)."""
    header = header_bytes(
        ((name, entry.dtype, entry.shape, entry.num_bytes) for name, entry in kept),
        shard.metadata,
    )
    digest = hashlib.sha256(header)
    with source.open("rb") as file, target.open("xb") as output:
        if os.fstat(file.fileno()).st_size != shard.size:
            raise RunError(f"{source}: changed since it was opened")
        output.write(header)
        for _, entry in kept:
            file.seek(entry.begin)
            left = entry.num_bytes
            while left:
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise RunError(f"{source}: was cut while it was read")
                digest.update(piece)
                output.write(piece)
                left -= len(piece)
    return digest.hexdigest()
