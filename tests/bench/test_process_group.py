"""A process group ends as a whole, whatever its members think of it and however we end."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trsp.bench import process_group
from trsp.bench.process_group import ProcessGroup

_spec = importlib.util.spec_from_file_location("stand_in", Path(__file__).with_name("stand_in.py"))
assert _spec is not None
assert _spec.loader is not None
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
SAY_READY = "print('ready', flush=True); time.sleep(600)"
# A parent that ends when asked, with a child that does not.
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {DEAF + SAY_READY!r}])
{SAY_READY}
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ProcessGroup]]:
    """Groups of a test, which are ended with it; the wait for a deaf one is short."""
    monkeypatch.setattr(process_group, "_GRACE_SECONDS", 1.0)
    groups: list[ProcessGroup] = []
    yield groups
    for group in groups:
        group.stop()


def start(groups: list[ProcessGroup], tmp_path: Path, program: str) -> ProcessGroup:
    command = [sys.executable, "-c", program]
    groups.append(ProcessGroup(command, log=tmp_path / "log" / "a.log", environment={"WORD": "x"}))
    return groups[-1]


def wait_for_lines(log: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while log.read_text().count("ready") < count:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def wait_until_empty(group: int) -> None:
    deadline = time.monotonic() + 30
    while left := stand_in.group_members(group):
        assert time.monotonic() < deadline, f"processes {left} were left running"
        time.sleep(0.02)


def test_a_group_is_its_own_and_gets_the_environment(
    started: list[ProcessGroup], tmp_path: Path
) -> None:
    group = start(started, tmp_path, f"import os, time; print(os.environ['WORD']); {SAY_READY}")
    wait_for_lines(group.log, 1)
    assert group.is_alive()
    assert os.getpgid(group.process.pid) == group.process.pid != os.getpgid(0)
    assert group.log.read_text() == "x\nready\n"


def test_a_log_is_continued(started: list[ProcessGroup], tmp_path: Path) -> None:
    for word in ("one", "two"):
        start(started, tmp_path, f"print({word!r})").process.wait()
    assert started[0].log.read_text() == "one\ntwo\n"


@pytest.mark.parametrize(("program", "code"), [("import sys; sys.exit(5)", 5), ("0", 0)])
def test_an_end_is_seen_and_its_code_kept(
    program: str, code: int, started: list[ProcessGroup], tmp_path: Path
) -> None:
    group = start(started, tmp_path, program)
    deadline = time.monotonic() + 30
    while group.is_alive():
        assert time.monotonic() < deadline
    assert group.stop() == code
    assert group.stop() == code


def test_a_polite_leader_ends_at_once(
    started: list[ProcessGroup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_group, "_GRACE_SECONDS", 60.0)
    group = start(started, tmp_path, f"import time; {SAY_READY}")
    wait_for_lines(group.log, 1)
    before = time.monotonic()
    assert group.stop() == -signal.SIGTERM
    assert time.monotonic() - before < 30


def test_a_deaf_leader_is_killed_after_the_grace(
    started: list[ProcessGroup], tmp_path: Path
) -> None:
    group = start(started, tmp_path, DEAF + SAY_READY)
    wait_for_lines(group.log, 1)
    before = time.monotonic()
    assert group.stop() == -signal.SIGKILL
    assert time.monotonic() - before >= 1.0
    wait_until_empty(group.process.pid)


def test_a_deaf_grandchild_goes_with_its_parent(
    started: list[ProcessGroup], tmp_path: Path
) -> None:
    group = start(started, tmp_path, PARENT)
    wait_for_lines(group.log, 2)
    assert len(stand_in.group_members(group.process.pid)) == 2
    group.stop()
    wait_until_empty(group.process.pid)


def test_a_grandchild_whose_parent_ended_by_itself_goes_too(
    started: list[ProcessGroup], tmp_path: Path
) -> None:
    # The leader is a zombie then: its number must still be that of the group.
    program = PARENT.replace("time.sleep(600)\n", "sys.exit(4)\n")
    group = start(started, tmp_path, program)
    wait_for_lines(group.log, 2)
    while group.is_alive():
        time.sleep(0.02)
    assert len(stand_in.group_members(group.process.pid)) == 1
    assert group.stop() == 4
    wait_until_empty(group.process.pid)


def test_stop_returns_when_nobody_of_the_group_is_left(
    started: list[ProcessGroup], tmp_path: Path
) -> None:
    """The next engine takes the memory of this one: a dying grandchild may still hold it."""
    for _ in range(5):
        group = start(started, tmp_path / str(len(started)), PARENT)
        wait_for_lines(group.log, 2)
        group.stop()
        assert stand_in.group_members(group.process.pid) == []


@pytest.mark.parametrize(("alive", "least"), [(3, 4), (10**9, 5)])
def test_stop_waits_for_those_that_are_still_dying_but_not_for_ever(
    alive: int,
    least: int,
    started: list[ProcessGroup],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the kernel says of the group is played: alive so many times, then gone."""
    asked: list[int] = []
    really = os.killpg

    def killpg(group: int, number: int) -> None:
        if number:
            really(group, number)
            return
        asked.append(group)
        if len(asked) > alive:
            raise ProcessLookupError

    monkeypatch.setattr(process_group.os, "killpg", killpg)
    monkeypatch.setattr(process_group, "_DYING_SECONDS", 0.5)
    group = start(started, tmp_path, SAY_READY)
    wait_for_lines(group.log, 1)
    before = time.monotonic()
    group.stop()
    assert len(asked) >= least
    assert set(asked) == {group.process.pid}
    assert time.monotonic() - before < 15


