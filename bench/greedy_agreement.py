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

_BATCH = 16


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
    """Continue each prompt [P] greedily with both models, past any end of text.

    Prompts of one length go together, B at a time: nothing is padded.

    Args:
        progress: task "continuing", in prompts.
    """
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    found: dict[int, Continuation] = {}
    for numbers in by_length.values():
        for begin in range(0, len(numbers), _BATCH):
            progress("continuing", len(found), len(prompts))
            part = numbers[begin : begin + _BATCH]
            inputs = torch.stack([prompts[number] for number in part]).to(dense.device)
            answers = [_continued(model, inputs, new_tokens) for model in (dense, pruned)]
            for number, ours, theirs in zip(part, *answers, strict=True):
                found[number] = Continuation(tuple(prompts[number].tolist()), ours, theirs)
    progress("continuing", len(prompts), len(prompts))
    return [found[number] for number in range(len(prompts))]


def _continued(model: PreTrainedModel, inputs: Tensor, new_tokens: int) -> list[tuple[int, ...]]:
    """Token ids that follow each prompt [B, P]."""
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
    return [tuple(answer) for answer in ids[:, inputs.shape[1] :].tolist()]


def spread_prompts(ids: Tensor, *, count: int, length: int) -> list[Tensor]:
    """Prompts [P] from evenly spaced places of a text [S]; fewer where they would overlap."""
    count = max(1, min(count, len(ids) // length))
    spare = len(ids) - length
    starts = [round(n * spare / max(1, count - 1)) for n in range(count)]
    return [ids[start : start + length] for start in starts]
