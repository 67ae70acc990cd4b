"""Greedy generation timed dense beside pruned, in one process, in turns.

A check that depth was really removed, not a serving claim: no batching, no vLLM.
"""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.progress import Progress, silent


@torch.no_grad()
def time_generation(
    folders: Mapping[str, Path],
    *,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    repeats: int = 7,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, float]:
    """Median generated tokens per second of each model, one sequence at a time, KV cache on.

    The order turns around every round (A B, B A, ...), so that drift of the machine falls on all;
    one round of warm-up is thrown away.
    """
    models = {
        label: load_model(open_checkpoint(folder), device=device)
        for label, folder in folders.items()
    }
    prompt = torch.arange(1, prompt_tokens + 1, device=device).unsqueeze(0)
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for repeat in range(repeats + 1):
        for label in list(models) if repeat % 2 else reversed(list(models)):
            started = time.perf_counter()
            generate: Any = models[label].generate
            generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if repeat:
                seconds[label].append(time.perf_counter() - started)
        progress("timing generation", repeat + 1, repeats + 1)
    return {label: new_tokens / statistics.median(taken) for label, taken in seconds.items()}
