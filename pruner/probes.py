"""What the proof asks a model, and how two models' answers are compared.

The same questions go to the pruned model and to the dense one with the dropped layers masked:
logits at every position, and greedy continuations. Everything is drawn from a seed.

N sequences of a batch, T tokens each, P tokens of prompt, S generated tokens, V vocabulary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trsp.pruner.errors import RunError, UserError
from trsp.pruner.vllm_process import ServedTokens

NUM_RANDOM_SEQUENCES = 4
SEQUENCE_LENGTH = 64
RANDOM_PROMPT_LENGTH = 16
NUM_NEW_TOKENS = 32
# A window is crossed by one more sequence; at 4096 tokens a CPU would spend minutes on it.
MAX_WINDOW = 1024
# Kernels that sum in another order differ by about 1e-6 of the logits in fp32 (8e-7 measured with
# the cache on and off, 12 layers of hidden size 128); what is closer is no choice but a tie.
TIE_TOLERANCE = 1e-5
# Linear attention computes a prompt in chunks and a token from its state, by other formulas: 1.7e-4
# to 3.7e-4 on dense pico Qwen3-Next.
RECURRENT_TOLERANCE = 1e-3

_TEXT = (
    "The old lighthouse keeper climbed the stairs once more, counted the ships in the bay, and "
    "wrote the number 27 into the book; outside, the wind had turned to the north-west. He read "
    "the page twice before he closed it, since nobody else would ever look at what he had written."
)
_NAMES_A_TOKEN = re.compile(r"_token_(id|index)$")


@dataclass(frozen=True)
class Probe:
    """A batch of equally long sequences, [N, T]; their first `prompt_length` tokens are prompts."""

    kind: str
    input_ids: Tensor
    prompt_length: int

    @property
    def prompts(self) -> Tensor:
        return self.input_ids[:, : self.prompt_length]


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens [N, S] with the KV cache, and the logits [N, S, V] each was chosen from."""

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Difference:
    """The largest |a - b| over all logits, beside the scale, the largest |b|; NaN if any is."""

    largest: float
    scale: float

    @property
    def relative(self) -> float:
        return self.largest / self.scale if self.scale else self.largest

    def measured(self) -> dict[str, float]:
        return {
            "max_difference": self.largest,
            "logit_scale": self.scale,
            "relative_difference": self.relative,
        }

    def in_words(self) -> str:
        if self.largest == 0:
            return f"0, at a logit scale of {self.scale:.3g}"
        return f"{self.largest:.1e}, {self.relative:.1e} of the logit scale {self.scale:.3g}"


@dataclass(frozen=True)
class Agreement:
    """How often two models choose the same token given the same tokens before it.

    `ties`: choices that differ while the other model's logits of the two tokens are within
    `tie_tolerance` of the logit scale. `first_mismatch`: where they differ otherwise, in words.
    """

    num_tokens: int
    num_ties: int
    first_mismatch: str | None
    tie_tolerance: float = TIE_TOLERANCE

    def measured(self) -> dict[str, float]:
        return {"num_tokens": self.num_tokens, "num_ties": self.num_ties}

    def in_words(self) -> str:
        ties = ""
        if self.num_ties:
            ties = f", {self.num_ties} of them ties within {self.tie_tolerance:g}"
        return f"{self.num_tokens} greedy tokens{ties}"


