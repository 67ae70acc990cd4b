"""The vLLM process: one line for every way it can fail, and no process left behind."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trsp.pruner import vllm_process
from trsp.pruner.errors import Interrupted, RunError
from trsp.pruner.vllm_process import ServedTokens, generate_greedily

Script = Callable[[str], None]

ECHO = """
import json, sys
request = json.load(sys.stdin)
print("noise", file=sys.stderr)
print(json.dumps({
    "distribution": "vllm", "version": "1.0",
    "tokens": [row[:1] * request["max_new_tokens"] for row in request["prompts"]],
    "logprobs": [[-0.5] * request["max_new_tokens"] for row in request["prompts"]],
}))
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    """Set the program that stands in for trsp.serving.greedy; its argument is the model."""

    def install(source: str) -> None:
        path = tmp_path / "stand_in.py"
        path.write_text(source)
        monkeypatch.setattr(vllm_process, "COMMAND", (sys.executable, str(path)))

    return install


def ask(folder: Path, **options: Any) -> ServedTokens:
    return generate_greedily(
        folder,
        [[5, 6], [7]],
        max_new_tokens=2,
        load_tokenizer=False,
        kv_cache_memory_bytes=1,
        **options,
    )


def test_answer_is_read(script: Script, tmp_path: Path) -> None:
    script(ECHO)
    answer = ask(tmp_path)
    assert answer == ServedTokens("vllm 1.0", ((5, 5), (7, 7)), ((-0.5, -0.5), (-0.5, -0.5)))


def test_the_request_is_one_that_the_server_accepts(script: Script, tmp_path: Path) -> None:
    from trsp.serving.greedy import GreedyRequest

    script(
        f"import pathlib, sys; pathlib.Path({str(tmp_path / 'got')!r}).write_text(sys.stdin.read())"
    )
    with pytest.raises(RunError, match="damaged"):
        ask(tmp_path, trust_remote_code=True)
    request = GreedyRequest.model_validate_json((tmp_path / "got").read_text())
    assert request.prompts == [[5, 6], [7]]
    assert (request.max_new_tokens, request.dtype) == (2, "float32")
    assert request.trust_remote_code


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (
            'import sys; print(\'{"error": "ValueError: no such model"}\'); sys.exit(1)',
            "vLLM: ValueError: no such model",
        ),
        (
            "import sys; sys.exit('hello\\nImportError: libcuda\\ncleaning up')",
            "vLLM ended with exit code 1: ImportError: libcuda",
        ),
        ("import os; os.abort()", "vLLM ended with exit code -6: no output"),
        ("print('not json')", "vLLM's answer is damaged"),
        ("print('{}')", "vLLM's answer is damaged: KeyError: 'distribution'"),
    ],
)
def test_failure_is_one_line(script: Script, tmp_path: Path, source: str, line: str) -> None:
    script(source)
    with pytest.raises(RunError) as caught:
        ask(tmp_path)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


HANG = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """A zombie, whose parent has yet to reap it, has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_child_ended(folder: Path) -> None:
    pid = int((folder / "child").read_text())
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)


def test_a_server_that_hangs_is_ended_with_its_children(script: Script, tmp_path: Path) -> None:
    script(HANG)
    with pytest.raises(RunError, match="no answer within 2 s"):
        ask(tmp_path, timeout_seconds=2)
    assert_child_ended(tmp_path)


def test_an_interrupted_wait_ends_the_server(script: Script, tmp_path: Path) -> None:
    script(HANG)

    def interrupt() -> None:
        if (tmp_path / "child").exists() and (tmp_path / "child").read_text():
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        ask(tmp_path, waiting=interrupt)
    assert_child_ended(tmp_path)


def test_children_of_a_server_that_has_answered_are_ended(script: Script, tmp_path: Path) -> None:
    script(HANG.rsplit("time.sleep", 1)[0] + ECHO)
    assert ask(tmp_path).engine == "vllm 1.0"
    assert_child_ended(tmp_path)


def test_a_folder_named_vllm_is_not_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert not vllm_process.has_vllm()
