"""A folder that is a model to vLLM and holds no weights: trimmed config, tokenizer, layer map.

Its weights are those of the dense checkpoint it names. Only the load format `trsp_layer_map` can
load it, so it cannot be served by mistake with the first n layers, or with all.
"""

import filecmp
import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.compaction import LAYER_MAP_NAME, copy_companions
from trsp.pruner.durable import MANIFEST_NAME, publish_folder, read_manifest, verify_manifest
from trsp.pruner.errors import UserError, first_problem
from trsp.pruner.layer_map import LayerMap, read_layer_map, write_layer_map
from trsp.serving.served_layers import DIGEST_FIELD, ServedLayers, open_served_layers

OVERLAY_NAME = "overlay.json"
_MAX_BYTES = 2**20
_OWN_FILES = {"config.json", LAYER_MAP_NAME, OVERLAY_NAME, MANIFEST_NAME}


class OverlayRecord(BaseModel):
    """overlay.json. `base_model`: absolute path of the dense checkpoint.

    `base_weights_sha256`: of its weights, as `checkpoint.sample_weights` takes it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    base_model: str
    base_fingerprint: str
    base_weights_sha256: str
    layer_map_sha256: str
    layer_prefix: str


def is_overlay(folder: str | Path) -> bool:
    """Whether a folder says that it is an overlay; `read_overlay` finds out if it is sound."""
    return (Path(folder) / OVERLAY_NAME).is_file()


def write_overlay(
    base: Path, layer_map: LayerMap, out: Path, *, trust_remote_code: bool = False
) -> Path:
    """Write the overlay folder of `layer_map` over the checkpoint folder `base`, atomically.

    Returns:
        `out`: config.json, tokenizer and other companions, layer_map.json, overlay.json and
        manifest.json; no weights.
    Raises:
        UserError: `out` exists, or as `open_served_layers`.   RunError: the disk is full.
    """
    served = open_served_layers(base, layer_map, trust_remote_code=trust_remote_code)
    publish_overlay(served, out)
    return out


def publish_overlay(served: ServedLayers, out: Path) -> None:
    """`write_overlay` for what is already open.

    Raises:
        UserError: `out` exists.   RunError: the disk is full.
    """
    with publish_folder(out) as folder:
        copy_companions(served.checkpoint, folder)
        write_layer_map(served.layer_map, folder / LAYER_MAP_NAME)
        record = OverlayRecord(
            base_model=str(served.checkpoint.path.resolve()),
            base_fingerprint=served.checkpoint.fingerprint,
            base_weights_sha256=served.weights_sha256,
            layer_map_sha256=_sha256(folder / LAYER_MAP_NAME),
            layer_prefix=served.checkpoint.layer_prefix,
        )
        config = json.dumps(served.overlay_config(), indent=2)
        (folder / "config.json").write_text(config + "\n", "utf-8")
        (folder / OVERLAY_NAME).write_text(record.model_dump_json(indent=2) + "\n", "utf-8")


def read_overlay(folder: str | Path, *, trust_remote_code: bool = False) -> ServedLayers:
    """Open an overlay folder and the checkpoint it names, and check that they still belong.

    Raises:
        UserError: no overlay, damaged, of another schema_version; a file of it was changed; the
            checkpoint is gone or has become another, in its weights, config, tokenizer or other
            companions; or as `open_served_layers`.
    """
    folder = Path(folder)
    if not is_overlay(folder):
        raise UserError(
            f"{folder}: is no overlay folder, it has no {OVERLAY_NAME}; make one with "
            "trsp serve MODEL --map MAP --overlay DIR"
        )
    file = folder / OVERLAY_NAME
    try:
        record = OverlayRecord.model_validate(read_json_object(file, max_bytes=_MAX_BYTES))
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error)}; make the overlay anew") from error
    layer_map = read_layer_map(folder / LAYER_MAP_NAME)
    if _sha256(folder / LAYER_MAP_NAME) != record.layer_map_sha256:
        raise UserError(
            f"{folder / LAYER_MAP_NAME}: was changed since the overlay was made; make it anew"
        )
    if not Path(record.base_model).is_dir():
        raise UserError(
            f"{folder}: is an overlay of the checkpoint {record.base_model}, which is not there; "
            "bring it back, or make the overlay anew"
        )
    served = open_served_layers(record.base_model, layer_map, trust_remote_code=trust_remote_code)
    checkpoint = served.checkpoint
    for name, was, found in (
        ("fingerprint", record.base_fingerprint, checkpoint.fingerprint),
        ("sha256 of weights", record.base_weights_sha256, served.weights_sha256),
        ("layer prefix", record.layer_prefix, checkpoint.layer_prefix),
    ):
        if was != found:
            raise UserError(
                f"{checkpoint.path}: its {name} is {found}, and the overlay {folder} was made "
                f"when it was {was}; make the overlay anew"
            )
    config = read_json_object(folder / "config.json", max_bytes=_MAX_BYTES * 4)
    if config.get(DIGEST_FIELD) != served.config[DIGEST_FIELD]:
        raise UserError(
            f"{folder / 'config.json'}: its {DIGEST_FIELD} is not that of the layer map; "
            "make the overlay anew"
        )
    served.check_overlay_config(config)
    verify_manifest(folder)
    _check_companions(folder, served)
    return served


def _check_companions(folder: Path, served: ServedLayers) -> None:
    """Tokenizer, chat template and the like are still those of the checkpoint, byte for byte."""
    base = served.checkpoint.path
    copied = set(read_manifest(folder)) - _OWN_FILES
    # Python files are copied where the user trusted them: making and serving may differ in that.
    absent = {name for name in served.companions if not name.endswith(".py")} - copied
    for name in sorted(copied | absent):
        if name in absent:
            what = "came after the overlay was made"
        elif not (base / name).is_file():
            what = "is gone since the overlay was made"
        elif not filecmp.cmp(base / name, folder / name, shallow=False):
            what = "is not what the overlay was made with"
        else:
            continue
        raise UserError(f"{base / name}: {what}; remove {folder} and make the overlay anew")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
