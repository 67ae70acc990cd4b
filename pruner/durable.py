"""Writing that survives a kill, a power loss and a full disk: seen whole or not at all.

A folder is committed in this order: write into NAME.tmp-<pid>/ beside it, fsync every file, write
manifest.json (sha256 and size of each file), fsync, rename to NAME, fsync the parent.
NAME.lock lets one process at a time do so. Whoever holds it knows that every other NAME.tmp-* was
left by a dead run, which a pid cannot tell: containers that share a disk do not share pids.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.progress import Progress, silent

MANIFEST_NAME = "manifest.json"
MANIFEST_SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 16 * 2**20

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# Lock file -> (process and thread that hold it, how many times it entered).
_held_locks: dict[Path, tuple[tuple[int, int], int]] = {}


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file: sha256 as 64 hex digits, size in bytes."""

    sha256: str
    size: int


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace the file at `path` by `data` (text as UTF-8): readers see the old or the new whole.

    The folder must exist. The bytes are on the disk when this returns.
    Raises:
        RunError: the disk is full; the old file is intact.   OSError: any other failure, likewise.
    """
    path = _absolute(path)
    content = data.encode() if isinstance(data, str) else data
    temp = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temp.unlink(missing_ok=True)
    try:
        with _full_disk_explained(path, len(content)), temp.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temp.rename(path)
        _fsync(path.parent)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


@contextmanager
def publish_folder(
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    num_bytes: int = 0,
    digests: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """Give a temporary folder to fill; when the block ends well, it becomes `out` in one rename.

    An exception in the block removes the temporary folder, and `out` is as it was before.

    Args:
        out: the folder to publish; its parents are made when missing.
        overwrite: replace an existing `out` as a whole, so that no stale file remains in it.
        num_bytes: what the block is about to write, checked against the free space first.
        digests: sha256 (hex) by file name relative to the folder, for files hashed while they were
            written; may be filled during the block. All other files are read once more and hashed.
    Yields:
        the temporary folder, NAME.tmp-<pid> beside `out`.
    Raises:
        UserError: `out` exists, cannot be made, or another run is writing it.
        RunError: the disk is or becomes full.
    """
    out = _absolute(out)
    with run_lock(out):
        sweep_leftovers(out)
        refuse_existing(out, overwrite=overwrite)
        require_free_space(out, num_bytes)
        temp = out.with_name(f"{out.name}.tmp-{os.getpid()}")
        temp.mkdir()
        try:
            with _full_disk_explained(out, num_bytes):
                yield temp
                for file in _files_of(temp):
                    _fsync(file)
                write_manifest(temp, digests)
                for folder in [temp, *(path for path in temp.rglob("*") if path.is_dir())]:
                    _fsync(folder)
            # Once more: something may have taken the name while the block ran.
            refuse_existing(out, overwrite=overwrite)
            _swap_in(temp, out)
        except BaseException:
            # What resists removal here is swept by the next run; this error is the one to show.
            shutil.rmtree(temp, ignore_errors=True)
            raise


def refuse_existing(out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Check that `out` may be published, before hours of work rather than after.

    Raises:
        UserError: `out` exists without `overwrite`; or, with it, replacing `out` would delete more
            than a model: a file, a folder that holds neither manifest.json nor config.json, or
            the folder this process works in.
    """
    out = _absolute(out)
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UserError(f"{out}: already exists; choose another folder or pass --overwrite")
    if not out.is_dir():
        raise UserError(f"{out}: is not a folder; remove it or choose another output folder")
    if Path.cwd().is_relative_to(out.resolve()):
        raise UserError(f"{out}: holds the working folder; run from elsewhere to overwrite it")
    names = {path.name for path in out.iterdir()}
    if names and names.isdisjoint({MANIFEST_NAME, "config.json"}):
        raise UserError(
            f"{out}: --overwrite replaces model folders only, and this one holds {min(names)!r} "
            "but no manifest.json or config.json; remove it yourself or choose another folder"
        )


def sweep_leftovers(out: str | os.PathLike[str]) -> list[Path]:
    """Clear what killed runs left beside `out`, a file or a folder; call it before a run starts.

    Removes NAME.tmp-*. When a kill struck between the two renames of an overwrite, so that `out` is
    missing, the folder that had been moved aside is moved back.
    Returns:
        the paths removed.
    Raises:
        UserError: another run is writing `out`.
    """
    out = _absolute(out)
    with run_lock(out):
        for old in _leftovers(out, "old"):
            if os.path.lexists(out):
                old.rename(out.with_name(f"{out.name}.tmp-{old.name.rpartition('-')[2]}-old"))
            else:
                old.rename(out)
            _fsync(out.parent)
        removed = _leftovers(out, "tmp")
        for leftover in removed:
            _remove(leftover)
        return removed


