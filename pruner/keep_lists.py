"""Layer maps from what other tools write about the layers that they keep or drop.

What is read, and where its form was looked up:

    mergekit    `slices` of a passthrough merge (mergekit_slices.py). PruneMe makes its models from
                such a file (arcee-ai/PruneMe, slice_with_mergekit/slice.yaml).
    PruneMe     layer_distances.csv (compute_block_similarity/layer_similarity.py). A row compares
                the outputs of layers i and i + n, counted from 0, and says `block_start` i + 1 and
                `block_end` i + 1 + n: layers block_start to block_end - 1 lie between. The row of
                the smallest distance is dropped.
    SLEB        the result file and the log of sleb.py (jiwonsong-dev/SLEB): the line
                `Block Removal Order: [...]`, indices of the unpruned model in the order of picking.
    EvoPress    layer_drop_config.txt (IST-DASLab/EvoPress, evo_drop_search.py): a line a block,
                `none`, `attn`, `mlp` or `attn+mlp`, what is dropped of it.
    plain       `21,22,23`, `0-20,24-31`, a JSON list, a line each: ShortGPT's printed lists, SLEB's
                `--removal_list`, llama.cpp's `--prune-layers` (tools/quantize/quantize.cpp, which
                knows no ranges). Such a list does not tell whether it keeps or drops.

No two of these can be taken for each other, so the form is told from the content.
"""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Literal

from trsp.pruner.layer_lists import parse_layer_list
from trsp.pruner.layer_map import BaseModel, LayerMap, LayerMapError, read_text
from trsp.pruner.mergekit_slices import read_slices

Listed = Literal["keep", "drop"]

# A log of SLEB on 80 layers is about 200 kB.
MAX_BYTES = 4 * 2**20

_CSV_FIELDS = ["block_start", "block_end", "average_distance"]
_DROPPED_OF_A_BLOCK = {"none", "attn", "mlp", "attn+mlp"}
_SLEB_ORDER = re.compile(r"^[ \t]*Block Removal Order: (.*)$", re.MULTILINE)
_SLEB_TOTAL = re.compile(r"^[ \t]*# Total Blocks: ([0-9]{1,6})[ \t\r]*$", re.MULTILINE)
_YAML_SLICES = re.compile(r"^(slices|models|modules|merge_method)\s*:", re.MULTILINE)


def read_keep_list(
    path: str | os.PathLike[str], base_model: BaseModel, *, listed: Listed | None = None
) -> LayerMap:
    """The layer map that a file of another tool describes (the forms are above).

    `method` of the map has the form, the file's name and what the file says of its model. The
    order of removal is the file's where it has one (SLEB, plain lists of dropped layers).

    Args:
        base_model: the unpruned model; its number of layers is checked against the file.
        listed: whether a plain list names the layers to keep or to drop; None for other forms.
    Raises:
        LayerMapError: the file cannot be read, is of no known form, needs `listed` or does not
            take it, drops parts of layers, is no pure depth pruning, or does not fit the model.
    """
    text = read_text(path, MAX_BYTES)
    try:
        name, read = _form_of(text)
        verb, layers, said = read(text, base_model.num_hidden_layers)
        if name == "plain" and listed is None:
            raise LayerMapError(
                "a plain list does not tell whether its layers are kept or dropped; "
                "say --list keep or --list drop"
            )
        if name != "plain" and listed is not None:
            raise LayerMapError(f"is {name}'s, which tells what is dropped; leave out --list")
        method = {"name": f"{name} list", "source": Path(path).name, **said}
        make = LayerMap.from_keep if (listed or verb) == "keep" else LayerMap.from_drop
        return make(base_model, layers, method=method)
    except LayerMapError as error:
        raise LayerMapError(f"{path}: {error}") from error


_Read = tuple[Listed, list[int], dict[str, Any]]


