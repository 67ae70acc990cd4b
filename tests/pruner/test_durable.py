"""What is written is seen whole or not at all, whatever strikes."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trsp.pruner import durable
from trsp.pruner.errors import RunError, UserError

RunKilled = Callable[[Callable[[], object], int], bool]
OLD_FILES = {"config.json": b"old", "model.safetensors.index.json": b"stale", "sub/old.txt": b"1"}
NEW_FILES = {"config.json": b"new!", "weights.bin": bytes(range(256)) * 40, "sub/new.txt": b"22"}


def publish(out: Path, files: dict[str, bytes], *, overwrite: bool = False) -> None:
    with durable.publish_folder(out, overwrite=overwrite) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != durable.MANIFEST_NAME
    }


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# atomic_write


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    durable.atomic_write(tmp_path / "file", "größer")
    durable.atomic_write(tmp_path / "file", b"2")
    assert (tmp_path / "file").read_bytes() == b"2"
    assert names_in(tmp_path) == ["file"]


def test_atomic_write_syncs_the_bytes_then_renames_then_syncs_the_folder(
    tmp_path: Path, file_operations: list[tuple[str, str]]
) -> None:
    durable.atomic_write(tmp_path / "file", b"1")
    temp = f"{tmp_path}/file.tmp-{os.getpid()}"
    assert file_operations == [
        ("fsync", temp),
        ("rename", f"{tmp_path}/file"),
        ("fsync", str(tmp_path)),
    ]


def test_atomic_write_killed_anywhere_shows_the_old_or_the_new(
    tmp_path: Path, run_killed: RunKilled
) -> None:
    path = tmp_path / "file"
    seen = set()
    for nth in range(1, 100):
        path.write_bytes(b"old")
        killed = run_killed(lambda: durable.atomic_write(path, b"new"), nth)
        seen.add(path.read_bytes())
        durable.sweep_leftovers(path)
        assert names_in(tmp_path) == ["file"]
        if not killed:
            break
    assert seen == {b"old", b"new"}
    assert nth > 4, "open, fsync, rename and the folder's fsync must each have been struck"


def test_atomic_write_on_a_full_disk_keeps_the_old_file_and_names_the_bytes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"5\.0 kB needed and .* free"):
            durable.atomic_write(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


# publish_folder


def test_publish_shows_the_folder_with_a_manifest_of_every_file(tmp_path: Path) -> None:
    out = tmp_path / "made" / "on the way" / "model"
    with durable.publish_folder(out) as folder:
        assert folder == out.with_name(f"model.tmp-{os.getpid()}")
        assert not out.exists()
        (folder / "weights").write_bytes(b"12345")
    assert content_of(out) == {"weights": b"12345"}
    assert names_in(out.parent) == ["model"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest == {
        "schema_version": 1,
        "files": {"weights": {"sha256": hashlib.sha256(b"12345").hexdigest(), "size": 5}},
    }
    durable.verify_manifest(out)


def test_publish_syncs_every_file_and_the_manifest_before_the_rename_and_the_parent_after(
    tmp_path: Path, file_operations: list[tuple[str, str]]
) -> None:
    out = tmp_path / "model"
    publish(out, NEW_FILES)
    temp = f"{out}.tmp-{os.getpid()}"
    published = file_operations.index(("rename", str(out)))
    before, after = file_operations[:published], file_operations[published + 1 :]
    manifest = before.index(("rename", f"{temp}/manifest.json"))
    for name in NEW_FILES:
        assert ("fsync", f"{temp}/{name}") in before[:manifest]
    assert ("fsync", f"{temp}/manifest.json.tmp-{os.getpid()}") in before[:manifest]
    assert ("fsync", temp) in before[manifest:]
    assert ("fsync", f"{temp}/sub") in before[manifest:]
    assert after == [("fsync", str(tmp_path))]


def test_publish_takes_known_digests_and_hashes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_again: list[str] = []

    def recorded_sha256(path: Path) -> str:
        read_again.append(path.name)
        return "0" * 64

    monkeypatch.setattr(durable, "_sha256", recorded_sha256)
    digests: dict[str, str] = {}
    with durable.publish_folder(tmp_path / "model", digests=digests) as folder:
        (folder / "large").write_bytes(b"1")
        (folder / "small").write_bytes(b"2")
        digests["large"] = "a" * 64
    assert read_again == ["small"]
    assert durable.read_manifest(tmp_path / "model")["large"].sha256 == "a" * 64


def test_a_digest_of_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="'missing'"),
        durable.publish_folder(tmp_path / "model", digests={"missing": "a" * 64}),
    ):
        pass
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("proof failed"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_in_the_block_leaves_what_was_there(
    tmp_path: Path, error: BaseException, overwrite: bool
) -> None:
    out = tmp_path / "model"
    if overwrite:
        publish(out, OLD_FILES)

    def fill_and_fail() -> None:
        with durable.publish_folder(out, overwrite=overwrite) as folder:
            (folder / "weights").write_bytes(b"1")
            raise error

    with pytest.raises(type(error)):
        fill_and_fail()
    assert names_in(tmp_path) == (["model"] if overwrite else [])
    assert not overwrite or content_of(out) == OLD_FILES


def test_a_failing_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    publish(out, OLD_FILES)
    rename = os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if Path(target) == out and ".tmp-" in Path(source).name:
            raise OSError(errno.EIO, "planted")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(OSError, match="planted"):
        publish(out, NEW_FILES, overwrite=True)
    assert content_of(out) == OLD_FILES
    assert names_in(tmp_path) == ["model"]


def test_an_existing_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    publish(tmp_path / "model", OLD_FILES)
    with pytest.raises(UserError, match=r"model: already exists; .*--overwrite"):
        publish(tmp_path / "model", NEW_FILES)
    assert content_of(tmp_path / "model") == OLD_FILES
    assert names_in(tmp_path) == ["model"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def fill_late() -> None:
        with durable.publish_folder(tmp_path / "model"):
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "config.json").write_text("another's")

    with pytest.raises(UserError, match="already exists"):
        fill_late()
    assert content_of(tmp_path / "model") == {"config.json": b"another's"}
    assert names_in(tmp_path) == ["model"]


def test_overwrite_leaves_no_stale_file(tmp_path: Path) -> None:
    publish(tmp_path / "model", OLD_FILES)
    publish(tmp_path / "model", NEW_FILES, overwrite=True)
    assert content_of(tmp_path / "model") == NEW_FILES
    assert names_in(tmp_path) == ["model"]
    durable.verify_manifest(tmp_path / "model")


def test_overwrite_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    publish(tmp_path / "elsewhere", OLD_FILES)
    (tmp_path / "model").symlink_to("elsewhere")
    publish(tmp_path / "model", NEW_FILES, overwrite=True)
    assert content_of(tmp_path / "model") == NEW_FILES
    assert content_of(tmp_path / "elsewhere") == OLD_FILES
    assert names_in(tmp_path) == ["elsewhere", "model"]


def test_overwrite_refuses_to_delete_what_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thesis = tmp_path / "documents" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis.txt' but no manifest.json"):
        publish(tmp_path / "documents", NEW_FILES, overwrite=True)
    with pytest.raises(UserError, match="is not a folder"):
        publish(thesis, NEW_FILES, overwrite=True)
    publish(tmp_path / "model", OLD_FILES)
    monkeypatch.chdir(tmp_path / "model" / "sub")
    with pytest.raises(UserError, match="holds the working folder"):
        publish(tmp_path / "model", NEW_FILES, overwrite=True)
    assert thesis.read_text() == "years of work"
    assert content_of(tmp_path / "model") == OLD_FILES


def test_links_are_not_published(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="only regular files"),
        durable.publish_folder(tmp_path / "model") as folder,
    ):
        (folder / "link").symlink_to("/etc/hostname")
    assert names_in(tmp_path) == []


@pytest.fixture(scope="module")
def published_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("before") / "model"
    publish(out, OLD_FILES)
    return out


@pytest.mark.parametrize("overwrite", [False, True])
def test_publish_killed_anywhere_shows_a_whole_folder_or_none(
    tmp_path: Path, published_before: Path, run_killed: RunKilled, overwrite: bool
) -> None:
    out = tmp_path / "model"
    seen = []
    for nth in range(1, 200):
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(published_before, out)
        killed = run_killed(lambda: publish(out, NEW_FILES, overwrite=overwrite), nth)
        if out.exists():
            durable.verify_manifest(out)
            assert content_of(out) in (OLD_FILES, NEW_FILES)
        durable.sweep_leftovers(out)
        state = content_of(out) if out.exists() else None
        assert state in ((OLD_FILES, NEW_FILES) if overwrite else (None, NEW_FILES))
        assert names_in(tmp_path) == (["model"] if state else [])
        if not killed:
            break
        seen.append(state)
    assert not killed, "the loop never reached the end of the work"
    assert seen[0] == (OLD_FILES if overwrite else None)
    assert seen[-1] == NEW_FILES, "a kill after the rename must leave the new folder"


def test_a_removal_cut_short_never_brings_half_a_folder_back(
    tmp_path: Path, published_before: Path, run_killed: RunKilled
) -> None:
    out = tmp_path / "model"
    for nth in range(1, 200):
        shutil.copytree(published_before, out)
        killed = run_killed(lambda: publish(out, NEW_FILES, overwrite=True), nth)
        if out.exists():
            shutil.rmtree(out)
        durable.sweep_leftovers(out)
        assert not out.exists() or content_of(out) == OLD_FILES
        shutil.rmtree(out, ignore_errors=True)
        if not killed:
            break


def test_a_leftover_of_a_dead_run_is_swept_at_the_next_start(tmp_path: Path) -> None:
    out = tmp_path / "model"
    # A container gives every run the same pid, so a leftover may bear our own.
    for pid in (os.getpid(), 1, 4_000_000):
        (tmp_path / f"model.tmp-{pid}").mkdir()
        (tmp_path / f"model.tmp-{pid}" / "half").write_bytes(b"1")
    (tmp_path / "model.tmp-notes").write_text("not ours")
    (tmp_path / "other.tmp-1").write_text("another output's")
    publish(out, NEW_FILES)
    assert content_of(out) == NEW_FILES
    assert names_in(tmp_path) == ["model", "model.tmp-notes", "other.tmp-1"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_disk_full_at_any_sync_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    out = tmp_path / "model"
    fsync = os.fsync
    calls_left = 0

    def full_at_last(descriptor: int) -> None:
        nonlocal calls_left
        calls_left -= 1
        if calls_left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_last)
    for nth in range(1, 50):
        shutil.rmtree(out, ignore_errors=True)
        calls_left = 0
        if overwrite:
            publish(out, OLD_FILES)
        calls_left = nth
        try:
            publish(out, NEW_FILES, overwrite=overwrite)
        except (RunError, OSError) as error:
            failure = error
        else:
            break
        # The very last sync comes after the rename: the new folder is there, whole.
        assert isinstance(failure, RunError) or content_of(out) == NEW_FILES
        if out.exists():
            durable.verify_manifest(out)
            assert content_of(out) in (OLD_FILES, NEW_FILES)
        assert names_in(tmp_path) == (["model"] if out.exists() else [])
    assert nth > len(NEW_FILES) + 4, "each file, the manifest, each folder, the parent"
    assert content_of(out) == NEW_FILES


def test_a_file_over_the_size_limit_is_an_error_with_bytes_needed_and_free(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    def fill() -> None:
        with durable.publish_folder(tmp_path / "model", num_bytes=5000) as folder:
            (folder / "weights").write_bytes(b"x" * 5000)

    try:
        with pytest.raises(RunError, match=r"model: .*5\.0 kB needed and .* free; nothing was pub"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"1000\.0 TB needed and .* free"),
        durable.publish_folder(tmp_path / "model", num_bytes=10**15),
    ):
        raise AssertionError("the block must not run")
    assert names_in(tmp_path) == []
    durable.require_free_space(tmp_path / "not" / "yet", 1)


# run_lock


def test_a_second_process_is_refused_and_may_follow(tmp_path: Path) -> None:
    code = f"""
