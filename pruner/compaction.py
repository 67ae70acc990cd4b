"""Deleting layers for good: layer map + checkpoint -> a plain, shallower checkpoint.

The bytes of the kept tensors stream from shard to shard; no tensor and no model is ever in memory.
Each input shard that keeps anything becomes one output shard, hashed while it is written.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.checkpoint import (
    INDEX_NAME,
    MAX_CONFIG_BYTES,
    QUANTIZATION_FIELDS,
    WEIGHTS_NAME,
    Checkpoint,
    contained_file,
)
from trsp.pruner.config_surgery import num_hidden_layers, read_otherwise, rewrite_config
from trsp.pruner.durable import (
    MANIFEST_NAME,
    format_bytes,
    publish_folder,
    refuse_existing,
    verify_manifest,
)
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.layer_map import ConfigChange, LayerMap, write_layer_map
from trsp.pruner.module_names import Renumbering
from trsp.pruner.progress import Progress, silent
from trsp.pruner.quantization import SIDE_FILES, rewrite_quantization
from trsp.pruner.safetensors_header import TensorEntry, header_bytes

LAYER_MAP_NAME = "layer_map.json"

# 8 MiB pieces fall out of the processor's caches: the same copy took 5 times the processor time.
_PIECE_BYTES = 2**20
_NUM_PIECES = 8

_DRAFTS_ARE_AS_TRAINED = (
    "layers for drafting (MTP) move along as they are: they were trained behind all the layers, "
    "and fewer of their tokens will be accepted; measure speculative decoding before you use it"
)

# Files that belong to the model and are copied as they are, never interpreted.
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map*", "added_tokens*", "vocab*", "merges*", "*.model"),
    *("*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*"),
    *("generation_config.json", "*processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*"),
    *("COPYING*", "*.py"),
)
_COMPANION_SUFFIXES = {
    "",
    ".json",
    ".jsonl",
    ".txt",
    ".md",
    ".model",
    ".tiktoken",
    ".bpe",
    ".jinja",
}


@dataclass(frozen=True)
class ShardPlan:
    """One output shard: its name, the input shard, and (new name, source tensor) in byte order."""

    name: str
    source: str
    source_size: int
    header: bytes
    tensors: tuple[tuple[str, TensorEntry], ...]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(entry.num_bytes for _, entry in self.tensors)


@dataclass(frozen=True)
class CompactionPlan:
    """What a compaction will do; made from headers alone, without writing anything.

    Attributes:
        layer_map: the map to publish, with its config_changes.
        config: the new config.json.
        side_files: by name, what the files that speak of quantization once more become.
        shards: the output shards.
        companions: files copied unchanged, such as the tokenizer's; relative names.
        num_bytes_read, num_bytes_written: of weights and companions.
        warnings: what the result is not good for.
        notes: what to know of the result, which is sound.
    """

    checkpoint: Checkpoint
    layer_map: LayerMap
    config: Mapping[str, Any]
    side_files: Mapping[str, Mapping[str, Any]]
    shards: tuple[ShardPlan, ...]
    companions: tuple[str, ...]
    num_bytes_read: int
    num_bytes_written: int
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def config_changes(self) -> tuple[ConfigChange, ...]:
        return self.layer_map.config_changes

    def describe(self) -> str:
        """Say for people what will be done, one line each."""
        layer_map, checkpoint = self.layer_map, self.checkpoint
        dropped = ", ".join(map(str, layer_map.dropped)) or "none"
        lines = [
            f"layers     {checkpoint.num_hidden_layers} -> {len(layer_map.kept)}, "
            f"dropped: {dropped}"
        ]
        lines += [
            f"config     {change.field}: {_brief(change.before)} -> {_brief(change.after)}"
            for change in self.config_changes
        ]
        sizes = {shard.name: shard.size for shard in checkpoint.shards}
        lines += [
            f"weights    {shard.source} ({format_bytes(sizes[shard.source])}) -> "
            f"{shard.name} ({format_bytes(shard.num_bytes)}, {len(shard.tensors)} tensors)"
            for shard in self.shards
        ]
        lines += [
            f"weights    {name} ({format_bytes(size)}) -> nothing, all its layers go"
            for name, size in sizes.items()
            if name not in {shard.source for shard in self.shards}
        ]
        if self.companions:
            lines.append(f"copied     {', '.join(self.companions)}")
        lines += [f"warning    {text}" for text in self.warnings]
        lines += [f"note       {text}" for text in self.notes]
        lines.append(
            f"total      reads {format_bytes(self.num_bytes_read)}, "
            f"writes {format_bytes(self.num_bytes_written)}"
        )
        return "\n".join(lines)


def plan_compaction(checkpoint: Checkpoint, layer_map: LayerMap) -> CompactionPlan:
    """Work out the new checkpoint: which bytes go where, under which name, with which config.

    Raises:
        UserError: the layer map is not for this checkpoint, or its config has a field that depends
            on the layers and cannot be carried over.
    """
    check_layer_map(checkpoint, layer_map)
    try:
        config, changes = rewrite_config(dict(checkpoint.config), layer_map.kept)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error
    assert num_hidden_layers(config) == len(layer_map.kept)
    config, quantization_changes, side_files = _rewrite_quantization(checkpoint, layer_map, config)
    layers = {old: new for new, old in enumerate(layer_map.kept)}
    num_layers = checkpoint.num_hidden_layers
    kept: dict[str, list[tuple[str, TensorEntry]]] = {}
    for entry in checkpoint.tensors.values():
        old = checkpoint.source_layer(entry.name)
        if old is None:
            kept.setdefault(entry.shard, []).append((entry.name, entry))
        elif old in layers or old >= num_layers:
            # Draft layers stand behind the decoder layers, whatever their number.
            new = layers[old] if old in layers else old - num_layers + len(layer_map.kept)
            rest = entry.name.removeprefix(f"{checkpoint.layer_prefix}{old}")
            kept.setdefault(entry.shard, []).append(
                (f"{checkpoint.layer_prefix}{new}{rest}", entry)
            )
    sources = [shard for shard in checkpoint.shards if shard.name in kept]
    shards = []
    for number, source in enumerate(sources, start=1):
        tensors = tuple(kept[source.name])
        header = header_bytes(
            ((name, entry.dtype, entry.shape, entry.num_bytes) for name, entry in tensors),
            source.metadata,
        )
        name = f"model-{number:05d}-of-{len(sources):05d}.safetensors"
        shards.append(
            ShardPlan(
                name=name if len(sources) > 1 else WEIGHTS_NAME,
                source=source.name,
                source_size=source.size,
                header=header,
                tensors=tensors,
            )
        )
    companions = find_companions(checkpoint)
    copied = sum((checkpoint.path / name).stat().st_size for name in companions)
    return CompactionPlan(
        checkpoint=checkpoint,
        layer_map=replace(layer_map, config_changes=(*changes, *quantization_changes)),
        config=config,
        side_files=side_files,
        shards=tuple(shards),
        companions=companions,
        num_bytes_read=copied + sum(e.num_bytes for shard in shards for _, e in shard.tensors),
        num_bytes_written=copied + sum(shard.num_bytes for shard in shards),
        warnings=read_otherwise(config),
        notes=(_DRAFTS_ARE_AS_TRAINED,) if checkpoint.has_drafts and layer_map.dropped else (),
    )


def _rewrite_quantization(
    checkpoint: Checkpoint, layer_map: LayerMap, config: dict[str, Any]
) -> tuple[dict[str, Any], list[ConfigChange], dict[str, dict[str, Any]]]:
    """What config.json and the files beside it say of quantization, for the layers that stay."""
    renumbering = Renumbering(
        prefix=checkpoint.layer_prefix,
        kept=layer_map.kept,
        num_layers=checkpoint.num_hidden_layers,
        modules=frozenset(name.rpartition(".")[0] for name in checkpoint.tensors),
    )

    def rewrite(section: Any, where: str) -> dict[str, Any]:
        if not isinstance(section, dict):
            raise UserError(f"{checkpoint.path}: {where} is {_brief(section)}, expected an object")
        try:
            return rewrite_quantization(section, renumbering)
        except UserError as error:
            raise UserError(f"{checkpoint.path}: {where}: {error}") from error

    changes: list[ConfigChange] = []

    def rewrite_part(part: dict[str, Any], prefix: str) -> dict[str, Any]:
        new = dict(part)
        for field in QUANTIZATION_FIELDS:
            if part.get(field) is not None:
                new[field] = rewrite(part[field], prefix + field)
                if new[field] != part[field]:
                    changes.append(ConfigChange(prefix + field, part[field], new[field]))
        return new

    config = rewrite_part(config, "")
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = rewrite_part(config["text_config"], "text_config.")
    side_files = {}
    for name in SIDE_FILES:
        if (checkpoint.path / name).exists():
            file = contained_file(checkpoint.path, name)
            side_files[name] = rewrite(read_json_object(file, max_bytes=MAX_CONFIG_BYTES), name)
    return config, changes, side_files


def compact(
    checkpoint: Checkpoint,
    layer_map: LayerMap,
    out: str | Path,
    *,
    overwrite: bool = False,
    extra_files: Mapping[str, str | bytes] | None = None,
    prove: Callable[[Path], None] | None = None,
    progress: Progress = silent,
) -> Path:
    """Write `checkpoint` without the layers that `layer_map` drops to the folder `out`, atomically.

    Where the checkpoint has a manifest.json, the files used are checked against it first.

    Args:
        extra_files: more files to publish, by name; text as UTF-8.
        prove: called with the finished folder before it gets its name; when it raises, nothing is
            published.
    Returns:
        `out`: safetensors with index, config.json, tokenizer and other companions, layer_map.json,
        manifest.json.
    Raises:
        UserError: the layer map is not for this checkpoint, a field of its config cannot be carried
            over, a file is damaged, or `out` exists and `overwrite` is not set.
        RunError: the disk is full, or the checkpoint changed while it was read.
    """
    plan = plan_compaction(checkpoint, layer_map)
    out = Path(out)
    refuse_existing(out, overwrite=overwrite)
    if checkpoint.path.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: holds the checkpoint that is read; choose another output folder")
    reserved = {"config.json", INDEX_NAME, LAYER_MAP_NAME, MANIFEST_NAME, *plan.companions}
    reserved |= set(plan.side_files)
    reserved |= {shard.name for shard in plan.shards}
    for name in extra_files or {}:
        if name in reserved or Path(name).name != name:
            raise ValueError(f"extra file {name!r} is a name in use or no base name")
    if (checkpoint.path / MANIFEST_NAME).exists():
        used = {"config.json", INDEX_NAME, *plan.companions, *plan.side_files}
        used |= {shard.name for shard in checkpoint.shards}
        verify_manifest(checkpoint.path, names=used, progress=progress)
    total = sum(shard.num_bytes for shard in plan.shards)
    completed = 0
    digests: dict[str, str] = {}

    def advance(num_bytes: int) -> None:
        nonlocal completed
        completed += num_bytes
        progress("compact", completed, total)

    with publish_folder(
        out, overwrite=overwrite, num_bytes=plan.num_bytes_written, digests=digests
    ) as folder:
        progress("compact", 0, total)
        for shard in plan.shards:
            digests[shard.name] = _write_shard(checkpoint, shard, folder / shard.name, advance)
        if len(plan.shards) > 1:
            _write_json(folder / INDEX_NAME, _index(plan))
        for name, document in {"config.json": plan.config, **plan.side_files}.items():
            _write_json(folder / name, document)
        copy_companions(checkpoint, folder)
        write_layer_map(plan.layer_map, folder / LAYER_MAP_NAME)
        for name, content in (extra_files or {}).items():
            data = content.encode() if isinstance(content, str) else content
            (folder / name).write_bytes(data)
        if prove is not None:
            prove(folder)
    return out


def find_companions(checkpoint: Checkpoint) -> tuple[str, ...]:
    """List the files that belong to the model besides config and weights, sorted relative names.

    Tokenizer, chat template, generation config, processor config and licence, as data. Python
    files only where the user trusts them; weights in other formats never.
    Raises:
        UserError: one is a link that leads out of the folder.
    """
    suffixes = _COMPANION_SUFFIXES | ({".py"} if checkpoint.trust_remote_code else set())
    found = {
        path.relative_to(checkpoint.path).as_posix()
        for pattern in _COMPANIONS
        for path in checkpoint.path.glob(pattern)
        if path.suffix in suffixes and not path.is_dir()
    }
    for name in found:
        contained_file(checkpoint.path, name)
    return tuple(sorted(found))


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the files that `find_companions` lists into `folder`."""
    for name in find_companions(checkpoint):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.path / name, folder / name)


