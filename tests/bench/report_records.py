"""Synthetic speed records with figures such as a 32-layer 8B model gives; no engine needed.

Loads, metrics and starts are those that each backend writes. The time of a step is a fixed part and
a part per layer; noise is seeded, so equal calls are equal.
"""

import math
import random
from collections import Counter
from collections.abc import Collection
from statistics import fmean, geometric_mean
from typing import Any

from trsp.bench.serve_record import (
    Arm,
    Backend,
    Cell,
    Load,
    Memory,
    Quality,
    Ratio,
    ServeRecord,
    Start,
    Workload,
)

ARMS = (
    ("dense", 32, 6.24),
    ("dense again", 32, 6.24),
    ("pruned-25", 24, 7.31),
    ("pruned-50", 16, 13.9),
)
PROTOCOL = {
    "window": 2048,
    "stride": 2048,
    "add_bos": True,
    "dtype": "bfloat16",
    "num_tokens": 288768,
}
GIB = 2**30
OUTPUT_LEN = 128
INPUT_LEN = 512
ALL_AT_ONCE = "all at once"
NUM_ITERATIONS = 30
BATCH_SIZE = 64


def build(
    backend: Backend = "serve",
    *,
    seed: int = 0,
    num_blocks: int = 5,
    lost: Collection[tuple[str, str, int]] = (),
    **changes: Any,
) -> ServeRecord:
    """A record of `backend`, fields replaced by `changes`.

    Args:
        lost: arm, load and block of measurements whose first half does not count; its figures are
            ten times as large, so that nobody takes them by mistake and is not found out.
    """
    noise = random.Random(seed)
    loads = _loads(backend)
    memories: list[Memory] = ["equal-kv", "equal-memory"] if backend == "serve" else ["equal-kv"]
    cells = [
        _cell(backend, memory, block, position, name, layers, load, noise)
        for memory in memories
        for block in range(num_blocks)
        for position, (name, layers, _) in enumerate([*ARMS, *reversed(ARMS)])
        for load in loads
        if (load.name == ALL_AT_ONCE) == (memory == "equal-memory")
    ]
    cells = [
        _spoilt(cell)
        if (cell.arm, cell.load, cell.block) in lost and cell.position < len(ARMS)
        else cell
        for cell in cells
    ]
    # A server or a model in this process stays up; an offline engine starts for each measurement.
    starts = [
        _start(backend, memory, name, block, layers)
        for memory in memories
        for block in range(num_blocks)
        for name, layers, _ in ARMS
        for _ in (range(2 * len(loads)) if backend in ("latency", "throughput") else range(1))
    ]
    document: dict[str, Any] = {
        "backend": backend,
        "engine": "vllm 0.32.0" if backend != "transformers" else "transformers 5.19.0",
        "label": None,
        "partial": False,
        "num_blocks": num_blocks,
        "confidence": 0.95,
        "arms": [_arm(*row) for row in ARMS],
        "loads": loads,
        "workload": Workload(
            input_len=INPUT_LEN, output_len=OUTPUT_LEN, dtype="bfloat16", seed=0,
            ttft_slo_ms=2000.0, tpot_slo_ms=100.0,
        ),
        "memories": memories,
        "starts": starts,
        "cells": cells,
        "ratios": list(_ratios(cells)),
        "invalid": [],
        "explained": ["pruned-25, equal-kv: num_hidden_layers is 24, dense 32",
                      "pruned-50, equal-kv: num_hidden_layers is 16, dense 32"],
        "not_measured": ["GPU clocks during the windows"],
        "commands": ["trsp bench serve dense pruned-25 pruned-50 --out serve"],
        "hashes": {"prompts closed 16": "5f" * 32, "model dense": "0a" * 32},
        "environment": {
            "time": "2026-11-24T03:00:00+00:00", "commit": "b1274da", "python": "3.11.7",
            "gpu": {"name": "NVIDIA H200", "cuda": "13.0"},
            "versions": {"trsp": "0.1.0", "vllm": "0.32.0"},
            "engine_variables": {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        },
    }  # fmt: skip
    return ServeRecord.model_validate({**document, **changes})


HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(2)>",
    "javascript:alert(3) | cell |",
    r"$\frac{1}{0$ and $x^2$",
    "</svg></style></table>{{ 7 * 7 }}&lt;b&gt;",
)
# A lone surrogate, NUL, a direction override, a noncharacter: no encoder or parser may stumble.
ODD = "\ud800\x00\u202e\ufffe"


