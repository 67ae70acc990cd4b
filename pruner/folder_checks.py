"""What can be proven of a pruned checkpoint folder without running the model.

Each check returns a Finding, or raises CheckFailed or CheckSkipped. Its name is its function's.
"""

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from trsp.pruner.checkpoint import (
    Checkpoint,
    check_tokenizer,
    contained_file,
    load_tokenizer,
)
from trsp.pruner.durable import MANIFEST_NAME, verify_manifest
from trsp.pruner.layer_map import LayerMap
from trsp.pruner.progress import Progress
from trsp.pruner.safetensors_header import TensorEntry

Measured = Mapping[str, float]

_REFERENCE = "the checkpoint that was compacted (after a transfer, the transferred one)"
_CHUNK_BYTES = 8 * 2**20
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
# Written by whoever saves, not part of what the model is.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Finding:
    """What a passed check saw: one line, numbers by name, and the bound they were held to."""

    detail: str
    measured: Measured = field(default_factory=dict)
    tolerance: float | None = None


class CheckFailed(Exception):  # noqa: N818 - a result, not an error of the program
    """The check was made and the folder is not what it should be."""

    def __init__(
        self, detail: str, measured: Measured | None = None, tolerance: float | None = None
    ) -> None:
        super().__init__(detail)
        self.finding = Finding(detail, measured or {}, tolerance)


class CheckSkipped(Exception):  # noqa: N818 - likewise
    """The check was not made; the text says why."""


def manifest(folder: Path, progress: Progress) -> Finding:
    """Every file is the one that manifest.json lists, by size and sha256."""
    if not (folder / MANIFEST_NAME).exists():
        raise CheckSkipped(f"no {MANIFEST_NAME} yet: it is written when the folder is published")
    verify_manifest(folder, progress=progress)
    return Finding(f"every file is as {MANIFEST_NAME} lists it")


def layer_map(checkpoint: Checkpoint, layers: LayerMap) -> Finding:
    """The layer map keeps as many layers as the checkpoint has; a map that reads is sound itself.

    Its recorded config changes are those of config.json.
    """
    kept, count = len(layers.kept), checkpoint.num_hidden_layers
    if kept != count:
        raise CheckFailed(
            f"layer_map.json keeps {kept} layers, config.json and weights have {count}"
        )
    for change in layers.config_changes:
        value = _field(checkpoint.config, change.field)
        if value != change.after:
            raise CheckFailed(
                f"config.json: {change.field} is {_brief(value)}, layer_map.json records "
                f"{_brief(change.after)}"
            )
    total = layers.base_model.num_hidden_layers
    return Finding(
        f"keeps {kept} of {total} layers; {len(layers.config_changes)} config fields as recorded",
        {"num_kept": kept, "num_dropped": len(layers.dropped)},
    )


def config(checkpoint: Checkpoint, layers: LayerMap | None, *, trust_remote_code: bool) -> Finding:
    """config.json survives load, save and load, and transformers takes over what was changed in it.

    No per-layer list is still as long as the unpruned model was deep. Fields that nobody changed
    may be read as the class sees fit: Qwen2 makes null of a window that is not used.
    """
    from transformers import AutoConfig

    def load(path: Path) -> Any:
        return AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code
        )

    loaded = load(checkpoint.path)
    with tempfile.TemporaryDirectory() as saved:
        loaded.save_pretrained(saved)
        reloaded = load(Path(saved))
    first, second = _plain(loaded), _plain(reloaded)
    if name := _first_difference(first, second):
        raise CheckFailed(f"config.json does not survive a save by transformers: {name} changes")
    language = loaded.get_text_config(decoder=True)
    if language.num_hidden_layers != checkpoint.num_hidden_layers:
        raise CheckFailed(
            f"{type(loaded).__name__} has {language.num_hidden_layers} layers, the weights have "
            f"{checkpoint.num_hidden_layers}"
        )
    if layers is not None:
        for change in layers.config_changes:
            value = _field(first, change.field)
            if change.after is not None and value is not None and value != change.after:
                raise CheckFailed(
                    f"config.json: {change.field} is {_brief(change.after)}, and "
                    f"{type(loaded).__name__} makes {_brief(value)} of it"
                )
        before, after = layers.base_model.num_hidden_layers, checkpoint.num_hidden_layers
        for name, value in _plain(language).items():
            if before != after and "layer" in name and _length(value) == before:
                raise CheckFailed(f"config.json: {name} has {before} entries for {after} layers")
    return Finding(
        f"{type(loaded).__name__}: the same after a save by transformers, and as written"
    )


