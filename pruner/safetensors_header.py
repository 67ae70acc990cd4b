"""The head of a safetensors file: which tensor lies where. Read without torch, trusted in nothing.

    8 bytes   length of the JSON header, little-endian
    header    {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}, padded with spaces
    data      the tensors, without gap or overlap; offsets count from here

Source: the format section of safetensors' README; the same files are refused as there, and a few
that no writer produces.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsp.pruner.bounded_json import parse_json_object
from trsp.pruner.errors import UserError

# safetensors itself stops at 100 MB; 250,000 tensors in one file take about 30 MB.
MAX_HEADER_BYTES = 64 * 2**20
MAX_RANK = 64
ALIGNMENT = 8

BITS_BY_DTYPE = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8},
    **{"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32},
    **{"I64": 64, "U64": 64, "F64": 64, "C64": 64},
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor: bytes [begin, end) of the file `shard`, counted from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name in the folder, its size in bytes, its free-text metadata."""

    name: str
    size: int
    metadata: Mapping[str, str]


def read_header(path: Path, shard: str) -> tuple[Shard, list[TensorEntry]]:
    """Read and check the head of the safetensors file at `path`, known as `shard` in its folder.

    Returns:
        the file, and its tensors in the order of their bytes.
    Raises:
        UserError: not a safetensors file, or a damaged or truncated one; the text names `path`.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{path}: is truncated or not a safetensors file; fetch it again")
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{path}: its header of {length} bytes is over {MAX_HEADER_BYTES}")
            content = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    data_begin = 8 + length
    document = parse_json_object(content, where=f"{path}: its header", unique_keys=True)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise UserError(f"{path}: its __metadata__ is not text by name; the file is damaged")
    entries = [_entry(path, shard, name, document[name], data_begin) for name in document]
    # An empty tensor shares its begin with the next one and sorts before it.
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = data_begin
    for entry in entries:
        if entry.begin != position:
            raise UserError(
                f"{path}: tensor {entry.name!r} overlaps another or leaves a gap; "
                "the file is damaged, fetch it again"
            )
        position = entry.end
    if position != size:
        state = "truncated" if size < position else "followed by bytes of no tensor"
        raise UserError(
            f"{path}: is {state}: its header describes {position} bytes and it has {size}; "
            "fetch it again"
        )
    return Shard(shard, size, metadata), entries


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """Write the head of a safetensors file: length and header, padded so that data is aligned.

    Args:
        tensors: name, dtype, shape and number of bytes of each, in the order of their data.
        metadata: free text by name; transformers wants {"format": "pt"}.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape, num_bytes in tensors:
        end = position + num_bytes
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    content = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % ALIGNMENT)
    return len(content).to_bytes(8, "little") + content


def _entry(path: Path, shard: str, name: str, value: Any, data_begin: int) -> TensorEntry:
    """Check one tensor's description apart from its neighbours."""
    damage = UserError(f"{path}: the header entry of tensor {name!r} is damaged; fetch it again")
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **others}:
            numbers = (*shape, begin, end)
        case _:
            raise damage
    in_range = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    if others or not in_range or len(shape) > MAX_RANK:
        raise damage
    if dtype not in BITS_BY_DTYPE:
        raise UserError(
            f"{path}: tensor {name!r} has dtype {dtype[:40]!r}, "
            f"expected one of {', '.join(BITS_BY_DTYPE)}"
        )
    if math.prod(shape) * BITS_BY_DTYPE[dtype] != (end - begin) * 8:
        raise damage
    try:
        name.encode()
    except UnicodeEncodeError:
        raise damage from None
    return TensorEntry(name, dtype, tuple(shape), shard, data_begin + begin, data_begin + end)
