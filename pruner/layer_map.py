"""The layer map: which layers a pruned model keeps, and how that came about.

The contract between pruning and serving. Reading one needs the standard library alone. An index
into the unpruned model is a `source_layer`, into the pruned one a `layer`; lists are explicit and
a range in text includes its end, so no index is ever ambiguous.

L layers in the base model.
"""

import json
import math
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Self, SupportsIndex

from trsp.pruner.bounded_json import parse_json_object
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError

SCHEMA_VERSION = 1
# Of maps that drop a sublayer: a trsp that knows only whole layers refuses them and cannot misread.
SUBLAYER_SCHEMA_VERSION = 2
SUBLAYERS = ("attention", "mlp")
MAX_BYTES = 16 * 2**20
MAX_DEPTH = 32
MAX_LAYERS = 2**16

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Layer maps written before a field came up do not have it.
_LATER_FIELDS = {"weights_sha256", "dropped_sublayers"}

# A source layer, or one residual branch of it: (source layer, "attention" or "mlp").
Removal = int | tuple[int, str]


class LayerMapError(UserError):
    """The layer map or layer list is not what it must be; the text names the index or field."""


@dataclass(frozen=True)
class BaseModel:
    """The unpruned model.

    Attributes:
        fingerprint: sha256 over its architecture and tensor names, shapes and dtypes (checkpoint).
        weights_sha256: of its weights (`checkpoint.sample_weights`), 64 hex digits; None where
            nobody took it. After transfer it is that of the model with the moved weights.
    """

    name: str
    num_hidden_layers: int
    fingerprint: str
    weights_sha256: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("name", self.name), ("fingerprint", self.fingerprint)):
            if not isinstance(value, str) or not value.strip():
                raise LayerMapError(f"base_model.{name} is {brief(value)}, expected text")
            _set(self, **{name: _json_value(value, f"base_model.{name}")})
        count = integer(self.num_hidden_layers, "base_model.num_hidden_layers")
        if not 1 <= count <= MAX_LAYERS:
            raise LayerMapError(f"base_model.num_hidden_layers is {count}, not 1 to {MAX_LAYERS}")
        _set(self, num_hidden_layers=count)
        digest = self.weights_sha256
        if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise LayerMapError(
                f"base_model.weights_sha256 is {brief(digest)}, expected 64 hex digits or null"
            )


@dataclass(frozen=True)
class LayerEntry:
    """One layer of the pruned model. `gate`: its learned gate; None where none was learned."""

    layer: int
    source_layer: int
    gate: float | None = None

    def __post_init__(self) -> None:
        for name in ("layer", "source_layer"):
            _set(self, **{name: integer(getattr(self, name), name)})
        if self.gate is not None:
            number = isinstance(self.gate, int | float) and not isinstance(self.gate, bool)
            if not number or not math.isfinite(self.gate):
                raise LayerMapError(f"gate is {brief(self.gate)}, expected a finite number or null")
            _set(self, gate=float(self.gate))


@dataclass(frozen=True)
class DroppedSublayer:
    """One residual branch that goes without the other: `sublayer` is "attention" or "mlp".

    `num_layers_before`: how many layers of removal_order went before it.
    """

    source_layer: int
    sublayer: str
    num_layers_before: int

    def __post_init__(self) -> None:
        for name in ("source_layer", "num_layers_before"):
            _set(self, **{name: integer(getattr(self, name), name)})
        if self.sublayer not in SUBLAYERS:
            raise LayerMapError(f"sublayer is {brief(self.sublayer)}, expected attention or mlp")


