"""A checkpoint without some layers and some single branches, for vLLM's DeciLM.

vLLM 0.32 has one model of Llama's shape whose layers may lack attention or MLP: DeciLMForCausalLM
(models/nemotron_nas.py), which reads `block_configs[layer].attention.no_op` and `.ffn.no_op`. It
reads them as attributes, and no config class in vLLM 0.32 or transformers 5.19 makes objects of
the JSON, so stock vLLM does not start on any such folder. The trsp plugin (serving.sublayer_config)
adds that class, under a model type of its own: NVIDIA's models bring theirs as remote code and must
keep it. transformers has no such model and does not load the folder.

What DeciLM cannot express is refused: other families, and a first layer without attention (its
residual stream begins in a layer's attention).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trsp.pruner.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint
from trsp.pruner.compaction import LAYER_MAP_NAME, copy_companions, plan_compaction
from trsp.pruner.durable import publish_folder
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.layer_map import ConfigChange, LayerMap, write_layer_map
from trsp.pruner.safetensors_header import TensorEntry, header_bytes

SUBLAYER_MODEL_TYPE = "trsp_sublayers"
_ARCHITECTURE = "DeciLMForCausalLM"
_MODEL_TYPES = ("llama",)
# What a layer's branch consists of, the norm in front of it included.
_PARTS = {
    "attention": ("self_attn.", "input_layernorm."),
    "mlp": ("mlp.", "post_attention_layernorm."),
}
_PIECE_BYTES = 2**20


def export_sublayers(
    checkpoint: Checkpoint, layer_map: LayerMap, out: str | Path, *, overwrite: bool = False
) -> Path:
    """Write `checkpoint` without what `layer_map` drops to the folder `out`, atomically.

    The bytes of the kept tensors are copied in pieces; no tensor is ever in memory.

    Returns:
        `out`: safetensors with index, config.json of DeciLM, tokenizer and other companions,
        layer_map.json, manifest.json.
    Raises:
        UserError: the map is not for this checkpoint or drops no single branch, DeciLM cannot
            express the model, or `out` exists and `overwrite` is not set.
        RunError: the disk is full, or the checkpoint changed while it was read.
    """
    missing = layer_map.missing_branches
    _require_expressible(checkpoint, layer_map)
    whole = LayerMap.from_removal_order(layer_map.base_model, layer_map.removal_order)
    plan = plan_compaction(checkpoint, whole)
    config, changes = _decilm_config(plan.config, [missing.get(old) for old in layer_map.kept])
    shards = []
    for shard in plan.shards:
        kept = tuple(
            (name, entry)
            for name, entry in shard.tensors
            if not _is_missing(checkpoint, entry.name, missing)
        )
        if kept:
            shards.append((shard.source, kept))
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHTS_NAME]
    metadata = {shard.name: shard.metadata for shard in checkpoint.shards}
    num_bytes = sum(entry.num_bytes for _, kept in shards for _, entry in kept)
    with publish_folder(out, overwrite=overwrite, num_bytes=num_bytes) as folder:
        for name, (source, kept) in zip(names, shards, strict=True):
            _write_shard(checkpoint.path / source, folder / name, kept, metadata[source])
        if len(shards) > 1:
            weight_map = {
                tensor: name
                for name, (_, kept) in zip(names, shards, strict=True)
                for tensor, _ in kept
            }
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        copy_companions(checkpoint, folder)
        changed = replace(layer_map, config_changes=(*plan.config_changes, *changes))
        write_layer_map(changed, folder / LAYER_MAP_NAME)
    return Path(out)


def _require_expressible(checkpoint: Checkpoint, layer_map: LayerMap) -> None:
    """UserError where DeciLM computes something else, or nobody needs it."""
    config, where = checkpoint.config, checkpoint.path
    model_type = config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise UserError(
            f"{where}: model type {model_type!r} has no form in vLLM whose layers may lack a "
            f"branch: that is DeciLM, of Llama's shape ({', '.join(_MODEL_TYPES)}); remove whole "
            "layers"
        )
    if checkpoint.quantization is not None:
        raise UserError(
            f"{where}: the weights are quantized ({checkpoint.quantization}), which was never "
            "tried with DeciLM; export the unquantized checkpoint"
        )
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"{where}: hidden_act is {activation!r}, and DeciLM in vLLM has silu alone")
    missing = layer_map.missing_branches
    if not missing:
        raise UserError(
            "the layer map leaves every kept layer whole; trsp compact writes a plain checkpoint"
        )
    first = layer_map.kept[0]
    if missing.get(first) == "attention":
        raise UserError(
            f"layer {first} is the first that is kept and has lost its attention, where DeciLM "
            "begins its residual stream; keep it, or drop the whole layer"
        )


def _decilm_config(
    config: Mapping[str, Any], missing: list[str | None]
) -> tuple[dict[str, Any], tuple[ConfigChange, ...]]:
    """The config of DeciLM, and what that changes. `missing`: the lost branch of each new layer."""
    heads = config["num_attention_heads"]
    group = heads // (config.get("num_key_value_heads") or heads)
    blocks = [
        {
            "attention": {"no_op": part == "attention", "n_heads_in_group": group},
            "ffn": {
                "no_op": part == "mlp",
                "intermediate_size": config["intermediate_size"],
                "hidden_act": "silu",
            },
        }
        for part in missing
    ]
    new = {
        "architectures": [_ARCHITECTURE],
        "model_type": SUBLAYER_MODEL_TYPE,
        "block_configs": blocks,
    }
    changes = tuple(ConfigChange(name, config.get(name), value) for name, value in new.items())
    return {**config, **new}, changes


def _is_missing(checkpoint: Checkpoint, name: str, missing: Mapping[int, str]) -> bool:
    """Whether a tensor of the dense checkpoint belongs to a branch that goes."""
    layer = checkpoint.source_layer(name)
    if layer is None or layer not in missing:
        return False
    inside = name.removeprefix(f"{checkpoint.layer_prefix}{layer}.")
    for part, prefixes in _PARTS.items():
        if inside.startswith(prefixes):
            return part == missing[layer]
    raise UserError(f"{checkpoint.path}: tensor {name!r} is of neither attention nor MLP")


def _write_shard(
    source: Path,
    target: Path,
    tensors: tuple[tuple[str, TensorEntry], ...],
    metadata: Mapping[str, str],
) -> None:
    """Copy these tensors of one safetensors file into a new one under their new names."""
    header = header_bytes(
        ((name, entry.dtype, entry.shape, entry.num_bytes) for name, entry in tensors), metadata
    )
    with source.open("rb") as old, target.open("xb") as new:
        new.write(header)
        for _, entry in tensors:
            old.seek(entry.begin, os.SEEK_SET)
            left = entry.num_bytes
            while left:
                piece = old.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise RunError(f"{source}: was cut while it was read; fetch it again")
                new.write(piece)
                left -= len(piece)
