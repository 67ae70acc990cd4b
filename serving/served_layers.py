"""A layer map over a dense checkpoint, checked, with the config of the model that is served.

vLLM reads more from a model's folder than its config: where config.json is silent, the headers of
the weights decide on dtype and on tied embeddings. A folder without weights must say both.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from trsp.pruner.checkpoint import Checkpoint, open_checkpoint, sample_weights
from trsp.pruner.compaction import plan_compaction
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import LayerMap
from trsp.serving.weight_stream import LayerRenumbering

# vLLM hashes the whole config into the key of its compile cache, fields it does not know too.
DIGEST_FIELD = "trsp_layer_map_digest"
_DTYPE_SECTIONS = ("text_config", "vision_config", "encoder_config")
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class ServedLayers:
    """What is served: the kept layers of a checkpoint.

    Attributes:
        layer_map: the map, with its config_changes.
        config: config.json of the pruned model, as `trsp compact` writes it, with the digest.
        companions: the checkpoint's tokenizer files and the like; relative names.
        weights_sha256: of the checkpoint's weights, as `sample_weights` takes it.
    """

    checkpoint: Checkpoint
    layer_map: LayerMap
    config: Mapping[str, Any]
    companions: tuple[str, ...]
    weights_sha256: str

    @property
    def renumbering(self) -> LayerRenumbering:
        return LayerRenumbering.of(self.checkpoint, self.layer_map)

    @property
    def has_own_head(self) -> bool:
        """Whether the weights hold an output head, whatever config.json says of tying."""
        return any(name.endswith("lm_head.weight") for name in self.checkpoint.tensors)

    def overlay_config(self) -> dict[str, Any]:
        """`config` for a folder without weights: it says what vLLM would read from their headers.

        vLLM takes a head that is in the weights for untied, even where config.json ties it, and
        takes the dtype from the tensors where config.json names none.
        """
        config = copy.deepcopy(dict(self.config))
        sections = [config, *(config.get(name) for name in _DTYPE_SECTIONS)]
        named = [
            section[field]
            for section in sections
            if isinstance(section, dict)
            for field in ("dtype", "torch_dtype")
            if section.get(field) is not None
        ]
        if not named:
            config["dtype"] = self._widest_dtype()
        if self.has_own_head:
            config["tie_word_embeddings"] = False
            if isinstance(config.get("text_config"), dict):
                config["text_config"]["tie_word_embeddings"] = False
        return config

    def hf_overrides(self) -> dict[str, Any]:
        """vLLM's `hf_overrides` that turn the dense folder's config into the pruned model's.

        Lists that the config class derives from the number of layers are among them: an override
        of the number alone leaves them as long as the dense model is deep.
        """
        from transformers import AutoConfig

        dense = AutoConfig.from_pretrained(
            str(self.checkpoint.path),
            local_files_only=True,
            trust_remote_code=self.checkpoint.trust_remote_code,
        )
        return self._wanted_fields(type(dense))

    def check_overlay_config(self, config: Mapping[str, Any]) -> None:
        """Check that config.json of an overlay is what `overlay_config` makes it, field by field.

        Raises:
            UserError: a field differs, is missing or is not ours; it is named.
        """
        wanted = self.overlay_config()
        for name in dict.fromkeys((*wanted, *config)):
            if (name in wanted, _plain(wanted.get(name))) != (name in config, config.get(name)):
                has, expected = (
                    brief(document[name]) if name in document else "missing"
                    for document in (config, wanted)
                )
                raise UserError(
                    f"config.json of the overlay was changed, or the checkpoint's was since it was "
                    f"made: {name} is {has}, expected {expected}; make the overlay anew"
                )

    def check_config(self, config: Any) -> None:
        """Check that a transformers config is that of the pruned model, in all that layers decide.

        Raises:
            UserError: a field differs from what the layer map makes it; it is named.
        """
        wanted, found = self._wanted_fields(type(config)), config.to_dict()
        for name, expected, value in _leaves(wanted, found):
            if _plain(value) != _plain(expected):
                raise UserError(
                    f"the config that vLLM was given does not agree with the layer map: {name} is "
                    f"{brief(value)}, expected {brief(expected)}; use an overlay folder (trsp "
                    "serve --map), or all the hf_overrides that ServedLayers.hf_overrides gives"
                )

    def _wanted_fields(self, config_class: Any) -> dict[str, Any]:
        """The fields in which the pruned model's config differs from the dense model's."""
        dense, pruned = (
            config_class.from_dict(copy.deepcopy(dict(config))).to_dict()
            for config in (self.checkpoint.config, self.config)
        )
        return _differences(dense, pruned)

    def _widest_dtype(self) -> str:
        kept = self.renumbering
        found = {
            _FLOATS[entry.dtype]
            for entry in self.checkpoint.tensors.values()
            if entry.dtype in _FLOATS and kept.rename(entry.name) is not None
        }
        if len(found) == 1:
            return found.pop()
        return "float64" if "float64" in found else "float32"


def open_served_layers(
    base: str | Path, layer_map: LayerMap, *, trust_remote_code: bool = False
) -> ServedLayers:
    """Open the dense checkpoint and check that the map is for it and its config can follow.

    Raises:
        UserError: `base` is no checkpoint that can be pruned (quantized ones are refused), the map
            is for another, by its shape or, where the map tells them, by its weights; or a field
            of its config cannot be carried over.
    """
    checkpoint = open_checkpoint(base, trust_remote_code=trust_remote_code)
    if checkpoint.quantization is not None:
        raise UserError(
            f"{checkpoint.path}: the weights are quantized ({checkpoint.quantization}), which is "
            "not served over a layer map; write the shallower checkpoint with trsp compact"
        )
    plan = plan_compaction(checkpoint, layer_map)
    if plan.warnings:
        raise UserError(f"{checkpoint.path}: {'; '.join(plan.warnings)}")
    found, expected = sample_weights(checkpoint), layer_map.base_model.weights_sha256
    # Here alone: compaction may delete the chosen layers of other weights on purpose.
    if expected is not None and found != expected:
        raise UserError(
            f"{checkpoint.path}: same shape, other weights: {found[:12]}, and the layer map was "
            f"made for {expected[:12]} ({layer_map.base_model.name}); serve that checkpoint: after "
            "stage 2 of trsp prune it is OUT.run/transferred, without it the model that was given"
        )
    return ServedLayers(
        checkpoint=checkpoint,
        layer_map=plan.layer_map,
        config={**plan.config, DIGEST_FIELD: layer_map_digest(layer_map)},
        companions=plan.companions,
        weights_sha256=found,
    )


def layer_map_digest(layer_map: LayerMap) -> str:
    """sha256 (hex) that two maps share when they keep the same layers of one architecture."""
    content = [list(layer_map.kept), layer_map.base_model.fingerprint]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What `after` has otherwise than `before`, nested as it is; None for what it lacks."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if inner := _differences(old, new):
                found[name] = inner
        elif _plain(old) != _plain(new):
            found[name] = new
    return found


def _leaves(wanted: Mapping[str, Any], found: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, wanted value, found value) of each wanted field."""
    leaves: list[tuple[str, Any, Any]] = []
    for name, value in wanted.items():
        other = found.get(name) if isinstance(found, Mapping) else None
        if isinstance(value, Mapping):
            leaves += _leaves(value, other, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, value, other))
    return leaves


def _plain(value: Any) -> Any:
    """Tuples as lists: configs hold both for one thing."""
    return json.loads(json.dumps(value, default=str))