@dataclass(frozen=True)
class ConfigChange:
    """A field of config.json that depends on the layers. `before` or `after` None: not there.

    `field` is dotted inside a nested config: `text_config.layer_types`.
    """

    field: str
    before: Any
    after: Any

    def __post_init__(self) -> None:
        if not isinstance(self.field, str) or not self.field:
            raise LayerMapError(f"config change: field is {brief(self.field)}, expected a name")
        for name in ("field", "before", "after"):
            _set(self, **{name: _json_value(getattr(self, name), f"{name} of {brief(self.field)}")})


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """Which layers stay, which go, in what order they went, and how that was decided.

    Attributes:
        kept, dropped: source layers, ascending; together exactly 0..L-1. At least one is kept.
        removal_order: the dropped layers in the order of picking: every prefix is a valid model.
        layers: one entry for each kept layer, in the new order.
        config_changes: what compaction changed in config.json; empty before compaction.
        method: name, recipe, seeds, package version.   calibration: what was learned from.
        steps: gates, loss and penalty of each pick; one record when one decision picked them all.
        dropped_sublayers: the branches that went alone, in the order of picking. A layer that lost
            one may be dropped later, which takes the rest of it; never its other branch alone.

    Everything is checked and copied when a map is made, so a LayerMap that exists is sound.
    Raises:
        LayerMapError: anything is inconsistent.
    """

    base_model: BaseModel
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    removal_order: tuple[int, ...]
    layers: tuple[LayerEntry, ...]
    config_changes: tuple[ConfigChange, ...] = ()
    method: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    steps: tuple[dict[str, Any], ...] = ()
    dropped_sublayers: tuple[DroppedSublayer, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_version(self.schema_version)
        if not isinstance(self.base_model, BaseModel):
            raise LayerMapError(f"base_model is {brief(self.base_model)}, expected a BaseModel")
        num_layers = self.base_model.num_hidden_layers
        steps = enumerate(_records(self.steps, Mapping, "steps"))
        _set(
            self,
            kept=layer_indices(self.kept, "kept", num_layers),
            dropped=layer_indices(self.dropped, "dropped", num_layers),
            removal_order=layer_indices(self.removal_order, "removal_order", num_layers),
            layers=_records(self.layers, LayerEntry, "layers"),
            config_changes=_records(self.config_changes, ConfigChange, "config_changes"),
            dropped_sublayers=_records(
                self.dropped_sublayers, DroppedSublayer, "dropped_sublayers"
            ),
            method=_json_object(self.method, "method"),
            steps=tuple(_json_object(step, f"steps[{n}]") for n, step in steps),
        )
        if self.calibration is not None:
            _set(self, calibration=_json_object(self.calibration, "calibration"))
        _check_partition(self.kept, self.dropped, num_layers)
        if kept := sorted(set(self.removal_order) - set(self.dropped)):
            raise LayerMapError(f"removal_order names layer {kept[0]}, which is kept")
        if missing := sorted(set(self.dropped) - set(self.removal_order)):
            raise LayerMapError(f"removal_order lacks layer {missing[0]}, which is dropped")
        if len(self.layers) != len(self.kept):
            raise LayerMapError(f"layers has {len(self.layers)} entries, kept {len(self.kept)}")
        for layer, (entry, old) in enumerate(zip(self.layers, self.kept, strict=True)):
            if (entry.layer, entry.source_layer) != (layer, old):
                raise LayerMapError(
                    f"layers[{layer}] is layer {entry.layer} from source_layer "
                    f"{entry.source_layer}, expected layer {layer} from source_layer {old}"
                )
        _check_sublayers(self)

    @classmethod
    def from_removal_order(
        cls,
        base_model: BaseModel,
        removal_order: Iterable[SupportsIndex],
        *,
        gates: Sequence[float | None] | None = None,
        config_changes: Iterable[ConfigChange] = (),
        method: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        steps: Iterable[Mapping[str, Any]] = (),
    ) -> Self:
        """The map that drops these source layers, picked in this order.

        Args:
            gates: [L], one for each source layer; those of dropped layers are not recorded.
        Raises:
            LayerMapError: an index is repeated or does not exist, nothing is left, or `gates` has
                another length.
        """
        num_layers = base_model.num_hidden_layers
        order = layer_indices(removal_order, "removal_order", num_layers)
        gone = set(order)
        kept = tuple(layer for layer in range(num_layers) if layer not in gone)
        if gates is None:
            gates = [None] * num_layers
        if len(gates) != num_layers:
            raise LayerMapError(
                f"{len(gates)} gates for {num_layers} layers, expected one for each"
            )
        return cls(
            base_model=base_model,
            kept=kept,
            dropped=tuple(sorted(order)),
            removal_order=order,
            layers=tuple(LayerEntry(layer, old, gates[old]) for layer, old in enumerate(kept)),
            config_changes=tuple(config_changes),
            method=dict(method or {}),
            calibration=None if calibration is None else dict(calibration),
            steps=tuple(dict(step) for step in steps),
        )

    @classmethod
    def from_drop(
        cls, base_model: BaseModel, dropped: Iterable[SupportsIndex], **described: Any
    ) -> Self:
        """The map that drops these source layers; the order given is the removal order.

        `described`: the keywords of `from_removal_order`, which also names what is raised.
        """
        return cls.from_removal_order(base_model, dropped, **described)

    @classmethod
    def from_keep(
        cls, base_model: BaseModel, kept: Iterable[SupportsIndex], **described: Any
    ) -> Self:
        """The map that keeps these source layers, a set: they stay in the model's own order.

        Nothing tells in what order the others were picked, so the removal order ascends.
        `described`: the keywords of `from_removal_order`, which also names what is raised.
        """
        stays = set(layer_indices(kept, "kept", base_model.num_hidden_layers))
        order = [layer for layer in range(base_model.num_hidden_layers) if layer not in stays]
        return cls.from_removal_order(base_model, order, **described)

    @classmethod
    def from_removals(
        cls, base_model: BaseModel, removals: Iterable[Removal], **described: Any
    ) -> Self:
        """The map that drops these layers and single branches, picked in this order.

        The second branch of a layer is the removal of that layer: nothing of it is left.
        `described`: the keywords of `from_removal_order`, which also names what is raised.
        """
        order: list[int] = []
        lone: dict[int, DroppedSublayer] = {}
        for removal in removals:
            if not isinstance(removal, tuple) or len(removal) != 2:
                order.append(removal)  # whatever is no layer is refused with the order
                continue
            source_layer, sublayer = integer(removal[0], "removal"), removal[1]
            first = lone.get(source_layer)
            if first is None:
                lone[source_layer] = DroppedSublayer(source_layer, sublayer, len(order))
            elif first.sublayer == sublayer or sublayer not in SUBLAYERS:
                raise LayerMapError(f"the {sublayer} of layer {source_layer} is named twice")
            else:
                order.append(source_layer)
        return replace(
            cls.from_removal_order(base_model, order, **described),
            dropped_sublayers=tuple(lone.values()),
            schema_version=SUBLAYER_SCHEMA_VERSION if lone else SCHEMA_VERSION,
        )

    @property
    def removals(self) -> tuple[Removal, ...]:
        """Dropped layers and single branches together, in the order of picking."""
        merged: list[Removal] = list(self.removal_order)
        # From the last to the first, so that no insertion moves the place of another.
        for part in reversed(self.dropped_sublayers):
            merged.insert(part.num_layers_before, (part.source_layer, part.sublayer))
        return tuple(merged)

    @property
    def missing_branches(self) -> dict[int, str]:
        """The branch that a kept layer lacks, by source layer; layers that are whole are not in."""
        gone = set(self.dropped)
        parts = {part.source_layer: part.sublayer for part in self.dropped_sublayers}
        return {layer: parts[layer] for layer in sorted(parts) if layer not in gone}

    def require_whole_layers(self) -> None:
        """LayerMapError where a single branch goes: what cannot leave it out must say so."""
        if self.dropped_sublayers:
            part = self.dropped_sublayers[0]
            raise LayerMapError(
                f"the layer map drops the {part.sublayer} of layer {part.source_layer} and not the "
                "layer, which works on whole layers only; `trsp.pruner.sublayer_checkpoint` writes "
                "such a model for vLLM with the trsp plugin"
            )

    def prefix(self, num_removals: int) -> Self:
        """The map with only the first `num_removals` removals: 0 is the dense model, all is self.

        A layer that comes back has no gate (None); the others keep theirs, learned with every
        removal in place. `config_changes` is dropped: it told of the deeper cut, and compaction
        finds its own. Steps after the last removal are dropped where each removal has one.
        Raises:
            LayerMapError: not within 0 and the number of removals.
        """
        count = integer(num_removals, "number of removals")
        removals = self.removals
        if not 0 <= count <= len(removals):
            raise LayerMapError(f"{count} removals asked for, the layer map has {len(removals)}")
        if count == len(removals):
            return self
        gates: list[float | None] = [None] * self.base_model.num_hidden_layers
        for entry in self.layers:
            gates[entry.source_layer] = entry.gate
        one_each = len(self.steps) == len(removals)
        return self.from_removals(
            self.base_model,
            removals[:count],
            gates=gates,
            method=self.method,
            calibration=self.calibration,
            steps=self.steps[:count] if one_each else self.steps,
        )

    def with_base_model(self, base_model: BaseModel) -> Self:
        """The same choice for another model of the same depth, such as the one after transfer.

        Raises:
            LayerMapError: `base_model` has another number of layers.
        """
        ours, theirs = self.base_model.num_hidden_layers, base_model.num_hidden_layers
        if ours != theirs:
            raise LayerMapError(
                f"the layer map is for {ours} layers, {base_model.name!r} has {theirs}"
            )
        return replace(self, base_model=base_model)

    def to_json(self) -> str:
        """JSON text, one line for each field and record; `from_json` gives an equal map.

        Raises:
            LayerMapError: larger than a layer map may be (16 MiB): `steps` holds too much.
        """
        document = {
            "schema_version": self.schema_version,
            **_without_empty_later_fields(asdict(self)),
        }
        document["base_model"] = _without_empty_later_fields(document["base_model"])
        lines = []
        for name, value in document.items():
            if isinstance(value, tuple) and value and isinstance(value[0], dict):
                records = ",\n    ".join(json.dumps(record) for record in value)
                lines.append(f'  "{name}": [\n    {records}\n  ]')
            else:
                lines.append(f'  "{name}": {json.dumps(value)}')
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        if len(text) > MAX_BYTES:
            raise LayerMapError(
                f"the layer map takes {len(text)} bytes, at most {MAX_BYTES} may be written; "
                "record less in `steps`"
            )
        return text

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The map that `to_json` wrote.

        Raises:
            LayerMapError: too large, not JSON, an unknown schema_version, or inconsistent.
        """
        content = text.encode(errors="surrogatepass")
        if len(content) > MAX_BYTES:
            raise LayerMapError(f"layer map: is larger than {MAX_BYTES} bytes")
        try:
            parsed = parse_json_object(content, where="layer map", unique_keys=True)
        except UserError as error:
            raise LayerMapError(str(error)) from error
        _check_version(parsed.get("schema_version"))
        _check_keys(parsed, cls, "layer map")
        parsed["base_model"] = _parse_record(parsed["base_model"], BaseModel, "base_model")
        for name, kind in (
            ("layers", LayerEntry),
            ("config_changes", ConfigChange),
            ("dropped_sublayers", DroppedSublayer),
        ):
            if name in parsed:
                parsed[name] = _parse_records(parsed[name], kind, name)
        return cls(**parsed)


def read_layer_map(path: str | os.PathLike[str], *, sublayers: bool = False) -> LayerMap:
    """Read a layer map file.

    Args:
        sublayers: whether the caller leaves out single branches too. Else a map that drops one is
            refused, so nobody takes it for one that keeps the layer.
    Raises:
        LayerMapError: missing, unreadable, or not a sound layer map; the file is named.
    """
    content = read_text(path, MAX_BYTES)
    try:
        layer_map = LayerMap.from_json(content)
        if not sublayers:
            layer_map.require_whole_layers()
        return layer_map
    except LayerMapError as error:
        raise LayerMapError(f"{path}: {error}") from error


def write_layer_map(layer_map: LayerMap, path: str | os.PathLike[str]) -> None:
    """Write a layer map file, whole or not at all.

    Raises:
        LayerMapError: the map is too large.   RunError, OSError: see `durable.atomic_write`.
    """
    atomic_write(path, layer_map.to_json())


def read_text(path: str | os.PathLike[str], max_bytes: int) -> str:
    """A whole file.   LayerMapError: it cannot be read, is larger or not UTF-8; it is named."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise LayerMapError(
                f"{path}: is larger than {max_bytes} bytes, not a layer map or list"
            )
        return content.decode()
    except OSError as error:
        raise LayerMapError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LayerMapError(f"{path}: is not UTF-8 text ({error.reason})") from error