def test_ctrl_c_during_the_grace_does_not_leave_a_deaf_process(
    started: list[ProcessGroup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = start(started, tmp_path, DEAF + SAY_READY)
    wait_for_lines(group.log, 1)

    def impatient(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(process_group.time, "sleep", impatient)
        with pytest.raises(KeyboardInterrupt):
            group.stop()
    wait_until_empty(group.process.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is a signal on Linux only")
def test_a_leader_does_not_outlive_us(tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from trsp.bench.process_group import ProcessGroup
group = ProcessGroup(
    [sys.executable, "-c", {f"import time; {SAY_READY}"!r}],
    log=Path(sys.argv[1]), environment={{}},
)
print(group.process.pid, flush=True)
time.sleep(600)
"""
    log = tmp_path / "log"
    us = subprocess.Popen(
        [sys.executable, "-c", program, str(log)], stdout=subprocess.PIPE, text=True
    )
    assert us.stdout is not None
    group = int(us.stdout.readline())
    wait_for_lines(log, 1)
    assert stand_in.group_members(group) == [group]
    us.kill()
    us.wait()
    wait_until_empty(group)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no output"),
        ("one\n\n two\nthree\nfour\n", "two | three | four"),
        ("ValueError: bad\n" + "INFO Shutting down\n" * 9, "ValueError: bad"),
        ("a\nRuntimeError: CUDA out of memory\nb\nc\nd\ne\n", "RuntimeError: CUDA out of memory"),
        ("x" * 400 + "END\n", "x" * 297 + "END"),
        ("\xff broken\n", "broken"),
    ],
)
def test_the_log_tells_why_in_one_line(
    text: str, told: str, started: list[ProcessGroup], tmp_path: Path
) -> None:
    group = start(started, tmp_path, "0")
    group.process.wait()
    group.log.write_bytes(text.encode("latin-1"))
    assert group.last_lines().lstrip("\ufffd ") == told


def test_only_the_end_of_a_long_log_is_read(started: list[ProcessGroup], tmp_path: Path) -> None:
    group = start(started, tmp_path, "0")
    group.process.wait()
    group.log.write_text("ValueError: long ago\n" + "line\n" * 20_000 + "the last\n")
    assert group.last_lines() == "line | line | the last"