def make_probes(
    config: Any, tokenizer: PreTrainedTokenizerBase | None, *, seed: int = 0
) -> tuple[Probe, ...]:
    """The probes for a model of this (transformers) config, clipped to its context.

    Random tokens over the whole vocabulary but for the special ones; a text where there is a
    tokenizer; and random tokens beyond the attention window where it is at most MAX_WINDOW.

    Raises:
        UserError: the context is below two tokens.
    """
    language = config.get_text_config(decoder=True)
    context = context_length(config)
    if context is not None and context < 2:
        raise UserError(f"the model takes {context} tokens at a time; a proof needs two")
    generator = torch.Generator().manual_seed(seed)
    special = {
        value
        for part in (config, language)
        for name, value in part.to_dict().items()
        if _NAMES_A_TOKEN.search(name) and isinstance(value, int)
    }
    ordinary = [token for token in range(language.vocab_size) if token not in special]
    vocabulary = torch.tensor(ordinary or list(range(language.vocab_size)))

    def random(num_sequences: int, length: int) -> Tensor:
        shape = (num_sequences, length)
        return vocabulary[torch.randint(len(vocabulary), shape, generator=generator)]

    def probe(kind: str, input_ids: Tensor, prompt_length: int) -> Probe:
        if context is not None:
            input_ids = input_ids[:, :context]
            prompt_length = min(prompt_length, context - num_new_tokens(config))
        return Probe(kind, input_ids, min(prompt_length, input_ids.shape[1]))

    probes = [probe("random", random(NUM_RANDOM_SEQUENCES, SEQUENCE_LENGTH), RANDOM_PROMPT_LENGTH)]
    if tokenizer is not None:
        text = tokenizer(_TEXT)["input_ids"][:SEQUENCE_LENGTH]
        if text:
            probes.append(probe("text", torch.tensor([text]), len(text)))
    window = getattr(language, "sliding_window", None)
    if isinstance(window, int) and RANDOM_PROMPT_LENGTH < window <= MAX_WINDOW:
        length = window + NUM_NEW_TOKENS
        if context is None or length <= context:
            # The window is crossed halfway through the continuation, with the cache filled.
            probes.append(probe("window", random(1, length), window - NUM_NEW_TOKENS // 2))
    return tuple(probes)


def context_length(config: Any) -> int | None:
    """The most tokens the model takes at a time; None when its config does not say."""
    value = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def num_new_tokens(config: Any) -> int:
    """Tokens generated for each prompt: NUM_NEW_TOKENS, or half of a context that is smaller."""
    context = context_length(config)
    return NUM_NEW_TOKENS if context is None else min(NUM_NEW_TOKENS, context // 2)


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits [N, T, V] of token ids [N, T], without a cache; fp32 on the CPU."""
    output = model(input_ids=input_ids.to(model.device), use_cache=False)
    logits: Tensor = output.logits.float().cpu()
    return logits


@torch.no_grad()
def continue_with_cache(model: PreTrainedModel, probe: Probe) -> Continuation:
    """Continue each prompt greedily, one token at a time with the KV cache; no token ends it.

    Raises:
        UserError: the model gives no cache.
    """
    num_steps = num_new_tokens(model.config)
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    inputs, cache = probe.prompts.to(model.device), None
    for _ in range(num_steps):
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        if cache is None:
            raise UserError(f"{type(model).__name__} returned no KV cache with use_cache=True")
        logits.append(output.logits[:, -1].float().cpu())
        inputs = output.logits[:, -1:].argmax(-1)
        tokens.append(inputs.cpu())
    return Continuation(torch.cat(tokens, 1), torch.stack(logits, 1))


def continuation_logits(model: PreTrainedModel, probe: Probe, tokens: Tensor) -> Tensor:
    """Logits [N, S, V] from which a model without a cache chooses each of `tokens` [N, S].

    One forward pass over prompt and continuation: what comes later cannot change what a causal
    model says earlier, so if every choice is the next token, greedy generation step by step gives
    `tokens` (by induction over the steps).
    """
    sequence = torch.cat([probe.prompts, tokens[:, :-1]], 1)
    return logits_of(model, sequence)[:, probe.prompt_length - 1 :]


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Difference:
    """The largest difference between equally shaped logits, and the scale of `theirs`."""
    largest = torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max()
    scale = torch.stack([b.abs().max() for b in theirs]).max()
    return Difference(float(largest), float(scale))


def is_recurrent(config: Any) -> bool:
    """Whether some layers carry a state instead of keys and values; of a text model's config."""
    return "linear_attention" in (getattr(config, "layer_types", None) or ())


def tie_tolerance(config: Any) -> float:
    """How close two logits are, of their scale, where a choice between them is no choice."""
    return RECURRENT_TOLERANCE if is_recurrent(config) else TIE_TOLERANCE


def agreement(
    probes: Sequence[Probe],
    tokens: Sequence[Tensor],
    logits: Sequence[Tensor],
    tie_tolerance: float = TIE_TOLERANCE,
) -> Agreement:
    """Compare chosen `tokens` [N, S] with what `logits` [N, S, V] of the other model would choose.

    Every position counts, also after a tie: both were given the same tokens before it.
    """
    scale = max(float(batch.abs().max()) for batch in logits)
    num_tokens, num_ties, first_mismatch = 0, 0, None
    for probe, chosen, offered in zip(probes, tokens, logits, strict=True):
        num_tokens += chosen.numel()
        best = offered.amax(-1)
        # `not <=` and not `>`: a NaN is a mismatch.
        taken = offered.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        margins = (best - taken) / scale
        differs = (offered.argmax(-1) != chosen) | margins.isnan()
        mismatch = differs & ~(margins <= tie_tolerance)
        num_ties += int((differs & ~mismatch).sum())
        if first_mismatch is None and mismatch.any():
            sequence, step = mismatch.nonzero()[0].tolist()
            first_mismatch = (
                f"{probe.kind} prompt {sequence}, step {step}: token "
                f"{int(chosen[sequence, step])} against {int(offered[sequence, step].argmax())}, "
                f"whose logit is higher by {float(margins[sequence, step]):.1e} of the scale"
            )
    return Agreement(num_tokens, num_ties, first_mismatch, tie_tolerance)


def served_agreement(
    probes: Sequence[Probe],
    tokens: Sequence[Tensor],
    logits: Sequence[Tensor],
    served: ServedTokens,
) -> tuple[Agreement, float]:
    """Compare a server's own greedy tokens with ours, up to the first tie of each sequence.

    Args:
        tokens, logits: ours, [N, S] and [N, S, V] for each probe.
        served: one row of S tokens for each sequence, in the order of the probes.
    Returns:
        the agreement, and the largest difference in the log-probability of a token that both
        chose after the same tokens.
    Raises:
        RunError: `served` has another number of rows or tokens.
    """
    ours = torch.cat(list(tokens))
    if [len(row) for row in served.tokens] != [ours.shape[1]] * len(ours):
        raise RunError(f"{served.engine} gave other numbers of tokens than asked for")
    scale = max(float(batch.abs().max()) for batch in logits)
    kinds = [probe.kind for probe in probes for _ in range(len(probe.prompts))]
    rows = [row for batch in logits for row in batch]
    num_tokens, num_ties, first_mismatch, largest = 0, 0, None, 0.0
    for sequence, (kind, row) in enumerate(zip(kinds, rows, strict=True)):
        for step, token in enumerate(served.tokens[sequence]):
            num_tokens += 1
            if token != ours[sequence, step]:
                margin = float(row[step].max() - row[step, token]) / scale
                if margin <= TIE_TOLERANCE:
                    num_ties += 1
                elif first_mismatch is None:
                    first_mismatch = (
                        f"{kind} prompt {sequence}, step {step}: token {token} against "
                        f"{int(ours[sequence, step])}, whose logit is higher by {margin:.1e} of "
                        "the scale"
                    )
                break
            expected = float(row[step].log_softmax(-1)[token])
            largest = max(largest, abs(served.logprobs[sequence][step] - expected))
    return Agreement(num_tokens, num_ties, first_mismatch), largest