def _set(instance: Any, **values: Any) -> None:
    """Assign fields of a frozen dataclass, in its own `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def _check_version(version: Any) -> None:
    if isinstance(version, bool) or version not in (SCHEMA_VERSION, SUBLAYER_SCHEMA_VERSION):
        raise LayerMapError(
            f"schema_version is {brief(version)}, this trsp reads {SCHEMA_VERSION} and "
            f"{SUBLAYER_SCHEMA_VERSION}; "
            "install the version of trsp that wrote the layer map"
        )


def _check_partition(kept: tuple[int, ...], dropped: tuple[int, ...], num_layers: int) -> None:
    for name, indices in (("kept", kept), ("dropped", dropped)):
        for before, after in pairwise(indices):
            if after < before:
                raise LayerMapError(f"{name} must ascend: {after} follows {before}")
    if not kept:
        raise LayerMapError("every layer is dropped, at least one must be kept")
    if both := sorted(set(kept) & set(dropped)):
        raise LayerMapError(f"layer {both[0]} is both kept and dropped")
    if neither := sorted(set(range(num_layers)) - set(kept) - set(dropped)):
        raise LayerMapError(f"layer {neither[0]} is neither kept nor dropped")


def _check_sublayers(layer_map: LayerMap) -> None:
    """Each exists, none is named twice, their order is one, and none comes after its layer."""
    parts, order = layer_map.dropped_sublayers, layer_map.removal_order
    expected = SUBLAYER_SCHEMA_VERSION if parts else SCHEMA_VERSION
    if layer_map.schema_version != expected:
        raise LayerMapError(
            f"schema_version is {layer_map.schema_version}, expected {expected} for a map with "
            f"{len(parts)} dropped_sublayers"
        )
    try:
        layer_indices(
            (part.source_layer for part in parts),
            "dropped_sublayers",
            layer_map.base_model.num_hidden_layers,
        )
    except LayerMapError as error:
        raise LayerMapError(
            f"{error}; a layer without attention and mlp belongs in removal_order"
        ) from error
    last = 0
    for n, part in enumerate(parts):
        before = part.num_layers_before
        if not last <= before <= len(order):
            raise LayerMapError(
                f"dropped_sublayers[{n}].num_layers_before is {before}, "
                f"expected {last} to {len(order)}"
            )
        if part.source_layer in order[:before]:
            raise LayerMapError(
                f"dropped_sublayers[{n}] is of layer {part.source_layer}, which went before it"
            )
        last = before


def integer(value: Any, where: str) -> int:
    """A whole number, which True is not.   LayerMapError: it is none; says `where`."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise LayerMapError(f"{where} is {brief(value)}, expected an integer")


