"""Documents from local files: plain text, JSON lines, JSON and Parquet, also under .xz and .gz.

A plain text file is one document; in the other formats each row is one. The standard library
reads all but Parquet (pyarrow), rather than `datasets`: an error then names the file and the byte
or row (datasets counts bytes from a place inside the file and fills absent fields with null), and
nothing is written to a cache.
"""

import codecs
import gzip
import hashlib
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trsp.pruner.errors import UserError
from trsp.pruner.progress import Progress, silent

_COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_BROKEN_COMPRESSION = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
_CHUNK_BYTES = 1 << 20


class TextError(UserError):
    """Text that cannot be read; names the file and, where it applies, the byte or row."""


@dataclass(frozen=True)
class Fragment:
    """A stretch of one document: documents larger than about 1 MB come in several."""

    text: str
    ends_document: bool


def read_texts(
    paths: Sequence[str | Path], text_field: str = "text", *, progress: Progress = silent
) -> Iterator[str]:
    """Yield the documents of files and folders, in the order of `paths`, a folder's sorted by name.

    Args:
        paths: .txt, .jsonl, .json and .parquet files, also with .xz or .gz behind; or folders,
            searched to the bottom except for hidden files.
        text_field: the field of a row that holds its text.
        progress: task "reading text", in bytes of the files as they are on disk.
    Raises:
        TextError: a path is missing, a folder is empty, an extension is unknown, a file is broken
            or not UTF-8, or a row has no such field.
    """
    parts: list[str] = []
    for fragment in read_fragments(paths, text_field, progress=progress):
        parts.append(fragment.text)
        if fragment.ends_document:
            yield "".join(parts)
            parts = []


def read_fragments(
    paths: Sequence[str | Path], text_field: str = "text", *, progress: Progress = silent
) -> Iterator[Fragment]:
    """Yield what read_texts yields, in fragments: memory stays small however large a document is.

    Arguments and errors are those of read_texts.
    """
    files = find_files(paths)
    total = sum(path.stat().st_size for path in files)
    before = 0
    for path in files:
        size = path.stat().st_size
        try:
            for fragment, done in _read_file(path, size, text_field):
                progress("reading text", before + min(done, size), total)
                yield fragment
        except _BROKEN_COMPRESSION as error:
            raise TextError(f"{path}: the compressed data is broken: {error}") from error
        except OSError as error:
            raise TextError(f"{path}: cannot be read: {error.strerror or error}") from error
        before += size
    progress("reading text", total, total)


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that `paths` name, folders opened up and sorted; each has a known extension.

    Raises:
        TextError: a path is missing, a folder has no file, or an extension is unknown.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not inside:
                raise TextError(f"{path}: the folder holds no files; give text files")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise TextError(f"{path}: does not exist; give a text file or a folder of them")
    for path in found:
        if _format(path) not in _READERS:
            raise TextError(
                f"{path}: its extension is not one of {', '.join(_READERS)} (also with .xz or .gz"
                " behind); convert it, or name the files of a folder one by one"
            )
    return found


def unpacked_blocks(path: Path, block_bytes: int = _CHUNK_BYTES) -> Generator[bytes]:
    """Yield the bytes of one file as they are without compression, block by block.

    Raises:
        TextError: the file is broken or cannot be read.
    """
    try:
        with path.open("rb") as raw:
            compression = _COMPRESSIONS.get(path.suffix)
            with compression(raw) if compression else raw as file:
                while block := file.read(block_bytes):
                    yield block
    except _BROKEN_COMPRESSION as error:
        raise TextError(f"{path}: the compressed data is broken: {error}") from error
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror or error}") from error


def hash_text_file(path: Path) -> str:
    """sha256 (hex) of a file as it lies on disk; of a folder, over its files' names and hashes.

    Raises:
        TextError: as find_files, or the file cannot be read.
    """
    files = find_files([path])
    if path.is_dir():
        lines = (f"{hash_text_file(file)}  {file.relative_to(path)}\n" for file in files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror or error}") from error


def is_read_as_bytes(path: Path) -> bool:
    """Whether equal text means equal unpacked bytes: in all formats but Parquet."""
    return _format(path) != ".parquet"


