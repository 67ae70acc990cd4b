"""LoRA adapters of the dense model, renumbered for the pruned one.

A PEFT adapter is a folder: adapter_config.json says which modules it adapts and how strongly,
adapter_model.safetensors has their tensors, named after the modules. Tensors of removed layers go,
those of kept layers get their layer's new number, byte for byte; every field of the config that
names layers is rewritten exactly or refused (adapter_names.py). Standard library only.

The result is exact where layers were only removed: the dense model with its adapter and those
layers masked has the same logits. After transfer the kept layers have other weights than the
adapter was trained on, and it is a start for further training.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from trsp.pruner.adapter_names import CONFIG_NAME, AdapterNames, rewrite_config
from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.checkpoint import MAX_CONFIG_BYTES, contained_file
from trsp.pruner.durable import publish_folder, refuse_existing
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.layer_map import LayerMap, write_layer_map
from trsp.pruner.safetensors_header import Shard, TensorEntry, header_bytes, read_header

WEIGHTS_NAME = "adapter_model.safetensors"
LAYER_MAP_NAME = "layer_map.json"

_PIECE_BYTES = 2**20
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
        names = AdapterNames([entry.name for entry in entries], layer_map)
        new_config = rewrite_config(config, names)
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