def check_layer_map(checkpoint: Checkpoint, layer_map: LayerMap) -> None:
    """Refuse a layer map that is not for this checkpoint.

    Raises:
        UserError: another number of layers, another fingerprint, or a branch that goes alone.
    """
    layer_map.require_whole_layers()
    base = layer_map.base_model
    if base.num_hidden_layers != checkpoint.num_hidden_layers:
        raise UserError(
            f"the layer map is for a model of {base.num_hidden_layers} layers ({base.name}), and "
            f"{checkpoint.path} has {checkpoint.num_hidden_layers}; use the map of this checkpoint"
        )
    if base.fingerprint != checkpoint.fingerprint:
        raise UserError(
            f"the layer map is for another model ({base.name}, fingerprint "
            f"{base.fingerprint[:12]}) than {checkpoint.path} ({checkpoint.fingerprint[:12]}); "
            "use the map of this checkpoint"
        )


def _write_shard(
    checkpoint: Checkpoint, shard: ShardPlan, target: Path, advance: Callable[[int], None]
) -> str:
    """Write one output shard and return its sha256 (hex)."""
    digest = hashlib.sha256(shard.header)
    source = os.open(checkpoint.path / shard.source, os.O_RDONLY)
    try:
        if os.fstat(source).st_size != shard.source_size:
            raise RunError(f"{checkpoint.path / shard.source}: changed since it was opened")
        output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write_all(output, memoryview(shard.header))
            advance(len(shard.header))
            for num_bytes in _copy_tensors(source, output, shard, digest):
                if num_bytes == 0:
                    raise RunError(f"{checkpoint.path / shard.source}: was cut while it was read")
                advance(num_bytes)
        finally:
            os.close(output)
    finally:
        os.close(source)
    return digest.hexdigest()


