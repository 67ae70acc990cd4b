"""vLLM's own serving client as a process that stays: `python -P -m trsp.bench.load_client_program`.

It imports `vllm.benchmarks.serve` once (10 s and more on a small CPU) and then measures on request.
Each line on stdin is {"arguments": [...]}, the command line of `vllm bench serve`; each line on
stdout is {"result": vLLM's JSON, "prompts_sha256", "cpu_seconds", "wall_seconds"} or {"error"}.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, TextIO


def main() -> int:
    """Answer requests until stdin ends."""
    # vLLM prints its tables to stdout; descriptor 1 is the log's from here on.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from vllm.benchmarks import serve

    _answer(answers, {"ready": True})
    for line in sys.stdin:
        try:
            arguments = json.loads(line)["arguments"]
            _answer(answers, _measure(serve, arguments))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            text = " ".join(str(error).split())[:500]
            _answer(answers, {"error": f"{type(error).__name__}: {text}"})
    return 0


def _measure(serve: Any, arguments: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    sent: dict[str, Any] = {}
    measure = serve.benchmark

    async def recorded(**words: Any) -> Any:
        digest = hashlib.sha256()
        for request in words["input_requests"]:
            digest.update(json.dumps([request.prompt, request.prompt_len]).encode())
            digest.update(json.dumps(request.expected_output_len).encode())
        sent["prompts_sha256"] = digest.hexdigest()
        sent["cpu"], sent["wall"] = time.process_time(), time.monotonic()
        try:
            return await measure(**words)
        finally:
            sent["cpu"] = time.process_time() - sent["cpu"]
            sent["wall"] = time.monotonic() - sent["wall"]

    serve.benchmark = recorded
    try:
        result = asyncio.run(serve.main_async(parser.parse_args(arguments)))
    finally:
        serve.benchmark = measure
    return {
        "result": result,
        "prompts_sha256": sent["prompts_sha256"],
        "cpu_seconds": sent["cpu"],
        "wall_seconds": sent["wall"],
    }


def _answer(answers: TextIO, document: dict[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
