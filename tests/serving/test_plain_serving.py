"""What pruning writes is an ordinary checkpoint: stock vLLM serves it, and as transformers does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FAMILIES = ("llama", "qwen3", "gemma3", "opt")
# fp32 in both, in another order of summation: 4e-6 was the most seen.
LOGPROB_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def transformers_greedy(prompts: list[list[int]]) -> Any:
    """transformers_greedy(folder, count): the greedy tokens and log-probabilities of each prompt"""
    from transformers import AutoModelForCausalLM

    def generate(folder: Path, count: int) -> tuple[list[list[int]], list[list[float]]]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokens, logprobs = [], []
        for prompt in prompts:
            output = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            new = output.sequences[0, len(prompt) :].tolist()
            steps = zip(output.logits, new, strict=True)
            tokens.append(new)
            logprobs.append(
                [step[0].double().log_softmax(-1)[token].item() for step, token in steps]
            )
        return tokens, logprobs

    return generate


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_checkpoint_is_served_as_transformers_runs_it(
    family: str, pico: Any, serve: Any, transformers_greedy: Any
) -> None:
    pruned = pico(family).pruned
    served = serve(pruned)
    tokens, logprobs = transformers_greedy(pruned, len(served.tokens[0]))
    assert served.num_layers == 5
    assert served.largest_difference(type(served)(tokens, logprobs, 5)) < LOGPROB_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_would_see_a_wrong_layer(
    family: str, pico: Any, serve: Any, transformers_greedy: Any, tmp_path: Path
) -> None:
    """The same number of layers, one of them another: no token sequence survives that."""
    from trsp.pruner.api import compact
    from trsp.pruner.checkpoint import open_checkpoint
    from trsp.pruner.layer_map import BaseModel, LayerMap, read_layer_map

    case = pico(family)
    order = read_layer_map(case.layer_map).removal_order
    base = BaseModel(family, 8, open_checkpoint(case.dense).fingerprint)
    other = LayerMap.from_removal_order(base, (*order[: case.num_removals - 1], order[-1]))
    wrong = compact(case.dense, other, tmp_path / "wrong")
    served = serve(case.pruned)
    tokens, _ = transformers_greedy(wrong, len(served.tokens[0]))
    assert all(ours != theirs for ours, theirs in zip(served.tokens, tokens, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_greedy_tokens_are_no_loop(family: str, pico: Any, serve: Any) -> None:
    """A model that repeats one token would agree with much."""
    for row in serve(pico(family).pruned).tokens:
        assert len(set(row)) >= 6, row


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_the_windows_of_the_layers_that_stay_are_at_work(
    family: str, pico: Any, serve: Any, transformers_greedy: Any, tmp_path: Path
) -> None:
    """Qwen3 in vLLM wants one kind of layer, Gemma 3 takes both: each cut is what it can serve."""
    full, sliding = "full_attention", "sliding_attention"
    pruned = pico(family).pruned
    config = json.loads((pruned / "config.json").read_text())
    mixed = [sliding, full, sliding, sliding, full]
    assert config["layer_types"] == ([sliding] * 5 if family == "qwen3" else mixed)
    windowless = shutil.copytree(pruned, tmp_path / "windowless")
    (windowless / "config.json").write_text(json.dumps({**config, "layer_types": [full] * 5}))
    served = serve(pruned)
    tokens, _ = transformers_greedy(windowless, len(served.tokens[0]))
    assert all(ours != theirs for ours, theirs in zip(served.tokens, tokens, strict=True))
