"""How long two models go on alike: greedy continuations of the same prompts.

Perplexity hides what depth pruning does to generation, where one other token changes all that
follows (arXiv 2602.01997).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trsp.pruner.progress import Progress, silent


@dataclass(frozen=True)
class Continuation:
    """Token ids of one prompt and of what each model makes of it, both `new_tokens` long."""

    prompt: tuple[int, ...]
    dense: tuple[int, ...]
    pruned: tuple[int, ...]

    @property
    def same_prefix(self) -> int:
        """Tokens until the two first differ."""
        for place, (ours, theirs) in enumerate(zip(self.dense, self.pruned, strict=True)):
            if ours != theirs:
                return place
        return len(self.dense)

    @property
    def same_places(self) -> float:
        """Share of places with the same token."""
        pairs = zip(self.dense, self.pruned, strict=True)
        return sum(ours == theirs for ours, theirs in pairs) / len(self.dense)


@torch.no_grad()
def continue_prompts(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
    progress: Progress = silent,
) -> list[Continuation]:
    """Continue each prompt [P] greedily with both models, one at a time, past any end of text.

    Args:
        progress: task "continuing", in prompts.
    """
    found = []
    for number, prompt in enumerate(prompts):
        progress("continuing", number, len(prompts))
        inputs = prompt.unsqueeze(0).to(dense.device)
        answers = [_continued(model, inputs, new_tokens) for model in (dense, pruned)]
        found.append(Continuation(tuple(prompt.tolist()), *answers))
    progress("continuing", len(prompts), len(prompts))
    return found


def _continued(model: PreTrainedModel, inputs: Tensor, new_tokens: int) -> tuple[int, ...]:
    """Token ids that follow the prompt [1, P]."""
    generate: Any = model.generate
    own = model.generation_config
    # What is left out of a call is taken from here: an end-of-text token among it.
    model.generation_config = GenerationConfig()
    try:
        ids = generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )
    finally:
        model.generation_config = own
    answer: list[int] = ids[0, inputs.shape[1] :].tolist()
    return tuple(answer)


def spread_prompts(ids: Tensor, *, count: int, length: int) -> list[Tensor]:
    """Prompts [P] from evenly spaced places of a text [S]; fewer where they would overlap."""
    count = max(1, min(count, len(ids) // length))
    spare = len(ids) - length
    starts = [round(n * spare / max(1, count - 1)) for n in range(count)]
    return [ids[start : start + length] for start in starts]
