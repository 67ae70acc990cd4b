"""Engines of vLLM, one after the other in one process: the import of vLLM is paid once.

    python -P engine_host.py < jobs > answers

A job is one line of JSON on stdin, its answer one line on stdout:

    {"model": ..., "prompts": [[...]], "max_new_tokens": n, "options": {...}, "environment": {...}}
    {"tokens": [[...]], "logprobs": [[...]], "num_layers": n}  or  {"error": "..."}

`options` are arguments of `vllm.LLM` over the defaults below. Generation is greedy in fp32.
"""

import gc
import json
import os
import sys
import time
import traceback
from typing import Any

OPTIONS = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 32 * 2**20,
    "enable_prefix_caching": False,
    "enforce_eager": True,
    "generation_config": "vllm",
    "disable_log_stats": True,
    "seed": 0,
}


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Start the engine of a job, generate, and shut it down."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ.update(job["environment"])
    began = time.monotonic()
    engine = None
    try:
        engine = LLM(model=job["model"], **{**OPTIONS, **job["options"]})
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=job["max_new_tokens"],
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        outputs = [o.outputs[0] for o in engine.generate(prompts, sampling, use_tqdm=False)]
        return {
            "tokens": [list(output.token_ids) for output in outputs],
            "logprobs": [
                [step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)]
                for o in outputs
            ],
            "num_layers": engine.model_config.hf_text_config.num_hidden_layers,
            "seconds": time.monotonic() - began,
        }
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began}
    finally:
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> None:
    """Answer each job until stdin ends. Engines write to descriptor 1: it is stderr for them."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        for line in sys.stdin:
            stdout.write(json.dumps(answer(json.loads(line))) + "\n")
            stdout.flush()


if __name__ == "__main__":
    main()
