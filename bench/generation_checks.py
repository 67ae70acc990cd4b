"""What depth pruning takes from generation: loops, open brackets, copied strings, small sums.

Both models get the same prompts, so that each figure is a paired one: how many cases both get
right, only one of them, or neither. Depth pruning hurts such skills far more than it hurts
perplexity or classification (arXiv 2602.01997).

P tokens of a prompt, M new tokens, k tokens of a copied span, S tokens of the text.
"""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trsp.bench.audit_record import Closing, Copies, Generation, Loops, Paired, Sums
from trsp.bench.greedy_agreement import Continuation, continue_prompts
from trsp.bench.statistics import sign_test
from trsp.pruner.progress import Progress, silent
from trsp.pruner.token_ids import encode

# Open and close differ: of two equal signs nobody can say which one opens. No single quotes: the
# closing one is an apostrophe too.
BRACKETS = {"(": ")", "[": "]", "{": "}", "“": "”"}
COPY_LENGTHS = (8, 16)
DIGITS = (1, 2)
# Fewer cases than that, and one of them more or less decides.
LEAST_CASES = 5
# Below it is luck: one and the same number is right in 11 % of the sums of digits 1 to 9, and a
# model that copies no random span still had 3 % of the tokens of repeated text.
LEAST_SHARE = 0.2
# A cycle has to come three times; in fewer tokens than that any list of words does.
LEAST_LOOP_TOKENS = 16
CLOSING_TOKENS = 64
_SUM_TOKENS = 6
_SHOTS = 3
_BATCH = 16
_CHARS_PER_TOKEN = 16


@dataclass(frozen=True)
class Models:
    """Two models of one tokenizer; `bos` where it begins a text, `context` in tokens."""

    dense: PreTrainedModel
    pruned: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bos: int | None = None
    context: int | None = None

    def begun(self, ids: Sequence[int]) -> list[int]:
        """The ids with bos before them, where there is one."""
        return [*ids] if self.bos is None else [self.bos, *ids]

    def fits(self, num_tokens: int) -> bool:
        """Whether the context takes so many tokens."""
        return self.context is None or num_tokens <= self.context

    def text(self, ids: Sequence[int]) -> str:
        """What the ids say, up to an end of text."""
        kept = [*ids]
        if self.tokenizer.eos_token_id in kept:
            kept = kept[: kept.index(self.tokenizer.eos_token_id)]
        return str(self.tokenizer.decode(kept))


def measure_generation(
    models: Models,
    ids: Tensor,
    continuations: Sequence[Continuation],
    sums: Sequence[Sums],
    *,
    num_prompts: int,
    prompt_tokens: int,
    progress: Progress = silent,
) -> Generation:
    """All checks on one text.

    Args:
        ids: the text [S].
        continuations: greedy ones of its prompts, looked through for loops.
        sums: as `check_sums` finds them; they depend on no text.
        num_prompts: at most so many for each check.   prompt_tokens: P of open brackets, at most.
        progress: tasks "closing brackets" and "copying".
    """
    start = time.perf_counter()
    closing = check_closing(models, ids, num_prompts, prompt_tokens, progress)
    copies = check_copies(models, ids, num_prompts, progress)
    loops = check_loops(continuations)
    spans, questions = [one.right for one in copies], [one.right for one in sums]
    asked = [loops.free, closing.right, *spans, *questions]
    new_tokens = (
        loops.free.num_prompts * loops.new_tokens
        + closing.right.num_prompts * closing.new_tokens
        + sum(one.num_prompts * _SUM_TOKENS for one in questions)
    )
    return Generation(
        loops=loops,
        closing=closing,
        copies=copies,
        sums=list(sums),
        num_prompts=sum(one.num_prompts for one in asked),
        num_new_tokens=new_tokens,
        seconds=time.perf_counter() - start,
    )


def paired(
    dense: Sequence[Sequence[bool]],
    pruned: Sequence[Sequence[bool]],
    *,
    least_share: float = 0.0,
) -> Paired:
    """Count what both models get right.

    Cases of one prompt hang together, so that the test is over prompts: those in which the pruned
    model gets fewer right against those in which it gets more, as likely as each other where
    nothing was lost (two-sided exact binomial). With one case in each prompt it is McNemar's.

    Args:
        dense, pruned: for each prompt its cases, right or not.
        least_share: of the cases, that the dense model must get right for a comparison.
    Raises:
        ValueError: the models have other cases.
    """
    cases = [
        case
        for ours, theirs in zip(dense, pruned, strict=True)
        for case in zip(ours, theirs, strict=True)
    ]
    changes = [sum(theirs) - sum(ours) for ours, theirs in zip(dense, pruned, strict=True)]
    lost, gained = sum(change < 0 for change in changes), sum(change > 0 for change in changes)
    return Paired(
        num_prompts=len(dense),
        both=cases.count((True, True)),
        only_dense=cases.count((True, False)),
        only_pruned=cases.count((False, True)),
        neither=cases.count((False, False)),
        lost=lost,
        gained=gained,
        p=sign_test(lost, gained),
        needed=max(LEAST_CASES, math.ceil(least_share * len(cases))),
    )


