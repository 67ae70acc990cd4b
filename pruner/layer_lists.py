"""Layer maps in the words of other tools: mergekit, llama.cpp, and plain lists of layers."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as brief

from trsp.pruner.layer_map import (
    MAX_BYTES,
    MAX_LAYERS,
    BaseModel,
    LayerMap,
    LayerMapError,
    integer,
    layer_indices,
    read_text,
)


def to_mergekit_slices(
    layer_map: LayerMap, *, model: str | None = None, dtype: str | None = None
) -> str:
    """A mergekit configuration (YAML) that keeps the same layers by a passthrough merge.

    mergekit's `layer_range: [a, b]` leaves b out. It adjusts the layer count in config.json, for
    families that it knows, and nothing else: a model with `layer_types` needs `trsp compact`
    (bench/interop_mergekit.py has what becomes of each family).

    Args:
        model: folder or hub name to write instead of the base model's name.
        dtype: mergekit's name of the type to write, such as bfloat16; None leaves each as it is.
    Raises:
        LayerMapError: a branch of a layer goes alone.
    """
    layer_map.require_whole_layers()
    name = layer_map.base_model.name if model is None else model
    # Outside a mapping mergekit splits a model at + (adapter) and @ (revision).
    source = f"model: {_yaml_text(name)}"
    if set(name) & set("+@"):
        source = f"model: {{model: {{path: {_yaml_text(name)}}}}}"
    lines = ["slices:"]
    for begin, end in _runs(layer_map.kept):
        lines += ["  - sources:", f"      - {source}", f"        layer_range: [{begin}, {end}]"]
    lines.append("merge_method: passthrough")
    if dtype is not None:
        lines.append(f"dtype: {_yaml_text(dtype)}")
    return "\n".join(lines) + "\n"


def to_llama_cpp(layer_map: LayerMap) -> str:
    """The value of `llama-quantize --prune-layers`: the dropped layers, as in `3,7,9`.

    llama.cpp renumbers the rest but leaves per-layer metadata arrays as long as they were
    (llama.cpp#27976), so convert the compacted checkpoint instead where the model has any.
    Raises:
        LayerMapError: nothing is dropped, which llama-quantize refuses, or a branch goes alone.
    """
    layer_map.require_whole_layers()
    if not layer_map.dropped:
        raise LayerMapError("the layer map drops no layer: run llama-quantize without the option")
    return ",".join(map(str, layer_map.dropped))


def parse_layer_list(text: str) -> tuple[int, ...]:
    """Layers named in text, in the order given: `0-3,7` is 0, 1, 2, 3, 7; a JSON list does too.

    Commas and line ends separate; a range includes its end; blank lines are skipped.
    Raises:
        LayerMapError: nothing named, a layer named twice, or an item that is neither.
    """
    if text.lstrip().startswith("["):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LayerMapError(f"layer list: is not a JSON list: {error}") from error
        layers = [integer(item, f"layer list: item {n}") for n, item in enumerate(parsed)]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        layers = []
        for item in (item for line in lines for item in line.split(",")):
            layers += _range(item)
            # A short text could name more ranges than memory holds.
            if len(layers) > MAX_LAYERS:
                raise LayerMapError(f"layer list: names more than {MAX_LAYERS} layers")
    if not layers:
        raise LayerMapError("layer list: names no layer; write for example 0-3,7")
    return layer_indices(layers, "layer list", MAX_LAYERS)


def import_keep_list(path: str | os.PathLike[str], base_model: BaseModel) -> LayerMap:
    """The map that keeps the layers a file lists (see `parse_layer_list`).

    Raises:
        LayerMapError: the file cannot be read or names layers that cannot be kept; it is named.
    """
    return _import_list(path, base_model, LayerMap.from_keep, "keep list")


def import_drop_list(path: str | os.PathLike[str], base_model: BaseModel) -> LayerMap:
    """The map that drops the layers a file lists, in that order (see `parse_layer_list`).

    Raises:
        LayerMapError: the file cannot be read or names layers that cannot go; it is named.
    """
    return _import_list(path, base_model, LayerMap.from_drop, "drop list")


def _import_list(
    path: str | os.PathLike[str],
    base_model: BaseModel,
    make: Callable[..., LayerMap],
    kind: str,
) -> LayerMap:
    text = read_text(path, MAX_BYTES)
    method = {"name": kind, "source": Path(path).name}
    try:
        return make(base_model, parse_layer_list(text), method=method)
    except LayerMapError as error:
        raise LayerMapError(f"{path}: {error}") from error


def _range(item: str) -> range:
    match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", item.strip())
    if match is None:
        raise LayerMapError(
            f"layer list: {brief(item.strip())} is neither a layer nor a range; write 7 or 0-3"
        )
    begin, end = int(match[1]), int(match[2] or match[1])
    if end < begin or end >= MAX_LAYERS:
        limit = f"0 to {MAX_LAYERS - 1}"
        raise LayerMapError(f"layer list: {item.strip()} must ascend within {limit}")
    return range(begin, end + 1)


def _runs(kept: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs of consecutive layers, each [begin, end)."""
    runs: list[tuple[int, int]] = []
    for layer in kept:
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs


def _yaml_text(text: str) -> str:
    """A double-quoted YAML scalar: JSON's, with what YAML does not take as printable escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda c: f"\\u{ord(c[0]):04x}", quoted
    )
