"""The part of quantize_pruned.py that runs in other environments: no import of ours.

RESULT quantize MODEL OUT SCHEME, RESULT compare BEFORE AFTER WINDOWS, RESULT serve MODEL WINDOWS:
the result goes to the file RESULT as JSON, since vLLM's processes write to stdout as they like.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_PROMPTS = 8
PROMPT_LENGTH, NUM_NEW_TOKENS = 32, 16
NUM_SCORED, SCORED_LENGTH = 64, 255


def quantize(model: str, out: str, scheme: str) -> dict[str, Any]:
    """Quantize the linear layers but the head, without data, and save."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    oneshot(model=model, recipe=recipe, output_dir=out)
    return {"out": out}


def compare(before: str, after: str, windows_file: str) -> dict[str, Any]:
    """Load both with transformers; losses on the same windows, in fp32."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    windows = torch.tensor(json.loads(Path(windows_file).read_text("utf-8")))
    models = [
        AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
        for path in (before, after)
    ]
    sums = {"before": 0.0, "after": 0.0, "divergence": 0.0}
    largest = largest_difference = 0.0
    with torch.no_grad():
        for batch in windows.split(4):
            ours, theirs = (
                model(input_ids=batch, use_cache=False).logits[:, :-1].float() for model in models
            )
            targets = batch[:, 1:].flatten()
            for name, logits in (("before", ours), ("after", theirs)):
                loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
                sums[name] += loss.item()
            log_p, log_q = F.log_softmax(ours, -1), F.log_softmax(theirs, -1)
            sums["divergence"] += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
            largest = max(largest, ours.abs().max().item())
            largest_difference = max(largest_difference, (ours - theirs).abs().max().item())
    scored = windows.shape[0] * (windows.shape[1] - 1)
    quantized = [
        name
        for name, module in models[1].named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    ]
    return {
        "perplexity_before": math.exp(sums["before"] / scored),
        "perplexity_after": math.exp(sums["after"] / scored),
        "divergence": sums["divergence"] / scored,
        "max_logit": largest,
        "max_logit_difference": largest_difference,
        "num_scored": scored,
        "num_quantized": len(quantized),
        "num_hidden_layers": models[1].config.get_text_config().num_hidden_layers,
    }


def serve(model: str, windows_file: str) -> dict[str, Any]:
    """Greedy continuations by vLLM, and its perplexity of the beginnings of the windows."""
    from vllm import LLM, SamplingParams

    windows = json.loads(Path(windows_file).read_text("utf-8"))
    engine = LLM(
        model=model, enforce_eager=True, max_model_len=SCORED_LENGTH + 1, max_num_seqs=NUM_PROMPTS,
        gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**28,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": window[:PROMPT_LENGTH]} for window in windows[:NUM_PROMPTS]]
    outputs = engine.generate(prompts, greedy)
    scoring = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    texts = [{"prompt_token_ids": window[:SCORED_LENGTH]} for window in windows[:NUM_SCORED]]
    logprobs = [
        found[token].logprob
        for text, scored in zip(texts, engine.generate(texts, scoring), strict=True)
        for token, found in zip(
            text["prompt_token_ids"][1:], scored.prompt_logprobs[1:], strict=True
        )
    ]
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "perplexity": math.exp(-sum(logprobs) / len(logprobs)),
        "num_scored": len(logprobs),
    }


if __name__ == "__main__":
    programs: dict[str, Callable[..., dict[str, Any]]] = {
        "quantize": quantize,
        "compare": compare,
        "serve": serve,
    }
    result_file, name, *arguments = sys.argv[1:]
    Path(result_file).write_text(json.dumps(programs[name](*arguments)), "utf-8")