def tokenizer(
    checkpoint: Checkpoint, base: Checkpoint | None, *, trust_remote_code: bool
) -> tuple[Any, Finding]:
    """The tokenizer loads, fits the embedding, and is the reference's: vocabulary and all."""
    if not has_tokenizer(checkpoint):
        if base is not None and has_tokenizer(base):
            raise CheckFailed("the folder has no tokenizer and the reference has one")
        raise CheckSkipped("the folder has no tokenizer files")
    ours = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    check_tokenizer(checkpoint, ours)
    measured = {"vocab_size": len(ours)}
    if base is None or not has_tokenizer(base):
        return ours, Finding(f"{len(ours)} tokens, all within the embedding", measured)
    theirs = load_tokenizer(base, trust_remote_code=trust_remote_code)
    for name, a, b in (
        ("vocabulary", ours.get_vocab(), theirs.get_vocab()),
        ("special tokens", ours.special_tokens_map, theirs.special_tokens_map),
        ("chat template", ours.chat_template, theirs.chat_template),
    ):
        if a != b:
            raise CheckFailed(f"the tokenizer's {name} is not that of the reference {base.path}")
    return ours, Finding(f"{len(ours)} tokens, the reference's tokenizer", measured)


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the folder holds any file of a tokenizer."""
    return any(any(checkpoint.path.glob(pattern)) for pattern in _TOKENIZER_FILES)


def base_model(checkpoint: Checkpoint, layers: LayerMap, base: Checkpoint) -> Finding:
    """The reference is what the layer map was made for; config.json differs only as recorded."""
    recorded = layers.base_model
    if recorded.num_hidden_layers != base.num_hidden_layers:
        raise CheckFailed(
            f"layer_map.json is for {recorded.num_hidden_layers} layers, {base.path} has "
            f"{base.num_hidden_layers}; give {_REFERENCE}"
        )
    if recorded.fingerprint != base.fingerprint:
        raise CheckFailed(
            f"layer_map.json is for another model ({recorded.name!r}): the fingerprint of "
            f"{base.path} differs; give {_REFERENCE}"
        )
    expected = copy.deepcopy(dict(base.config))
    for change in layers.config_changes:
        if _field(expected, change.field) != change.before:
            raise CheckFailed(
                f"layer_map.json records that {change.field} was {_brief(change.before)}, and "
                f"{base.path} has {_brief(_field(expected, change.field))}"
            )
        _set_field(expected, change.field, change.after)
    if name := _first_difference(expected, dict(checkpoint.config)):
        raise CheckFailed(
            f"config.json: {name} is not the reference's and layer_map.json records no such change"
        )
    return Finding(f"fingerprint {base.fingerprint[:16]}; config.json differs only as recorded")


def weights(
    checkpoint: Checkpoint, layers: LayerMap, base: Checkpoint, progress: Progress
) -> Finding:
    """The tensors are those of the kept layers and of everything else, bit for bit."""
    sources = {name: _source_name(checkpoint, layers, base, name) for name in checkpoint.tensors}
    wanted = {name for name in base.tensors if base.source_layer(name) not in layers.dropped}
    if unexpected := sorted(name for name in sources if sources[name] not in wanted):
        raise CheckFailed(f"tensor {unexpected[0]!r} comes from no tensor of the reference")
    if missing := sorted(wanted - set(sources.values())):
        raise CheckFailed(f"the reference's tensor {missing[0]!r} is missing")
    total = sum(entry.num_bytes for entry in checkpoint.tensors.values())
    completed = 0
    with _OneShard(checkpoint) as ours, _OneShard(base) as theirs:
        for name, entry in sorted(checkpoint.tensors.items(), key=lambda item: _place(item[1])):
            source = base.tensors[sources[name]]
            if (entry.dtype, entry.shape) != (source.dtype, source.shape):
                raise CheckFailed(
                    f"tensor {name!r} is {entry.dtype} {list(entry.shape)}, the reference's is "
                    f"{source.dtype} {list(source.shape)}"
                )
            chunks = zip(
                _chunks(ours.open(entry.shard), entry.begin, entry.end),
                _chunks(theirs.open(source.shard), source.begin, source.end),
                strict=True,
            )
            for a, b in chunks:
                if a != b:
                    raise CheckFailed(
                        f"tensor {name!r} differs from the reference's {source.name!r}; the "
                        f"reference must be {_REFERENCE}"
                    )
                progress("prove weights", completed, total)
                completed += len(a)
    progress("prove weights", total, total)
    count = len(checkpoint.tensors)
    return Finding(
        f"{count} tensors, bit for bit those of the reference",
        {"num_tensors": count, "num_bytes": total},
    )


def _source_name(checkpoint: Checkpoint, layers: LayerMap, base: Checkpoint, name: str) -> str:
    """The reference's name of one of our tensors."""
    layer = checkpoint.source_layer(name)
    if layer is None:
        return name
    rest = name.removeprefix(f"{checkpoint.layer_prefix}{layer}.")
    num_kept = len(layers.kept)
    draft = base.num_hidden_layers + layer - num_kept
    source_layer = layers.kept[layer] if layer < num_kept else draft
    return f"{base.layer_prefix}{source_layer}.{rest}"


class _OneShard:
    """The shards of a checkpoint, one open at a time: there may be more than files allowed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder, self._name = checkpoint.path, ""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def open(self, name: str) -> BinaryIO:
        """The shard `name`; the one opened before it is closed."""
        if name != self._name:
            self._stack.close()
            self._file = self._stack.enter_context(contained_file(self._folder, name).open("rb"))
            self._name = name
        return self._file


def _place(entry: TensorEntry) -> tuple[str, int]:
    return entry.shard, entry.begin


def _chunks(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    """The bytes [begin, end) of a file, in pieces of at most _CHUNK_BYTES."""
    for start in range(begin, end, _CHUNK_BYTES):
        file.seek(start)
        yield file.read(min(_CHUNK_BYTES, end - start))


def _plain(loaded: Any) -> dict[str, Any]:
    """A transformers config as it would be written, defaults included."""
    document: dict[str, Any] = json.loads(loaded.to_json_string(use_diff=False))
    return {name: value for name, value in document.items() if name not in _NOT_THE_MODEL}


def _first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """The first name, dotted, whose values differ; an absent field is as good as null."""
    for name in sorted(a.keys() | b.keys()):
        x, y = a.get(name), b.get(name)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            if below := _first_difference(x, y):
                return f"{name}.{below}"
        elif x != y:
            return name
    return None


def _field(document: Mapping[str, Any], dotted: str) -> Any:
    """The value of a field such as `text_config.layer_types`; None where it is not there."""
    value: Any = document
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _set_field(document: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for part in parents:
        document = document.setdefault(part, {})
    document[last] = value


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