def layer_indices(values: Any, name: str, num_layers: int) -> tuple[int, ...]:
    """Source layers, each existing and named once.   LayerMapError: they are not; says `name`."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise LayerMapError(f"{name} is {brief(values)}, expected a list of layers")
    indices = tuple(integer(value, f"{name}[{n}]") for n, value in enumerate(values))
    seen = set()
    for index in indices:
        if not 0 <= index < num_layers:
            raise LayerMapError(f"{name} names layer {index}, but layers are 0 to {num_layers - 1}")
        if index in seen:
            raise LayerMapError(f"{name} names layer {index} twice")
        seen.add(index)
    return indices


def _records(values: Any, kind: type, name: str) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise LayerMapError(f"{name} is {brief(values)}, expected a list of records")
    for n, value in enumerate(values):
        if not isinstance(value, kind):
            raise LayerMapError(f"{name}[{n}] is {brief(value)}, expected a {kind.__name__}")
    return tuple(values)


def _check_keys(document: Mapping[str, Any], kind: type, where: str) -> None:
    names = {field.name for field in fields(kind)}
    if missing := sorted(names - _LATER_FIELDS - set(document)):
        raise LayerMapError(f"{where}: the field {missing[0]!r} is missing")
    if unknown := sorted(set(document) - names):
        raise LayerMapError(f"{where}: the field {brief(unknown[0])} is unknown")


def _without_empty_later_fields(record: dict[str, Any]) -> dict[str, Any]:
    """So that an older trsp reads a layer map that does not use them."""
    return {
        name: value
        for name, value in record.items()
        if value not in (None, ()) or name not in _LATER_FIELDS
    }


def _parse_record(document: Any, kind: type, where: str) -> Any:
    if not isinstance(document, dict):
        raise LayerMapError(f"{where} is {brief(document)}, expected an object")
    _check_keys(document, kind, where)
    try:
        return kind(**document)
    except LayerMapError as error:
        raise LayerMapError(f"{where}: {error}") from error


def _parse_records(documents: Any, kind: type, name: str) -> tuple[Any, ...]:
    return tuple(
        _parse_record(document, kind, f"{name}[{n}]")
        for n, document in enumerate(_records(documents, dict, name))
    )


def _json_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise LayerMapError(f"{where} is {brief(value)}, expected an object")
    document = _json_value(value, where)
    assert isinstance(document, dict)
    return document


def _json_value(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of a JSON value that comes back equal from JSON text: tuples become lists."""
    if depth > MAX_DEPTH:
        raise LayerMapError(f"{where}: is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise LayerMapError(f"{where}: holds half a surrogate pair, which is not text")
        return str(value)
    if isinstance(value, int):
        if abs(value) >= 2**64:
            raise LayerMapError(f"{where}: holds an integer beyond 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise LayerMapError(f"{where}: holds {value}, which JSON cannot")
        return float(value)
    if isinstance(value, list | tuple):
        return [_json_value(item, f"{where}[{n}]", depth + 1) for n, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise LayerMapError(f"{where}: has the key {brief(key)}, expected text")
        return {
            _json_value(key, where): _json_value(item, f"{where}.{_one_line(key)}", depth + 1)
            for key, item in value.items()
        }
    raise LayerMapError(f"{where}: holds {type(value).__name__}, which is not JSON")


def _one_line(key: str) -> str:
    return key if key.isprintable() else brief(key)
