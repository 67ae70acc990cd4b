"""Stands in for the module `vllm.benchmarks.serve`: same entry points, invented figures.

STAND_IN_CLIENT (environment, comma-separated) chooses what it does:
    fails       no request is completed
    drops       one request of each measurement fails
    raises      the measurement raises, as vLLM's does when its first request fails
    exits       the process ends in the middle of the measurement
    stuck       the measurement never ends
    busy        it takes a whole core
    moody       its prompts differ from measurement to measurement
    third       raises in the third measurement
"""

import argparse
import asyncio
import os
import sys
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

MODES = set(os.environ.get("STAND_IN_CLIENT", "").split(","))
_count = 0


@dataclass
class Request:
    prompt: str
    prompt_len: int
    expected_output_len: int


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    for name in ("backend", "base-url", "endpoint", "model", "tokenizer", "dataset-name"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("random-input-len", "random-output-len", "num-prompts", "num-warmups", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("random-range-ratio", "temperature"):
        parser.add_argument(f"--{name}", type=float, required=True)
    for name in ("percentile-metrics", "metric-percentiles"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--max-concurrency", type=int)
    parser.add_argument("--request-rate", type=float, default=float("inf"))
    parser.add_argument("--goodput", nargs="+", required=True)
    for name in ("ignore-eos", "disable-tqdm", "save-detailed"):
        parser.add_argument(f"--{name}", action="store_true")


async def main_async(args: argparse.Namespace) -> dict[str, Any]:
    salt = time.monotonic_ns() if "moody" in MODES else 0
    requests = [
        Request(f"prompt {args.seed} {salt} {n}", args.random_input_len, args.random_output_len)
        for n in range(args.num_prompts)
    ]
    return await benchmark(input_requests=requests, args=args)


async def benchmark(input_requests: list[Request], args: argparse.Namespace) -> dict[str, Any]:
    global _count
    _count += 1
    print("noise that vLLM prints to stdout", flush=True)
    if "raises" in MODES or ("third" in MODES and _count == 3):
        raise ValueError("Initial test run failed - Please make sure\nthat all is well.")
    if "exits" in MODES:
        print("ConnectionError: Connection reset by peer", file=sys.stderr, flush=True)
        os._exit(9)
    if "stuck" in MODES:
        await asyncio.sleep(600)
    urllib.request.urlopen(f"{args.base_url}/one_request").close()
    if "busy" in MODES:
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            pass
    else:
        await asyncio.sleep(0.02)
    count = len(input_requests)
    failed = count if "fails" in MODES else 1 if "drops" in MODES else 0
    completed = count - failed
    outputs = [args.random_output_len] * completed + [0] * failed
    document: dict[str, Any] = {
        "completed": completed,
        "failed": failed,
        "total_input_tokens": completed * args.random_input_len,
        "total_output_tokens": sum(outputs),
        "output_lens": outputs,
        "errors": [""] * completed + ["Connect call failed"] * failed,
        "start_times": [n / min(args.request_rate, 1e6) for n in range(count)],
        "request_throughput": 10.0,
        "output_throughput": 10.0 * args.random_output_len,
        "total_token_throughput": 10.0 * (args.random_output_len + args.random_input_len),
        "request_goodput": 9.0,
    }
    for latency in ("ttft", "tpot", "itl", "e2el"):
        for kind in ("mean", "median", "p50", "p90", "p99"):
            document[f"{kind}_{latency}_ms"] = 5.0 + len(kind)
    return document