def build_hostile() -> dict[str, Any]:
    """A record's document in which every string is an attack; it still reads as a record."""
    bad = " ".join(HOSTILE) + ODD
    document = build(num_blocks=2, seed=3).model_dump(mode="json")
    names = {arm["name"]: f"_{count} {bad}" for count, arm in enumerate(document["arms"])}
    loads = {load["name"]: f"{load['name']} {bad}" for load in document["loads"]}
    for arm in document["arms"]:
        arm.update(name=names[arm["name"]], model=bad, fingerprint=bad)
        for quality in arm["quality"]:
            quality.update(text=f"{quality['text']} {bad}", protocol={bad: [bad, {bad: bad}]})
    for load in document["loads"]:
        load.update(name=loads[load["name"]])
    document["loads"][1].update(concurrency=None)
    for start in document["starts"]:
        start.update(arm=names[start["arm"]], command=bad, engine_config={bad: bad})
    for cell in document["cells"]:
        cell.update(arm=names[cell["arm"]], load=loads[cell["load"]], notes=[bad], started_at=bad)
        cell["metrics"][bad] = 1.0
    document["cells"][0]["invalid"] = [bad]
    for ratio in document["ratios"]:
        ratio.update(arm=names[ratio["arm"]], load=loads[ratio["load"]], verdict=bad)
    document["ratios"][-1]["metric"] = bad
    document["workload"]["dtype"] = bad
    for name in ("invalid", "explained", "not_measured", "commands"):
        document[name] = [bad, bad]
    document.update(engine=bad, label=bad, hashes={bad: bad})
    document["environment"] = {bad: {bad: [bad, None, 1]}, "gpu": {"name": bad}}
    return document


def _loads(backend: Backend) -> list[Load]:
    if backend == "transformers":
        return [
            Load(name="prompt", kind="batch", concurrency=1, num_requests=5),
            Load(name="generation", kind="batch", concurrency=BATCH_SIZE, num_requests=BATCH_SIZE),
        ]
    if backend == "latency":
        return [
            Load(name=f"batch {c}", kind="batch", concurrency=c, num_requests=c * NUM_ITERATIONS)
            for c in (1, 4, 16)
        ]
    if backend == "throughput":
        return [Load(name="200 prompts", kind="batch", num_requests=200)]
    closed = [
        Load(
            name=f"closed {c}", kind="closed", concurrency=c, num_requests=1000 if c == 16 else 200
        )
        for c in (1, 4, 16)
    ]
    opened = [
        Load(
            name=f"open {share}",
            kind="open",
            share=share,
            request_rate=share * 12,
            num_requests=400,
        )
        for share in (0.3, 0.5, 0.7, 0.9)
    ]
    return [*closed, *opened, Load(name=ALL_AT_ONCE, kind="closed", num_requests=400)]


def _arm(name: str, layers: int, perplexity: float) -> Arm:
    parameters = 1_050_939_392 + layers * 218_112_000
    role = {"dense": "dense", "dense again": "control"}.get(name, "pruned")
    return Arm(
        name=name,
        role=role,  # type: ignore[arg-type]
        model="models/" + name.replace("dense again", "dense"),
        num_hidden_layers=layers,
        weights="checkpoint",
        fingerprint=f"{layers:02d}" * 32,
        disk_bytes=parameters * 2,
        num_parameters=parameters,
        weight_bytes=parameters * 2,
        kv_bytes_per_token=layers * 4096,
        quality=[
            Quality(text="wikitext-2", perplexity=perplexity, protocol=PROTOCOL),
            Quality(text="books", perplexity=perplexity * 1.7, protocol=PROTOCOL),
        ],
    )  # fmt: skip


