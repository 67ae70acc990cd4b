"""`trsp serve MODEL --map MAP` as its users meet it: a process, a port, a client, a signal.

One server is started, asked, and ended by the fixture `story`; each test reads one part of that.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TRSP = str(Path(sys.executable).with_name("trsp"))
NUM_TOKENS = 24
READY_SECONDS = 600.0
END_SECONDS = 120.0
FLAGS = (
    "--dtype", "float32", "--max-model-len", "256", "--gpu-memory-utilization", "0.1",
    "--kv-cache-memory-bytes", str(32 * 2**20), "--enforce-eager", "--max-num-seqs", "4",
)  # fmt: skip
CHAT = [{"role": "user", "content": "w17 w203 w5 w404"}]
PROMPT = "w90 w91 w92 w300 w301 w7 w8 w9 w10 w11 w12"


# Number and start time: a number alone may soon be another's.
ProcessId = tuple[int, str]


@dataclass
class Story:
    """What was seen of one server."""

    models: list[str] = field(default_factory=list)
    chat_pieces: list[str] = field(default_factory=list)
    completion_pieces: list[str] = field(default_factory=list)
    overlay_files: set[str] = field(default_factory=set)
    num_processes: int = 0
    exit_code: int | None = None
    survivors: set[ProcessId] = field(default_factory=set)
    left_behind: list[str] = field(default_factory=list)
    log: str = ""


@pytest.fixture(scope="module")
def story(
    pico: Any, vllm_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Story:
    """Start a server over the first removals of Llama's map, ask it twice, and end it."""
    case, seen = pico("llama"), Story()
    folder = tmp_path_factory.mktemp("server")
    (temporary := folder / "tmp").mkdir()
    # Only what trsp writes: a socket's path must be short, so vLLM keeps the usual place for those.
    environment = {
        "VLLM_RPC_BASE_PATH": tempfile.gettempdir(),
        **vllm_environment,
        "TMPDIR": str(temporary),
    }
    port = free_port()
    command = [
        *(TRSP, "serve", str(case.dense), "--map", str(case.layer_map)),
        *("--prefix", str(case.num_removals), "--port", str(port), *FLAGS),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
    family: set[ProcessId] = set()
    try:
        wait_until_ready(process, port, folder / "log")
        family = descendants(process.pid)
        seen.num_processes = len(family)
        (overlay,) = temporary.glob("trsp-serve-*/*")
        seen.overlay_files = {file.name for file in overlay.iterdir()}
        ask(seen, port)
        process.send_signal(signal.SIGTERM)
        seen.exit_code = process.wait(END_SECONDS)
        seen.survivors = family & running_processes().keys()
        seen.left_behind = [path.name for path in temporary.glob("trsp-serve-*")]
    finally:
        for pid, _ in (family | descendants(process.pid)) & running_processes().keys():
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
    seen.log = (folder / "log").read_text(errors="replace")
    return seen


def ask(seen: Story, port: int) -> None:
    """A streamed chat and a streamed completion, greedy, to the last token."""
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    seen.models = [model.id for model in client.models.list()]
    options: dict[str, Any] = {
        "model": seen.models[0],
        "max_tokens": NUM_TOKENS,
        "temperature": 0.0,
        "stream": True,
        "extra_body": {"ignore_eos": True},
    }
    for chunk in client.chat.completions.create(messages=CHAT, **options):
        if chunk.choices and chunk.choices[0].delta.content:
            seen.chat_pieces.append(chunk.choices[0].delta.content)
    for chunk in client.completions.create(prompt=PROMPT, **options):
        if chunk.choices and chunk.choices[0].text:
            seen.completion_pieces.append(chunk.choices[0].text)
    client.close()


@pytest.fixture(scope="module")
def compacted(pico: Any, serve: Any) -> dict[str, str]:
    """The words of the compacted checkpoint, for the chat and for the completion."""
    from transformers import AutoTokenizer

    pruned = pico("llama").pruned
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (chat, PROMPT)]
    served = serve(pruned, prompts=ids)
    assert len(served.tokens[0]) == NUM_TOKENS
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in served.tokens]
    return {"chat": texts[0], "completion": texts[1]}


def test_a_streamed_chat_is_the_compacted_checkpoints(
    story: Story, compacted: dict[str, str]
) -> None:
    assert "".join(story.chat_pieces).split() == compacted["chat"].split()
    assert len(story.chat_pieces) > NUM_TOKENS // 2
    assert len(compacted["chat"].split()) > NUM_TOKENS // 2


def test_a_streamed_completion_is_the_compacted_checkpoints(
    story: Story, compacted: dict[str, str]
) -> None:
    assert "".join(story.completion_pieces).split() == compacted["completion"].split()
    assert len(story.completion_pieces) > NUM_TOKENS // 2


def test_the_server_bears_the_models_name_and_tells_the_layers(story: Story) -> None:
    assert story.models == ["dense"]
    assert "layers 0, 1, 4, 6, 7 of 8" in story.log
    assert "trsp: kept layers [0, 1, 4, 6, 7] of 8" in story.log


def test_the_overlay_holds_no_weights(story: Story) -> None:
    assert {"config.json", "layer_map.json", "tokenizer.json"} <= story.overlay_files
    assert not any("safetensors" in name for name in story.overlay_files)


def test_sigterm_ends_the_server_and_leaves_nothing(story: Story) -> None:
    # The API server, the engine, its worker, and what Python starts beside them.
    assert story.num_processes >= 3
    assert (story.exit_code, story.survivors, story.left_behind) == (0, set(), [])


def refusal(*arguments: str, environment: dict[str, str]) -> str:
    """What `trsp serve` says on stderr: it must be one line, with exit code 2 and no stdout."""
    result = subprocess.run(
        [TRSP, "serve", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_a_map_of_another_checkpoint_is_refused_in_one_line(
    pico: Any, vllm_environment: dict[str, str]
) -> None:
    case, other = pico("llama"), pico("qwen3")
    line = refusal(
        str(case.dense), "--map", str(other.layer_map), *FLAGS, environment=vllm_environment
    )
    assert "the layer map is for another model (qwen3" in line
    assert "use the map of this checkpoint" in line


def test_vllm_plugins_that_leave_ours_out_are_refused_in_one_line(
    pico: Any, vllm_environment: dict[str, str]
) -> None:
    case = pico("llama")
    line = refusal(
        *(str(case.dense), "--map", str(case.layer_map), *FLAGS),
        environment={**vllm_environment, "VLLM_PLUGINS": "lora_filesystem_resolver"},
    )
    assert "VLLM_PLUGINS is 'lora_filesystem_resolver' and leaves out trsp_layer_map" in line


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-4000:]
            pytest.fail(f"the server is not ready (exit code {process.returncode}):\n{tail}")
        time.sleep(0.5)


def running_processes() -> dict[ProcessId, int]:
    """Each process and its parent's number, zombies left out: they have ended."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent, started = fields[0], fields[1], fields[19]
        if state != "Z":
            found[int(stat.parent.name), started] = int(parent)
    return found


def descendants(pid: int) -> set[ProcessId]:
    """The processes that `pid` started, and those that they started."""
    parents = running_processes()
    found: set[ProcessId] = set()
    numbers = {pid}
    while more := {process for process, parent in parents.items() if parent in numbers} - found:
        found |= more
        numbers = {number for number, _ in more}
    return found