@contextmanager
def run_lock(out: str | os.PathLike[str]) -> Iterator[None]:
    """Hold NAME.lock beside `out` against every other process and thread, until the block ends.

    The kernel releases the lock when its holder dies, however it dies. The holding thread may enter
    again, so a run that holds its output folder can publish it.
    Raises:
        UserError: another run holds it, or the parent folder cannot be made or written.
    """
    out = _absolute(out)
    path = out.with_name(f"{out.name}.lock")
    owner = (os.getpid(), threading.get_ident())
    holder, depth = _held_locks.get(path, (owner, 0))
    if holder == owner and depth:
        _held_locks[path] = (owner, depth + 1)
        try:
            yield
        finally:
            _held_locks[path] = (owner, depth)
        return
    descriptor = _acquire(path)
    _held_locks[path] = (owner, 1)
    try:
        yield
    finally:
        del _held_locks[path]
        # Removed while still held, so nobody can be locking the file that goes.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def require_free_space(path: str | os.PathLike[str], num_bytes: int) -> None:
    """Check that the disk that holds `path`, or will, has `num_bytes` free.

    Raises:
        RunError: it has less; the text names the bytes needed and free.
    """
    free = _free_bytes(_absolute(path))
    if num_bytes > free:
        raise RunError(
            f"{path}: not enough disk space, {format_bytes(num_bytes)} needed and "
            f"{format_bytes(free)} free; free some or choose an output folder on another disk"
        )


def write_manifest(
    folder: str | os.PathLike[str], digests: Mapping[str, str] | None = None
) -> dict[str, FileRecord]:
    """Write manifest.json over every file in `folder` and below, atomically; return what it says.

    Args:
        digests: sha256 (hex) by relative name, for files whose hash is known already.
    Raises:
        ValueError: the folder holds a link or a special file, or `digests` names no file of it.
    """
    folder = _absolute(folder)
    known = dict(digests or {})
    records = {}
    for file in _files_of(folder):
        name = file.relative_to(folder).as_posix()
        if name != MANIFEST_NAME:
            records[name] = FileRecord(known.pop(name, "") or _sha256(file), file.stat().st_size)
    if known:
        raise ValueError(f"digests name {min(known)!r}, which is not in {folder}")
    document = {
        "schema_version": MANIFEST_SCHEMA_VERSION,
        "files": {
            name: {"sha256": record.sha256, "size": record.size} for name, record in records.items()
        },
    }
    atomic_write(folder / MANIFEST_NAME, json.dumps(document, indent=2) + "\n")
    return records


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, FileRecord]:
    """Read manifest.json: a FileRecord by file name relative to `folder`, with forward slashes.

    Raises:
        UserError: the manifest is missing, damaged, of another version, or names a path that could
            lie outside the folder.
    """
    path = _absolute(folder) / MANIFEST_NAME
    document = read_json_object(path, max_bytes=MAX_MANIFEST_BYTES)
    if (version := document.get("schema_version")) != MANIFEST_SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version is {version!r}, expected {MANIFEST_SCHEMA_VERSION}; "
            "it was written by another program or a newer trsp"
        )
    files = document.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{path}: 'files' is missing or no object; the manifest is damaged")
    records = {}
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or "\\" in name or "\0" in name:
            raise UserError(f"{path}: {name!r} is not a file name inside the folder")
        match entry:
            case {"sha256": str(sha256), "size": int(size)} if re.fullmatch("[0-9a-f]{64}", sha256):
                records[name] = FileRecord(sha256, size)
            case _:
                raise UserError(f"{path}: the entry of {name!r} is damaged")
    return records