from trsp.pruner.durable import run_lock
with run_lock({str(tmp_path / "model")!r}):
    print("held")
"""

    def lock_elsewhere() -> str:
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout + result.stderr

    with durable.run_lock(tmp_path / "model"):
        assert f"UserError: {tmp_path}/model: another run (pid {os.getpid()})" in lock_elsewhere()
    assert lock_elsewhere() == "held\n"
    assert names_in(tmp_path) == []


def test_a_second_thread_is_refused_and_the_same_one_may_enter_again(tmp_path: Path) -> None:
    refused = []

    def enter() -> None:
        try:
            with durable.run_lock(tmp_path / "model"):
                pass
        except UserError as error:
            refused.append(str(error))

    with durable.run_lock(tmp_path / "model"):
        publish(tmp_path / "model", NEW_FILES)
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert (tmp_path / "model.lock").exists(), "leaving the inner lock released the outer"
    (message,) = refused
    assert f"another run (pid {os.getpid()})" in message
    assert names_in(tmp_path) == ["model"]


def test_a_lock_on_a_file_that_its_last_holder_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.lock"
    flock = fcntl.flock
    opened: list[int] = []

    def removed_before_the_first(descriptor: int, operation: int) -> None:
        if not opened:
            path.unlink()
        opened.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before_the_first)
    with durable.run_lock(tmp_path / "model"):
        assert len(opened) == 2
        assert path.read_text() == str(os.getpid())
    assert names_in(tmp_path) == []


def test_a_killed_holder_does_not_block_the_next_run(tmp_path: Path, run_killed: RunKilled) -> None:
    def hold_and_die() -> None:
        with durable.run_lock(tmp_path / "model"):
            os.fsync(0)

    assert run_killed(hold_and_die, 3)
    assert names_in(tmp_path) == ["model.lock"]
    publish(tmp_path / "model", NEW_FILES)
    assert names_in(tmp_path) == ["model"]


def test_a_folder_that_cannot_hold_the_output_is_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made or locked"):
        publish(tmp_path / "file" / "model", NEW_FILES)
    with pytest.raises(UserError, match="cannot be replaced"):
        publish(Path("/"), NEW_FILES)


# Manifests


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published") / "model"
    publish(out, NEW_FILES)
    return out


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_changed_file_is_found_and_named(published: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(NEW_FILES)))
    original = NEW_FILES[name]
    position = data.draw(st.integers(0, len(original) - 1))
    kind = data.draw(st.sampled_from(["flip", "truncate", "append", "remove"]))
    changed = {
        "flip": original[:position]
        + bytes([original[position] ^ 1 << data.draw(st.integers(0, 7))])
        + original[position + 1 :],
        "truncate": original[:position],
        "append": original + b"\0",
        "remove": b"",
    }[kind]
    file = published / name
    try:
        if kind == "remove":
            file.unlink()
        else:
            file.write_bytes(changed)
        with pytest.raises(UserError) as caught:
            durable.verify_manifest(published)
        assert str(caught.value).startswith(f"{file}:")
        assert (f"has {len(changed)} bytes where" in str(caught.value)) == (
            kind in ("truncate", "append")
        )
    finally:
        file.write_bytes(original)
    durable.verify_manifest(published)


@given(content=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_a_damaged_manifest_is_the_only_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError):
        durable.verify_manifest(folder)


def test_a_file_that_is_not_listed_is_refused_but_hidden_folders_are_left_alone(
    tmp_path: Path,
) -> None:
    out = tmp_path / "model"
    publish(out, NEW_FILES)
    (out / ".cache").mkdir()
    (out / ".cache" / "hub").write_text("x")
    durable.verify_manifest(out)
    (out / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index.json: is not listed in manifest.json; remove"):
        durable.verify_manifest(out)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"schema_version": 2, "files": {}}, "schema_version is 2"),
        ({"schema_version": 1}, "'files' is missing"),
        ({"schema_version": 1, "files": {"../../etc/passwd": {}}}, "not a file name inside"),
        ({"schema_version": 1, "files": {"/etc/passwd": {}}}, "not a file name inside"),
        ({"schema_version": 1, "files": {"a\0b": {}}}, "not a file name inside"),
        ({"schema_version": 1, "files": {"a": {"sha256": "0", "size": 1}}}, "'a' is damaged"),
        ([], "expected a JSON object"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    tmp_path: Path, document: object, message: str
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        durable.verify_manifest(tmp_path)


def test_huge_and_deep_manifests_are_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="nested too deep"):
        durable.verify_manifest(tmp_path)
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(durable.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(UserError, match="is larger than"):
        durable.verify_manifest(tmp_path)


def test_verify_reports_progress_in_bytes(published: Path) -> None:
    reports = []
    durable.verify_manifest(published, progress=lambda *report: reports.append(report))
    total = sum(map(len, NEW_FILES.values()))
    assert reports[0] == ("verify files", 0, total)
    assert reports[-1] == ("verify files", total, total)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2 * 10**9, "2.0 GB")],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert durable.format_bytes(num_bytes) == text