def _start(backend: Backend, memory: Memory, arm: str, block: int, layers: int) -> Start:
    tokens = 400_000 if memory == "equal-kv" else int(400_000 * (32 / layers) ** 1.1)
    if backend == "transformers":
        return Start(
            arm=arm,
            memory=memory,
            block=block,
            command=f"transformers, models/{arm}, cuda",
            load_seconds=layers * 0.1 + block * 0.01,
            weights_gib=(1.05 + layers * 0.218) * 2e9 / GIB,
            kv_cache_tokens=None,
            num_kv_blocks=None,
            engine_config={},
        )
    command = "-m vllm.entrypoints.openai.api_server"
    if backend != "serve":
        command = f"-m trsp.bench.offline_program {backend} {arm}.json"
    return Start(
        arm=arm,
        memory=memory,
        block=block,
        command=f"HF_HUB_OFFLINE=1 python -P {command} --model models/{arm}",
        load_seconds=20 + layers * 0.6 + block * 0.1,
        weights_gib=round((1.05 + layers * 0.218) * 2e9 / GIB, 2),
        kv_cache_tokens=tokens,
        num_kv_blocks=tokens // 16,
        engine_config={"model_config.dtype": "bfloat16", "cache_config.block_size": "16",
                       "model_config.hf_config.num_hidden_layers": str(layers)},
    )  # fmt: skip


def _cell(
    backend: Backend, memory: Memory, block: int, position: int, arm: str, layers: int, load: Load,
    noise: random.Random,
) -> Cell:  # fmt: skip
    jitter = math.exp(noise.gauss(0, 0.008))
    in_flight = load.concurrency or (12 * load.share if load.share else 64)
    tpot = (1.1 + layers * 0.19 * (1 + 0.018 * in_flight)) * jitter
    ttft = (9 + layers * 0.9 * (1 + 0.2 * in_flight)) * jitter
    if load.share:
        busy = load.share * (1.9 + 0.2 * layers) / 8.3
        ttft *= 1 / (1 - min(busy, 0.97))
    if memory == "equal-memory":
        tpot *= 0.97 if layers < 32 else 1.0
    latency = ttft + tpot * (OUTPUT_LEN - 1)
    requests = load.request_rate or in_flight / latency * 1000
    return Cell(
        block=block,
        position=position,
        memory=memory,
        arm=arm,
        load=load.name,
        started_at=f"2026-11-24T03:{block:02d}:{position:02d}+00:00",
        completed=load.num_requests,
        failed=0,
        total_input_tokens=load.num_requests * (2048 if load.name == "prompt" else INPUT_LEN),
        total_output_tokens=0 if load.name == "prompt" else load.num_requests * OUTPUT_LEN,
        metrics=_metrics(backend, load, ttft, tpot, latency, requests),
        prompts_sha256=None if backend == "transformers" else "5f" * 32,
        client_cpu_share=0.21 if backend == "serve" else None,
        prefix_cache_hits=0 if backend == "serve" else None,
        num_preemptions=0 if backend == "serve" else None,
        notes=[],
        invalid=[],
    )


def _spoilt(cell: Cell) -> Cell:
    metrics = {name: value * 10 for name, value in cell.metrics.items()}
    return cell.model_copy(update={"metrics": metrics, "invalid": ["the client was too slow"]})