def _copy_tensors(
    source: int, output: int, shard: ShardPlan, digest: "hashlib._Hash"
) -> Iterator[int]:
    """Append the tensors' bytes to `output`; yield the size of each piece, 0 where the input ends.

    Hashing is the slow part, so it has a thread of its own and the pieces go round in a ring.
    """
    size = min(_PIECE_BYTES, shard.num_bytes)
    ring = [memoryview(bytearray(size)) for _ in range(_NUM_PIECES)]
    hashed: list[Future[None] | None] = [None] * _NUM_PIECES
    position = len(shard.header)
    turns = itertools.cycle(range(_NUM_PIECES))
    with ThreadPoolExecutor(max_workers=1) as hasher:
        for begin, end in _runs(shard):
            while begin < end:
                turn = next(turns)
                if (previous := hashed[turn]) is not None:
                    previous.result()
                piece = ring[turn][: end - begin]
                piece = piece[: os.preadv(source, [piece], begin)]
                hashed[turn] = hasher.submit(digest.update, piece)
                _write_all(output, piece)
                _begin_writeback(output, position, len(piece))
                yield len(piece)
                begin += len(piece)
                position += len(piece)


def _runs(shard: ShardPlan) -> Iterator[tuple[int, int]]:
    """Join tensors that are neighbours in the input: its byte ranges [begin, end) to copy."""
    begin = end = 0
    for _, entry in shard.tensors:
        if entry.begin != end:
            yield begin, end
            begin = entry.begin
        end = entry.end
    yield begin, end


def _begin_writeback(descriptor: int, position: int, num_bytes: int) -> None:
    """Let the disk begin, so that the fsync before publishing finds little to do: 10 % less time.

    Linux starts to write the dirty pages of a range that is said to be no longer needed.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, position, num_bytes, os.POSIX_FADV_DONTNEED)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _index(plan: CompactionPlan) -> dict[str, Any]:
    entries = [entry for shard in plan.shards for _, entry in shard.tensors]
    weight_map = {name: shard.name for shard in plan.shards for name, _ in shard.tensors}
    return {
        "metadata": {
            "total_parameters": sum(math.prod(entry.shape) for entry in entries),
            "total_size": sum(entry.num_bytes for entry in entries),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
