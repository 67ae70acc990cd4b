"""Checks of generation: counts by hand, stand-ins that can do a thing and ones that cannot."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from trsp.bench.audit_cli import generation_lines
from trsp.bench.generation_checks import (
    CLOSING_TOKENS,
    Models,
    check_closing,
    check_copies,
    check_loops,
    check_sums,
    closes,
    distinct_share,
    find_open_brackets,
    loops_at_end,
    measure_generation,
    paired,
    says_number,
    sum_prompts,
)
from trsp.bench.greedy_agreement import Continuation
from trsp.pruner.token_ids import encode

PROSE = "The captain (a man of few words) said “we shall wait” and went [as he had to] below. "


@pytest.fixture(scope="module")
def tokenizer(pico_llama: Path) -> PreTrainedTokenizerBase:
    return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(pico_llama))


class StandIn:
    """A model of the HF interface: the next token by a function of all before it."""

    def __init__(self, following: Callable[[list[int]], int], vocab_size: int = 288) -> None:
        self.following, self.vocab_size = following, vocab_size
        self.device = torch.device("cpu")
        self.generation_config = GenerationConfig()
        self.prompts: list[list[int]] = []

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(len(ids)):
                logits[row, place, self.following(ids[: place + 1])] = 1
        return SimpleNamespace(logits=logits)

    def generate(self, inputs: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        rows = inputs.tolist()
        self.prompts += [[*row] for row in rows]
        for row in rows:
            for _ in range(max_new_tokens):
                row.append(self.following(row))
        return torch.tensor(rows)


def copier(ids: list[int]) -> int:
    """What came after the longest earlier match of the end; token 1 where there is none."""
    for length in range(len(ids) - 1, 0, -1):
        for begin in range(len(ids) - length):
            if ids[begin : begin + length] == ids[-length:]:
                return ids[begin + length]
    return 1


def stubborn(ids: list[int]) -> int:
    return 1


def answering(
    tokenizer: PreTrainedTokenizerBase, answer: Callable[[str], str]
) -> Callable[[list[int]], int]:
    """Say the answer to the prompt and then line breaks, whatever tokens that takes."""
    before: list[int] = []
    rest: list[int] = []

    def following(ids: list[int]) -> int:
        nonlocal before, rest
        if ids != before:
            rest = encode(tokenizer, [answer(tokenizer.decode(ids)) + "\n" * 200])[0]
        token, rest = rest[0], rest[1:]
        before = [*ids, token]
        return token

    return following


def models(
    dense: Callable[[list[int]], int],
    pruned: Callable[[list[int]], int],
    tokenizer: Any,
    **words: Any,
) -> Models:
    return Models(cast(Any, StandIn(dense)), cast(Any, StandIn(pruned)), tokenizer, **words)


# Counts


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(6, 0, 2 / 64), (0, 6, 2 / 64), (1, 0, 1.0), (0, 0, 1.0), (3, 3, 1.0), (8, 1, 20 / 512)],
)
def test_the_exact_test_of_mcnemar(lost: int, gained: int, p: float) -> None:
    dense = [[True]] * lost + [[False]] * gained + [[True]] * 4 + [[False]] * 2
    pruned = [[False]] * lost + [[True]] * gained + [[True]] * 4 + [[False]] * 2
    found = paired(dense, pruned)
    assert (found.both, found.only_dense, found.only_pruned, found.neither) == (4, lost, gained, 2)
    assert (found.lost, found.gained, found.num_prompts) == (lost, gained, lost + gained + 6)
    assert found.p == pytest.approx(p)
    if lost + gained:
        assert found.p == pytest.approx(binomtest(lost, lost + gained, 0.5).pvalue)


def test_tokens_of_one_prompt_are_no_evidence_of_their_own() -> None:
    found = paired([[True] * 20, [False, True]], [[False] * 20, [True, False]])
    assert (found.only_dense, found.only_pruned) == (21, 1)
    assert (found.lost, found.gained, found.p) == (1, 0, 1.0)


@pytest.mark.parametrize(
    ("right", "share", "needed"), [(5, 0.0, 5), (4, 0.0, 5), (7, 0.2, 8), (8, 0.2, 8)]
)
def test_how_much_the_dense_model_must_do(right: int, share: float, needed: int) -> None:
    rows = [[True]] * right + [[False]] * (40 - right)
    found = paired(rows, rows, least_share=share)
    assert found.needed == needed
    assert found.comparable is (right >= needed)


def test_other_cases_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired([[True]], [[]])


# Loops


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([7] * 32, True),
        ([*range(14), *[3, 4] * 9], True),
        # It came round for the first time within the last half.
        ([*range(16), *[3, 4] * 8], False),
        ([*range(20), *[3] * 12], False),
        ([*range(100, 111), *([1, 2, 3, 4, 5] * 5)[:21]], True),
        ([*range(100, 112), *[1, 2, 3, 4, 5] * 4], False),
        # Three rounds of eight; of nine the half has not two.
        ([*range(100, 108), *[*range(8)] * 3], True),
        (([*range(9)] * 4)[:32], False),
        # One other token in the last round.
        ([*[5, 6] * 15, 5, 9], False),
        ([*range(32)], False),
        ([int(digit) for digit in "31415926535897932384626433832795"], False),
        ([], False),
    ],
)
def test_a_loop_is_a_cycle_over_the_last_half(tokens: list[int], looping: bool) -> None:
    assert loops_at_end(tokens) is looping


def test_distinct_runs() -> None:
    assert distinct_share([1, 2, 3, 4, 5]) == 1
    assert distinct_share([1] * 12) == 0.1
    assert distinct_share([1, 2]) == 1


def test_loops_of_both_models() -> None:
    straight, round_ = tuple(range(16)), (4, 5) * 8
    found = check_loops([
        Continuation((1,), straight, round_), Continuation((1,), straight, straight),
    ])  # fmt: skip
    assert (found.free.both, found.free.only_dense, found.new_tokens) == (1, 1, 16)
    assert found.distinct_dense == 1
    assert found.distinct_pruned == pytest.approx((1 + 2 / 14) / 2)


def test_short_continuations_tell_of_no_loop() -> None:
    found = check_loops([Continuation((1,), (1,) * 15, (1,) * 15)])
    assert (found.free.cases, found.free.comparable, found.distinct_dense) == (0, False, None)


# Brackets


def test_brackets_are_found_where_the_text_is_inside_one() -> None:
    found = find_open_brackets(PROSE, reach=40)
    told = [(PROSE[at], PROSE[at + 1 : cut]) for at, cut in found]
    assert told == [("(", "a man of"), ("“", "we shall"), ("[", "as he")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a (b c d", []),
        ("a b) c", []),
        ("“one “two three” four", [("“", "two")]),
        ("((x y))", [("(", "x")]),
        ("f(xy)", [("(", "x")]),
        ("()", []),
        ("'a b' \"c d\"", []),
        ("{" + "word " * 20 + "}", [("{", "word " * 19)]),
    ],
)
def test_brackets_that_are_open_surely(text: str, told: list[tuple[str, str]]) -> None:
    found = find_open_brackets(text, reach=10)
    assert [(text[at], text[at + 1 : cut].rstrip()) for at, cut in found] == [
        (sign, inside.rstrip()) for sign, inside in told
    ]


@pytest.mark.parametrize(
    ("answer", "opening", "closed"),
    [
        (" few words) said", "(", True),
        (" few (or no) words) said", "(", True),
        (" few (or no) words", "(", False),
        (" few words] said”", "(", False),
        (" wait,” he said", "“", True),
        ("", "[", False),
    ],
)
def test_what_an_answer_closes(answer: str, opening: str, closed: bool) -> None:
    assert closes(answer, opening) is closed


def test_brackets_closed_and_left_open(tokenizer: Any) -> None:
    ids = torch.tensor(encode(tokenizer, [PROSE * 4])[0])
    pair = models(
        answering(tokenizer, lambda prompt: " on) on] on”"), answering(tokenizer, lambda _: " on"),
        tokenizer,
    )  # fmt: skip
    found = check_closing(pair, ids, 9, 64)
    assert found.num_places == 12
    assert sum(found.opened.values()) == 9
    assert set(found.opened) == {"(", "[", "“"}
    assert (found.right.only_dense, found.right.both, found.right.neither) == (9, 0, 0)
    assert found.right.p == pytest.approx(2 / 2**9)
    for prompt in cast(Any, pair.dense).prompts:
        shown = tokenizer.decode(prompt)
        assert shown.endswith((" (a man of", " “we shall", " [as he"))
        assert shown in PROSE * 4
    again = check_closing(pair, ids, 9, 64)
    assert again == found


def test_a_bracket_before_the_prompt_is_not_open_in_it(tokenizer: Any) -> None:
    text = "(" + "word after word " * 10 + ")"
    ids = torch.tensor(encode(tokenizer, [text])[0])
    pair = models(stubborn, stubborn, tokenizer)
    assert check_closing(pair, ids, 4, 8).right.cases == 0
    assert check_closing(pair, ids, 4, 400).right.cases == 1


def test_an_end_of_text_closes_nothing(tokenizer: Any) -> None:
    ids = torch.tensor(encode(tokenizer, [PROSE])[0])
    end = tokenizer.eos_token
    pair = models(
        answering(tokenizer, lambda _: " on) on] on”"),
        answering(tokenizer, lambda _: f"{end} on) on] on”"),
        tokenizer,
    )
    found = check_closing(pair, ids, 3, 64).right
    assert (found.both, found.only_dense) == (0, 3)


def test_brackets_fit_the_context(tokenizer: Any) -> None:
    ids = torch.tensor(encode(tokenizer, [PROSE * 4])[0])
    pair = models(stubborn, stubborn, tokenizer, bos=0, context=65)
    found = check_closing(pair, ids, 4, 64)
    assert (found.prompt_tokens, found.new_tokens) == (32, 32)
    prompts = cast(Any, pair.dense).prompts
    assert {len(prompt) for prompt in prompts} == {33}
    assert all(prompt[0] == 0 for prompt in prompts)
    assert check_closing(models(stubborn, stubborn, tokenizer), ids, 4, 8).new_tokens == (
        CLOSING_TOKENS
    )


# Copies


def test_a_copier_and_one_that_never_copies(tokenizer: Any) -> None:
    ids = torch.arange(2, 282)
    found = check_copies(models(copier, stubborn, tokenizer), ids, 10)
    assert [(one.source, one.length, one.given) for one in found] == [
        ("text", 8, 2), ("text", 16, 4), ("random", 8, 2), ("random", 16, 4),
    ]  # fmt: skip
    for one in found:
        assert one.num_known == 0
        assert one.right.only_dense == one.right.cases == 10 * (one.length - one.given)
        assert (one.right.lost, one.right.p) == (10, pytest.approx(2 / 2**10))
    turned = check_copies(models(stubborn, copier, tokenizer), ids, 10)
    assert [one.right.only_pruned for one in turned] == [one.right.cases for one in found]
    assert not any(one.right.comparable for one in turned)


@pytest.mark.parametrize(("every", "comparable"), [(8, False), (4, True)])
def test_copies_are_compared_from_a_fifth_on(every: int, comparable: bool, tokenizer: Any) -> None:
    """A model that copies one token in `every`, and finds none at first sight."""
    ids = torch.arange(0, 280)

    def some(seen: list[int]) -> int:
        return copier(seen) if copier(seen) % every == 0 else 287

    found = check_copies(models(some, stubborn, tokenizer), ids, 60)[-1].right
    assert found.dense > 5
    assert found.comparable is comparable
    assert found.needed == math.ceil(0.2 * found.cases)


def test_what_is_known_at_first_sight_is_no_copy(tokenizer: Any) -> None:
    ids = torch.arange(2, 282)
    found = check_copies(models(lambda seen: seen[-1] + 1, copier, tokenizer), ids, 4)
    of_text = [one for one in found if one.source == "text"]
    assert [one.num_known for one in of_text] == [4 * 6, 4 * 12]
    assert all(one.right.cases == 0 for one in of_text)


@pytest.mark.parametrize("bos", [None, 0])
def test_the_second_span_is_asked_for_and_not_another_place(
    bos: int | None, tokenizer: Any
) -> None:
    """Models that know only places: one is right in the second span, the other one token off."""
    between = encode(tokenizer, ["\n"])[0]

    def shifted(by: int) -> Callable[[list[int]], int]:
        def following(ids: list[int]) -> int:
            begun = ids[bos is not None :]
            for length in (8, 16):
                at = len(begun) - length - len(between) - by
                if begun[length : length + len(between)] == between and 0 <= at < length:
                    return begun[at]
            return 1

        return following

    ids = torch.tensor([token for token in range(2, 282) if token not in between])
    found = check_copies(models(shifted(0), shifted(1), tokenizer, bos=bos), ids, 6)
    for one in found:
        assert one.right.only_dense == one.right.cases == 6 * (one.length - one.given)


def test_spans_do_not_overlap_nor_hold_special_tokens(tokenizer: Any) -> None:
    special = tokenizer.all_special_ids[0]
    ids = torch.arange(2, 50)
    ids[[3, 20]] = special
    found = check_copies(models(copier, copier, tokenizer), ids, 16)
    # 48 tokens: six spans of 8, of which two hold the end of a text; three of 16, of which one not.
    assert [one.right.num_prompts for one in found] == [4, 1, 16, 16]


def test_copies_that_do_not_fit_are_left_out(tokenizer: Any) -> None:
    ids = torch.arange(2, 282)
    between = len(encode(tokenizer, ["\n"])[0])
    found = check_copies(models(copier, copier, tokenizer, context=16 + between), ids, 2)
    assert {one.length for one in found} == {8}
    assert check_copies(models(copier, copier, tokenizer, context=15 + between), ids, 2) == []
    assert check_copies(models(copier, copier, tokenizer), torch.arange(2, 8), 2) == []


# Sums


def calculator(prompt: str) -> str:
    a, b = re.findall(r"(\d+) \+ (\d+) =$", prompt)[0]
    return f" {int(a) + int(b)}"


@pytest.mark.parametrize("digits", [1, 2])
def test_sums_by_hand(digits: int) -> None:
    prompts = sum_prompts(16, digits)
    assert len({prompt.splitlines()[-1] for prompt, _ in prompts}) == 16
    for prompt, total in prompts:
        *examples, question = prompt.splitlines()
        assert re.fullmatch(rf"\d{{{digits}}} \+ \d{{{digits}}} =", question)
        assert calculator(prompt) == f" {total}"
        assert len(set(examples)) == 3
        for example in examples:
            a, b, c = map(int, re.findall(r"\d+", example))
            assert a + b == c != total
    assert sum_prompts(16, digits) == prompts
    assert len(sum_prompts(1000, 1)) == 81


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 12\n3", True), ("12", True), ("12.", True), ("12 + 1", True), (" 121", False),
        (" 1 2", False), (" 12.5", False), ("x 12", False), ("-12", False), ("", False),
    ],
)  # fmt: skip
def test_an_answer_is_the_number(answer: str, right: bool) -> None:
    assert says_number(answer, 12) is right


def test_sums_of_a_calculator_and_of_none(tokenizer: Any) -> None:
    able, unable = (answering(tokenizer, say) for say in (calculator, lambda _: " 1"))
    for one in check_sums(models(able, unable, tokenizer), 16):
        assert one.right.only_dense == 16
        assert one.right.comparable
    # Nothing is said of a pruned model that can where the dense one cannot.
    turned = check_sums(models(unable, able, tokenizer), 16)
    assert [one.digits for one in turned] == [1, 2]
    for one in turned:
        assert one.right.only_pruned == 16
        assert not one.right.comparable


@pytest.mark.parametrize(("num_right", "comparable"), [(7, False), (8, True)])
def test_sums_are_compared_from_a_fifth_on(
    num_right: int, comparable: bool, tokenizer: Any
) -> None:
    able = {prompt for prompt, _ in sum_prompts(40, 2)[:num_right]}
    some = answering(tokenizer, lambda prompt: calculator(prompt) if prompt in able else " 1")
    found = check_sums(models(some, stubborn, tokenizer), 40)[1].right
    assert (found.dense, found.needed, found.comparable) == (num_right, 8, comparable)


def test_sums_that_do_not_fit_are_left_out(tokenizer: Any) -> None:
    assert check_sums(models(stubborn, stubborn, tokenizer, context=12), 4) == []


# All of it


def test_the_whole_and_its_words(tokenizer: Any) -> None:
    ids = torch.tensor(encode(tokenizer, [PROSE * 8])[0])
    able = answering(tokenizer, lambda prompt: " on) on] on”")
    pair = models(able, stubborn, tokenizer)
    straight, round_ = tuple(range(32)), (4, 5) * 16
    continuations = [Continuation((1,), straight, round_)] * 12
    found = measure_generation(
        pair, ids, continuations, check_sums(pair, 12), num_prompts=12, prompt_tokens=32
    )
    assert found.num_prompts == 12 * 2 + sum(one.right.num_prompts for one in found.copies) + 24
    assert found.num_new_tokens == 12 * 32 + 12 * CLOSING_TOKENS + 24 * 6
    domain = SimpleNamespace(name="sea", greedy=None, generation=found)
    loops, brackets, *_, last_sums, total = generation_lines(cast(Any, domain))
    assert loops == (
        "sea: continuations without a loop at their end: dense 12, pruned 0 of 12; 12 lost, 0 "
        "gained; LOST (p 0.00049 over 12 prompts); different runs of three tokens 100% -> 7%"
    )
    assert "closed in 64 tokens: dense 12, pruned 0 of 12; 12 lost, 0 gained; LOST" in brackets
    assert "2-digit numbers: the dense model cannot do it: 0 of 12 right, 5 needed" in last_sums
    assert total.startswith(f"sea: {found.num_prompts:,} prompts")


@pytest.mark.parametrize(
    ("count", "verdict"),
    [(5, "no difference shown (p 0.062 over 5 prompts)"), (6, "LOST (p 0.031 over 6 prompts)")],
)
def test_few_prompts_show_no_difference(count: int, verdict: str, tokenizer: Any) -> None:
    ids = torch.tensor(encode(tokenizer, [PROSE * 8])[0])
    pair = models(stubborn, stubborn, tokenizer)
    one = Continuation((1,), tuple(range(32)), (4, 5) * 16)
    found = measure_generation(pair, ids, [one] * count, [], num_prompts=1, prompt_tokens=32)
    domain = SimpleNamespace(name="sea", greedy=None, generation=found)
    assert verdict in generation_lines(cast(Any, domain))[0]
    swapped = Continuation((1,), one.pruned, one.dense)
    again = check_loops([swapped] * count).free
    assert (again.gained, again.comparable) == (count, False)