def _read_file(path: Path, size: int, text_field: str) -> Iterator[tuple[Fragment, int]]:
    """Fragments of one file, each with how far into it (in bytes on disk) reading has come."""
    read = _READERS[_format(path)]
    with path.open("rb") as raw:
        compression = _COMPRESSIONS.get(path.suffix)
        with compression(raw) if compression else raw as file:
            for fragment in read(file, path, text_field):
                yield fragment, raw.tell()


def _read_text(file: IO[bytes], path: Path, text_field: str) -> Iterator[Fragment]:
    pending, offset = b"", 0
    while chunk := file.read(_CHUNK_BYTES):
        pending += chunk
        text, used = _decode(pending, path, offset, final=False)
        pending, offset = pending[used:], offset + used
        yield Fragment(text, ends_document=False)
    yield Fragment(_decode(pending, path, offset, final=True)[0], ends_document=True)


def _read_json(file: IO[bytes], path: Path, text_field: str) -> Iterator[Fragment]:
    """A JSON array of rows, or JSON lines under the name .json, as large corpora have it."""
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    if start != b"[":
        yield from _read_json_lines(file, path, text_field)
        return
    text, _ = _decode(file.read(), path, 0, final=True)
    for number, row in enumerate(_parse(text, str(path)), start=1):
        yield _row_text(row, f"{path}, row {number}", text_field)


def _read_json_lines(file: IO[bytes], path: Path, text_field: str) -> Iterator[Fragment]:
    offset = 0
    for number, line in enumerate(file, start=1):
        text, _ = _decode(line, path, offset, final=True)
        offset += len(line)
        if not text.isspace():
            where = f"{path}, line {number}"
            yield _row_text(_parse(text, where), where, text_field)


def _read_parquet(file: IO[bytes], path: Path, text_field: str) -> Iterator[Fragment]:
    import pyarrow
    from pyarrow import parquet

    with _seekable(file, path) as seekable:
        try:
            table = parquet.ParquetFile(seekable)
            names = table.schema_arrow.names
            if text_field not in names:
                raise _no_field(str(path), text_field, names)
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield _row_text({text_field: text}, f"{path}, row {number}", text_field)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise TextError(f"{path}: is not a readable Parquet file: {_line(error)}") from error


_READERS = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _format(path: Path) -> str:
    suffix = path.suffix
    return Path(path.stem).suffix if suffix in _COMPRESSIONS else suffix


@contextmanager
def _seekable(file: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """Parquet is read from its end: a compressed file is unpacked into a temporary one first."""
    if path.suffix not in _COMPRESSIONS:
        yield file
        return
    with tempfile.TemporaryFile() as unpacked:
        shutil.copyfileobj(file, unpacked, _CHUNK_BYTES)
        unpacked.seek(0)
        yield unpacked


def _decode(data: bytes, path: Path, offset: int, *, final: bool) -> tuple[str, int]:
    """Decode UTF-8 that starts `offset` bytes into the (unpacked) file; text and bytes used."""
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path}: is not UTF-8: byte 0x{data[error.start]:02x} at offset"
            f" {offset + error.start}; convert the file to UTF-8"
        ) from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TextError(f"{where}: is not JSON: {_line(error)}") from error
    except RecursionError as error:
        raise TextError(f"{where}: the JSON is nested too deeply to be text data") from error


def _row_text(row: Any, where: str, text_field: str) -> Fragment:
    if not isinstance(row, dict):
        raise TextError(
            f"{where}: a row is an object with the field {text_field!r}, not {type(row).__name__}"
        )
    if text_field not in row:
        raise _no_field(where, text_field, row)
    text = row[text_field]
    if not isinstance(text, str):
        raise TextError(f"{where}: the field {text_field!r} is not text but {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"{where}: the text has half a surrogate pair at character {error.start}"
        ) from error
    return Fragment(text, ends_document=True)


def _no_field(where: str, text_field: str, names: Iterable[str]) -> TextError:
    return TextError(
        f"{where}: there is no field {text_field!r}; the fields are {', '.join(map(repr, names))}:"
        " name the one with the text (--set calibration.text_field=NAME)"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
