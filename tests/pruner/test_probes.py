"""What counts as the same choice: ties are named, everything else and every NaN is a mismatch."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from trsp.pruner.errors import RunError, UserError
from trsp.pruner.probes import (
    Probe,
    agreement,
    context_length,
    difference,
    make_probes,
    num_new_tokens,
    served_agreement,
)
from trsp.pruner.vllm_process import ServedTokens

PROBES = (Probe("random", torch.zeros(1, 4, dtype=torch.long), 2),)
# One sequence of two steps over three tokens, of scale 10: the first step is close to a tie.
LOGITS = (torch.tensor([[[10.0, 10.0 - 5e-5, 0.0], [0.0, 3.0, 5.0]]]),)


def tokens(*row: int) -> tuple[torch.Tensor]:
    return (torch.tensor([row]),)


def test_equal_choices_agree() -> None:
    same = agreement(PROBES, tokens(0, 2), LOGITS)
    assert (same.num_tokens, same.num_ties, same.first_mismatch) == (2, 0, None)
    assert same.in_words() == "2 greedy tokens"


def test_a_tie_is_counted_and_named() -> None:
    same = agreement(PROBES, tokens(1, 2), LOGITS)
    assert (same.num_tokens, same.num_ties, same.first_mismatch) == (2, 1, None)
    assert same.in_words() == "2 greedy tokens, 1 of them ties within 1e-05"


@pytest.mark.parametrize("row", [(2, 2), (0, 1), (1, 0)])
def test_another_choice_is_a_mismatch(row: tuple[int, int]) -> None:
    assert agreement(PROBES, tokens(*row), LOGITS).first_mismatch


def test_a_mismatch_says_where() -> None:
    said = agreement(PROBES, tokens(0, 1), LOGITS).first_mismatch
    assert said == (
        "random prompt 0, step 1: token 1 against 2, whose logit is higher by 2.0e-01 of the scale"
    )


def test_nan_is_a_mismatch_even_where_the_tokens_are_equal() -> None:
    poisoned = (LOGITS[0].clone(),)
    poisoned[0][0, 1, 2] = math.nan
    chosen = int(poisoned[0][0, 1].argmax())
    assert agreement(PROBES, tokens(0, chosen), poisoned).first_mismatch


def test_difference_is_relative_to_the_reference_and_keeps_nan() -> None:
    found = difference([torch.tensor([1.0, 4.0])], [torch.tensor([1.0, -5.0])])
    assert (found.largest, found.scale, found.relative) == (9.0, 5.0, 1.8)
    assert math.isnan(difference([torch.tensor([math.nan])], [torch.tensor([1.0])]).relative)
    # Silence cannot hide a difference.
    assert difference([torch.tensor([0.5])], [torch.tensor([0.0])]).relative == 0.5


def served(*row: int) -> ServedTokens:
    logprobs = [float(LOGITS[0][0, n].log_softmax(-1)[token]) for n, token in enumerate(row)]
    return ServedTokens("engine", (row,), (tuple(value + 1e-3 for value in logprobs),))


def test_served_tokens_are_compared_up_to_the_first_tie() -> None:
    same, largest = served_agreement(PROBES, tokens(0, 2), LOGITS, served(0, 2))
    assert (same.num_tokens, same.num_ties, same.first_mismatch) == (2, 0, None)
    assert largest == pytest.approx(1e-3, rel=1e-3)
    # After another first token the second one answers another question.
    same, largest = served_agreement(PROBES, tokens(0, 2), LOGITS, served(1, 0))
    assert (same.num_tokens, same.num_ties, same.first_mismatch, largest) == (1, 1, None, 0.0)
    same, _ = served_agreement(PROBES, tokens(0, 2), LOGITS, served(0, 1))
    assert same.first_mismatch == (
        "random prompt 0, step 1: token 1 against 2, whose logit is higher by 2.0e-01 of the scale"
    )


def test_served_rows_of_another_length_are_refused() -> None:
    with pytest.raises(RunError, match="other numbers of tokens"):
        served_agreement(PROBES, tokens(0, 2), LOGITS, served(0))


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{"vocab_size": 40, "max_position_embeddings": 128, **changes})


def test_probes_are_equal_for_equal_seeds_and_avoid_special_tokens() -> None:
    first = make_probes(config(bos_token_id=7, eos_token_id=9), None)
    again = make_probes(config(bos_token_id=7, eos_token_id=9), None)
    other = make_probes(config(bos_token_id=7, eos_token_id=9), None, seed=1)
    assert torch.equal(first[0].input_ids, again[0].input_ids)
    assert not torch.equal(first[0].input_ids, other[0].input_ids)
    drawn = set(first[0].input_ids.unique().tolist())
    assert drawn.isdisjoint({7, 9})
    assert drawn >= set(range(40)) - {7, 9}


@pytest.mark.parametrize("context", [2, 3, 8, 63, 64, 4096])
def test_probes_and_continuations_fit_the_context(context: int) -> None:
    small = config(max_position_embeddings=context)
    assert context_length(small) == context
    assert num_new_tokens(small) >= 1
    for probe in make_probes(small, None):
        assert 1 <= probe.prompt_length <= probe.input_ids.shape[1] <= context
        assert probe.prompt_length + num_new_tokens(small) <= context


def test_a_context_of_one_token_is_refused() -> None:
    with pytest.raises(UserError, match="takes 1 tokens"):
        make_probes(config(max_position_embeddings=1), None)