def _form_of(text: str) -> tuple[str, Callable[[str, int], _Read]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise LayerMapError("is empty, expected a list of layers")
    if [field.strip() for field in lines[0].split(",")] == _CSV_FIELDS:
        return "PruneMe", _read_pruneme
    if _SLEB_ORDER.search(text) or "Current Block Removal List:" in text:
        return "SLEB", _read_sleb
    if set(lines) <= _DROPPED_OF_A_BLOCK:
        return "EvoPress", _read_evopress
    if _YAML_SLICES.search(text):
        return "mergekit", _read_mergekit
    return "plain", _read_plain


def _read_plain(text: str, num_layers: int) -> _Read:
    return "keep", list(parse_layer_list(text)), {}


def _read_mergekit(text: str, num_layers: int) -> _Read:
    layers, said = read_slices(text, num_layers)
    return "keep", layers, said


def _read_pruneme(text: str, num_layers: int) -> _Read:
    rows = []
    lines = [line.split(",") for line in text.splitlines() if line.strip()]
    for number, row in enumerate(lines[1:], start=2):
        try:
            begin, end, distance = int(row[0]), int(row[1]), float(row[2])
        except (ValueError, IndexError) as error:
            raise LayerMapError(
                f"line {number}: {brief(','.join(row))} is not start,end,distance"
            ) from error
        if len(row) != 3 or not math.isfinite(distance):
            raise LayerMapError(f"line {number}: {brief(','.join(row))} has no finite distance")
        rows.append((begin, end, distance))
    if not rows:
        raise LayerMapError("has no rows; run PruneMe's layer_similarity.py to its end")
    size = rows[0][1] - rows[0][0]
    expected = [(start, start + size) for start in range(1, len(rows) + 1)]
    if size < 1 or [(begin, end) for begin, end, _ in rows] != expected:
        raise LayerMapError(
            "its blocks are not those of one length, one for each start from 1; "
            "give layer_distances.csv as PruneMe wrote it"
        )
    if len(rows) + size != num_layers:
        raise LayerMapError(
            f"{len(rows)} blocks of {size} layers are of a model of {len(rows) + size} layers, "
            f"and this one has {num_layers}"
        )
    begin, end, distance = min(rows, key=lambda row: row[2])
    said = {"average_distance": distance, "block_start": begin, "block_end": end}
    return "drop", list(range(begin, end)), said


def _read_sleb(text: str, num_layers: int) -> _Read:
    orders = {found.strip() for found in _SLEB_ORDER.findall(text)}
    if not orders:
        raise LayerMapError("is the log of a run of SLEB that did not end: no Block Removal Order")
    if len(orders) > 1:
        raise LayerMapError(
            f"holds {len(orders)} different runs of SLEB, which appends to its result file; "
            "keep the lines of one"
        )
    if wrong := sorted(set(map(int, _SLEB_TOTAL.findall(text))) - {num_layers}):
        raise LayerMapError(f"is of a model of {wrong[0]} blocks, and this one has {num_layers}")
    (order,) = orders
    try:
        layers = json.loads(order)
    except (ValueError, RecursionError) as error:
        raise LayerMapError(f"Block Removal Order is {brief(order)}, not a list") from error
    if not isinstance(layers, list):
        raise LayerMapError(f"Block Removal Order is {brief(order)}, not a list")
    return "drop", layers, {}


def _read_evopress(text: str, num_layers: int) -> _Read:
    blocks = [line.strip() for line in text.splitlines() if line.strip()]
    if len(blocks) != num_layers:
        hint = ""
        if 2 * len(blocks) == num_layers:
            hint = "; a search with --drop_two_consecutive writes a line for two blocks"
        raise LayerMapError(f"has {len(blocks)} lines for {num_layers} layers{hint}")
    parts = [f"{layer} ({part})" for layer, part in enumerate(blocks) if part in ("attn", "mlp")]
    if parts:
        raise LayerMapError(
            f"drops a part of layers {', '.join(parts)}: removing attention or MLP alone is not "
            "supported; search with EvoPress's --drop_entire_block"
        )
    return "drop", [layer for layer, part in enumerate(blocks) if part == "attn+mlp"], {}