def loops_at_end(tokens: Sequence[int]) -> bool:
    """Whether the last half repeats what came a cycle before, each token of it.

    The cycle is at most half of that half, so that it came at least three times.
    """
    half = len(tokens) // 2
    begin = len(tokens) - half
    return any(
        all(tokens[place] == tokens[place - period] for place in range(begin, len(tokens)))
        for period in range(1, half // 2 + 1)
    )


def distinct_share(tokens: Sequence[int], length: int = 3) -> float:
    """How many different runs of `length` tokens there are, over how many there are."""
    runs = [tuple(tokens[at : at + length]) for at in range(len(tokens) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def check_loops(continuations: Sequence[Continuation]) -> Loops:
    """How many continuations end in a loop; none is looked at that is too short to tell."""
    told = [one for one in continuations if len(one.dense) >= LEAST_LOOP_TOKENS]

    def distinct(answers: Sequence[Sequence[int]]) -> float | None:
        return float(np.mean([distinct_share(answer) for answer in answers])) if answers else None

    return Loops(
        new_tokens=len(told[0].dense) if told else 0,
        free=paired(
            [[not loops_at_end(one.dense)] for one in told],
            [[not loops_at_end(one.pruned)] for one in told],
        ),
        distinct_dense=distinct([one.dense for one in told]),
        distinct_pruned=distinct([one.pruned for one in told]),
    )


def find_open_brackets(text: str, reach: int) -> list[tuple[int, int]]:
    """Places in a text that are inside a bracket or quotation.

    Only what holds no sign of its own kind is taken: it is surely closed where it ends.

    Args:
        reach: a place lies at most so many characters before the closing sign.
    Returns:
        (place of the opening sign, place to cut the text at), in the order of the text. The cut
        is before a white space where there is one, so that no word is cut in two.
    """
    found = []
    for opening, closing in BRACKETS.items():
        own = re.escape(opening + closing)
        for match in re.finditer(f"{re.escape(opening)}([^{own}]+){re.escape(closing)}", text):
            begin, end = match.span(1)
            first = max(begin, end - reach)
            spaces = [at for at in range(max(first, begin + 1), end) if text[at].isspace()]
            middle = (first + end) // 2
            cut = min(spaces, key=lambda at: abs(at - middle)) if spaces else middle
            found.append((begin - 1, cut))
    return sorted(found)


def closes(answer: str, opening: str) -> bool:
    """Whether an answer closes what stands open before it; what it opens itself comes first."""
    depth = 1
    for sign in answer:
        depth += (sign == opening) - (sign == BRACKETS[opening])
        if not depth:
            return True
    return False


def check_closing(
    models: Models, ids: Tensor, num_prompts: int, prompt_tokens: int, progress: Progress = silent
) -> Closing:
    """How many brackets and quotations of the text [S] each model closes in M greedy tokens.

    M is as many tokens as the text itself needs characters, at most, to close them.
    """
    begins = models.bos is not None
    room = math.inf if models.context is None else models.context - begins
    new_tokens = int(min(CLOSING_TOKENS, room // 2))
    length = int(min(prompt_tokens, room - new_tokens))
    text = str(models.tokenizer.decode(ids.tolist()))
    places = find_open_brackets(text, new_tokens)
    prompts: list[tuple[str, list[int]]] = []
    # Not every place will do; so many are tried that a text full of others costs no more.
    for number in np.random.default_rng(0).permutation(len(places))[: 8 * num_prompts].tolist():
        if len(prompts) == num_prompts:
            break
        at, cut = places[number]
        before = text[max(0, cut - _CHARS_PER_TOKEN * length) : cut]
        prompt = encode(models.tokenizer, [before])[0][-length:]
        shown = str(models.tokenizer.decode(prompt))
        if shown.rfind(text[at]) > shown.rfind(BRACKETS[text[at]]):
            prompts.append((text[at], prompt))
    found = continue_prompts(
        models.dense,
        models.pruned,
        [torch.tensor(models.begun(prompt)) for _, prompt in prompts],
        new_tokens=new_tokens,
        progress=_named(progress, "closing brackets"),
    )
    signs = [opening for opening, _ in prompts]
    both = list(zip(found, signs, strict=True))
    return Closing(
        prompt_tokens=length,
        new_tokens=new_tokens,
        num_places=len(places),
        opened={sign: signs.count(sign) for sign in BRACKETS if sign in signs},
        right=paired(
            [[closes(models.text(one.dense), sign)] for one, sign in both],
            [[closes(models.text(one.pruned), sign)] for one, sign in both],
        ),
    )


def check_copies(
    models: Models, ids: Tensor, num_prompts: int, progress: Progress = silent
) -> list[Copies]:
    """How well each model says a span again: span, line break, the span's first quarter, and on.

    A case is a token of the rest of the span that is the most likely one after all before it
    (teacher-forced). A token that one of the models finds at first sight already, where there is
    nothing to copy, is no case: it may be known. Compared where the dense model copies a fifth.

    Spans of the text [S] do not overlap. Random ones are of tokens of the text, each once in a
    span, all as likely. No span longer than half the context or than the text has tokens for.
    """
    special = torch.tensor(sorted(set(models.tokenizer.all_special_ids)), dtype=ids.dtype)
    between = encode(models.tokenizer, ["\n"])[0]
    rng = np.random.default_rng(0)
    lengths = [k for k in COPY_LENGTHS if models.fits(len(models.begun(between)) + 2 * k)]
    found = []
    for length in lengths:
        blocks = ids[: len(ids) // length * length].view(-1, length)
        blocks = blocks[~torch.isin(blocks, special).any(1)]
        chosen = rng.permutation(len(blocks))[:num_prompts]
        if len(chosen):
            found.append(_copies(models, blocks[chosen], between, "text", progress))
    types = torch.unique(ids[~torch.isin(ids, special)])
    for length in lengths:
        if len(types) >= length:
            rows = [rng.permutation(len(types))[:length] for _ in range(num_prompts)]
            spans = types[torch.from_numpy(np.stack(rows))]
            found.append(_copies(models, spans, between, "random", progress))
    return found


@torch.no_grad()
def _copies(
    models: Models, spans: Tensor, between: list[int], source: str, progress: Progress
) -> Copies:
    """Copies of spans [n, k]."""
    count, length = spans.shape
    given = length // 4
    rows = [models.begun([*span, *between, *span]) for span in spans.tolist()]
    first = len(rows[0]) - 2 * length - len(between)
    again = first + length + len(between)
    seen: list[Tensor] = []
    known: list[Tensor] = []
    for model in (models.dense, models.pruned):
        parts = []
        for part in torch.tensor(rows).split(_BATCH):
            progress("copying", len(seen) * count, 2 * count)
            says = model(input_ids=part.to(model.device), use_cache=False).logits.argmax(-1)
            parts.append(says.cpu())
        says = torch.cat(parts)
        right = [says[:, at + given - 1 : at + length - 1] == spans[:, given:] for at in
                 (first, again)]  # fmt: skip
        known.append(right[0])
        seen.append(right[1])
    progress("copying", 2 * count, 2 * count)
    unknown = ~(known[0] | known[1])
    dense, pruned = (
        [row[cases].tolist() for row, cases in zip(right, unknown, strict=True)] for right in seen
    )
    return Copies(
        source="text" if source == "text" else "random",
        length=length,
        given=given,
        num_known=int((~unknown).sum()),
        right=paired(dense, pruned, least_share=LEAST_SHARE),
    )


def check_sums(models: Models, num_prompts: int, progress: Progress = silent) -> list[Sums]:
    """How many sums of two numbers of one and of two digits each model gets right.

    Three examples stand before the question, of other numbers and none with its answer, so that
    none can be copied. Compared only where the dense model gets a fifth right. Empty where the
    context is too short for the examples.
    """
    found = []
    for digits in DIGITS:
        sums = sum_prompts(num_prompts, digits)
        rows = [models.begun(encode(models.tokenizer, [prompt])[0]) for prompt, _ in sums]
        if not all(models.fits(len(row) + _SUM_TOKENS) for row in rows):
            continue
        answers = continue_prompts(
            models.dense,
            models.pruned,
            [torch.tensor(row) for row in rows],
            new_tokens=_SUM_TOKENS,
            progress=_named(progress, f"sums of {digits} digits"),
        )
        both = list(zip(answers, [total for _, total in sums], strict=True))
        right = paired(
            [[says_number(models.text(one.dense), total)] for one, total in both],
            [[says_number(models.text(one.pruned), total)] for one, total in both],
            least_share=LEAST_SHARE,
        )
        found.append(Sums(digits=digits, right=right))
    return found


def sum_prompts(count: int, digits: int) -> list[tuple[str, int]]:
    """Prompts that end in "=" and what is to come: different questions, the same each time."""
    least, most = 10 ** (digits - 1), 10**digits - 1
    numbers = range(least, most + 1)
    questions = [(a, b) for a in numbers for b in numbers]
    rng = np.random.default_rng(digits)
    prompts = []
    for at in rng.permutation(len(questions))[:count].tolist():
        a, b = questions[at]
        examples: list[tuple[int, int]] = []
        while len(examples) < _SHOTS:
            c, d = questions[int(rng.integers(len(questions)))]
            if c + d != a + b and (c, d) not in examples:
                examples.append((c, d))
        shown = "".join(f"{c} + {d} = {c + d}\n" for c, d in examples)
        prompts.append((f"{shown}{a} + {b} =", a + b))
    return prompts


def says_number(answer: str, number: int) -> bool:
    """Whether an answer begins with that number and no other."""
    match = re.match(r"\s*([0-9]+)(?![0-9]|[.,][0-9])", answer)
    return match is not None and int(match[1]) == number


def _named(progress: Progress, name: str) -> Progress:
    def renamed(task: str, completed: int, total: int) -> None:
        progress(name, completed, total)

    return renamed