def _metrics(
    backend: Backend, load: Load, ttft: float, tpot: float, latency: float, requests: float
) -> dict[str, float]:
    if backend == "latency":
        # No 99th percentile of fewer than 1,000 iterations.
        shape = {10: 0.98, 25: 0.99, 50: 1.0, 75: 1.01, 90: 1.03}
        found = {f"p{p}_latency_ms": latency * factor for p, factor in shape.items()}
        return {"avg_latency_ms": latency, **found}
    if backend == "throughput":
        return {
            "requests_per_second": requests,
            "tokens_per_second": requests * (INPUT_LEN + OUTPUT_LEN),
        }
    if backend == "transformers" and load.name == "prompt":
        return {"prompt_latency_s": ttft / 1e3, "prompt_throughput": 2048 / ttft * 1e3}
    if backend == "transformers":
        return {
            "generation_latency_s": latency / 400,
            "generation_throughput": BATCH_SIZE * OUTPUT_LEN / latency * 400,
        }
    found = {
        "request_throughput": requests,
        "output_throughput": requests * OUTPUT_LEN,
        "total_token_throughput": requests * (INPUT_LEN + OUTPUT_LEN),
        "request_goodput": requests * 0.99,
    }
    figures = {"ttft": ttft, "tpot": tpot, "itl": tpot * 0.99, "e2el": latency}
    for name, value in figures.items():
        for statistic, factor in (("mean", 1.03), ("median", 1.0), ("p90", 1.2), ("p99", 1.6)):
            found[f"{statistic}_{name}_ms"] = value * factor
    if load.kind == "open":
        found["request_goodput"] = load.request_rate or requests
    return found


def _ratios(cells: list[Cell]) -> list[Ratio]:
    layers = {name: count for name, count, _ in ARMS}
    found: dict[tuple[Memory, str, str, str, str], dict[int, list[float]]] = {}
    halves = Counter(
        (cell.memory, cell.arm, cell.load, cell.block) for cell in cells if not cell.invalid
    )
    for cell in cells:
        if halves[cell.memory, cell.arm, cell.load, cell.block] < 2:
            continue
        for metric, value in cell.metrics.items():
            # Arrivals set the pace of an open loop.
            if cell.load.startswith("open") and metric.endswith("throughput"):
                continue
            key = (cell.memory, cell.arm, cell.load, metric)
            found.setdefault((*key, ""), {}).setdefault(cell.block, []).append(value)
    ratios = []
    for (memory, arm, load, metric, _), blocks in found.items():
        if arm == "dense":
            continue
        dense = found.get((memory, "dense", load, metric, ""), {})
        sign = -1 if metric.endswith(("_ms", "_s")) else 1
        blocks = {block: values for block, values in blocks.items() if block in dense}
        if not blocks:
            continue
        logs = [
            sign * math.log(fmean(values) / fmean(dense[block])) for block, values in blocks.items()
        ]
        centre = fmean(logs)
        spread = 2.776 * math.sqrt(
            sum((x - centre) ** 2 for x in logs) / max(1, len(logs) - 1) / len(logs)
        )
        bound = None
        if (
            arm != "dense again"
            and "open" not in load
            and "ttft" not in metric
            and memory == "equal-kv"
        ):
            bound = (3.5 + 32) / (3.5 + layers[arm])
        ratios.append(
            Ratio(
                memory=memory,
                arm=arm,
                load=load,
                metric=metric,
                dense=geometric_mean([value for block in blocks for value in dense[block]]),
                pruned=geometric_mean([value for block in blocks for value in blocks[block]]),
                estimate=math.exp(centre),
                low=math.exp(centre - spread) if len(logs) > 1 else None,
                high=math.exp(centre + spread) if len(logs) > 1 else None,
                blocks=[math.exp(x) for x in logs],
                block_numbers=list(blocks),
                bound=bound,
                achieved_over_bound=(math.exp(centre) - 1) / (bound - 1) if bound else None,
                verdict=_verdict(arm, centre, spread, bound),
            )
        )
    return ratios


def _verdict(arm: str, centre: float, spread: float, bound: float | None) -> str:
    if arm == "dense again":
        return "contains 1" if abs(centre) <= spread else "does not contain 1"
    if bound is None:
        return "no bound applies"
    return (
        "unexplained: beyond the bound" if centre - spread > math.log(bound) else "within the bound"
    )