def verify_manifest(
    folder: str | os.PathLike[str],
    *,
    names: Collection[str] | None = None,
    progress: Progress = silent,
) -> None:
    """Check every byte of `folder` against its manifest; nothing may be missing, changed or added.

    Hidden entries at the top (.git, the hub's .cache) are nobody's weights and are left alone.
    Args:
        names: check these files only, those of them that the manifest lists.
    Raises:
        UserError: names the first file that is missing, truncated, changed or unlisted.
    """
    folder = _absolute(folder)
    listed = read_manifest(folder)
    records = {name: record for name, record in listed.items() if names is None or name in names}
    # Sizes first: a truncated shard is found without reading the others.
    for name, record in records.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: is missing, and {MANIFEST_NAME} lists it; restore the file")
        if (size := file.stat().st_size) != record.size:
            raise UserError(
                f"{file}: has {size} bytes where {MANIFEST_NAME} says {record.size}; the file was "
                "truncated or changed after it was written, restore it"
            )
    for path in sorted(folder.rglob("*")) if names is None else ():
        name = path.relative_to(folder).as_posix()
        known = name in listed or name == MANIFEST_NAME or path.is_dir()
        if not known and not name.startswith("."):
            raise UserError(f"{path}: is not listed in {MANIFEST_NAME}; remove the file")
    total = sum(record.size for record in records.values())
    completed = 0
    for name, record in records.items():
        progress("verify files", completed, total)
        if _sha256(folder / name) != record.sha256:
            raise UserError(
                f"{folder / name}: its sha256 is not the one in {MANIFEST_NAME}; the file was "
                "damaged or changed after it was written, restore it"
            )
        completed += record.size
    progress("verify files", total, total)


def format_bytes(num_bytes: int) -> str:
    """Write a number of bytes for people: 12.3 MB and the like, in powers of 1000."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{num_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _swap_in(temp: Path, out: Path) -> None:
    """Rename `temp` to `out`; what stood there is moved aside first and removed last."""
    if not os.path.lexists(out):
        temp.rename(out)
        _fsync(out.parent)
        return
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    out.rename(old)
    try:
        temp.rename(out)
    except BaseException:
        old.rename(out)
        raise
    # Under this name a sweep will never move it back, not even when half of it is gone.
    old.rename(temp)
    _fsync(out.parent)
    # The new folder is in place; what resists removal is swept by the next run.
    with suppress(OSError):
        _remove(temp)


def _acquire(path: Path) -> int:
    """Lock the file at `path` and return its descriptor; UserError when that cannot be had."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_still_at(descriptor, path):
                    _write_pid(descriptor, path)
                    return descriptor
            except BlockingIOError as error:
                pid = os.pread(descriptor, 20, 0).decode(errors="replace") or "unknown"
                os.close(descriptor)
                raise UserError(
                    f"{path.with_suffix('')}: another run (pid {pid}) is writing it; "
                    "wait for it to end or choose another output folder"
                ) from error
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise RunError(f"{path}: cannot be made: {error.strerror}; free some space") from error
        raise UserError(
            f"{path}: cannot be made or locked: {error.strerror}; choose another output folder"
        ) from error


def _is_still_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at `path`: the holder before removes it as it leaves."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_pid(descriptor: int, path: Path) -> None:
    """Leave our pid in the lock file for those who are refused."""
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    except BaseException:
        path.unlink()
        raise


@contextmanager
def _full_disk_explained(path: Path, num_bytes: int) -> Iterator[None]:
    """Turn a full disk, quota or file size limit into a RunError with bytes needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        needed = f"{format_bytes(num_bytes)} needed" if num_bytes else "size not known beforehand"
        raise RunError(
            f"{path}: {error.strerror}, {needed} and {format_bytes(_free_bytes(path))} free; "
            "nothing was published, free some space and run again"
        ) from error


def _files_of(folder: Path) -> list[Path]:
    """List the regular files in and below `folder`, sorted; links and the like are refused."""
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path}: only regular files and folders can be published")
        if path.is_file():
            files.append(path)
    return files


def _leftovers(out: Path, kind: str) -> list[Path]:
    """List NAME.<kind>-<pid> beside `out`, sorted."""
    pattern = re.compile(re.escape(out.name) + rf"\.{kind}-\d+(-old)?")
    return sorted(path for path in out.parent.iterdir() if pattern.fullmatch(path.name))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _absolute(path: str | os.PathLike[str]) -> Path:
    """Make the name the one that siblings are named after: no trailing slash, dot or parent."""
    absolute = Path(path).absolute()
    if absolute.name in ("", ".."):
        absolute = absolute.resolve()
    if not absolute.name:
        raise UserError(f"{os.fspath(path)!r}: cannot be replaced; name a file or folder below it")
    return absolute.parent.resolve() / absolute.name
