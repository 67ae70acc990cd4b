"""Acceptance files: limits that hold at the limit, and mistakes that do not pass for limits."""

from pathlib import Path
from typing import Any

import pytest

from trsp.bench.acceptance import VALUES, judge, read_criteria
from trsp.bench.audit_record import (
    Band,
    Closing,
    Copies,
    Domain,
    Generation,
    Greedy,
    Loops,
    Losses,
    Paired,
    Sums,
)
from trsp.pruner.errors import UserError

LOSSES = Losses(
    num_tokens=100, dense=2.0, pruned=2.0, increase=0.0, increase_quantiles={"50": 0.0},
    worst_increase=3.0, best_decrease=-3.0, tail_dense=8.0, tail_pruned=10.0, top1_agreement=0.8,
    top1_lost=0.1, kl=0.25,
)  # fmt: skip
GREEDY = Greedy(
    num_prompts=2, prompt_tokens=8, new_tokens=8, same_prefix=0.5, same_places=0.6, identical=0.0,
    worst=[],
)  # fmt: skip


def right(both: int, only_dense: int, only_pruned: int, neither: int, needed: int = 5) -> Paired:
    return Paired(
        num_prompts=16, both=both, only_dense=only_dense, only_pruned=only_pruned, neither=neither,
        lost=only_dense, gained=only_pruned, p=0.5, needed=needed,
    )  # fmt: skip


GENERATION = Generation(
    loops=Loops(
        new_tokens=64, free=right(4, 6, 2, 4), distinct_dense=0.5, distinct_pruned=0.4
    ),
    closing=Closing(
        prompt_tokens=64, new_tokens=64, num_places=40, opened={"(": 16}, right=right(9, 1, 3, 3)
    ),
    copies=[
        Copies(source="text", length=8, given=2, num_known=3, right=right(30, 10, 1, 1)),
        Copies(source="text", length=16, given=4, num_known=3, right=right(2, 2, 90, 1)),
        Copies(source="random", length=8, given=2, num_known=3, right=right(0, 60, 0, 0)),
    ],
    sums=[Sums(digits=1, right=right(3, 2, 0, 11)), Sums(digits=2, right=right(0, 4, 0, 12))],
    num_prompts=96,
    num_new_tokens=999,
    seconds=1.0,
)  # fmt: skip
RARE = Band(least=1, most=1, losses=LOSSES.model_copy(update={"increase": 0.75}))
# By criterion: what the domain below has.
MEASURED = {
    "perplexity_ratio": 1.0, "tail_ratio": 1.25, "worst_increase": 3.0, "rare_increase": 0.75,
    "top1_agreement": 0.8, "top1_lost": 0.1, "kl": 0.25, "greedy_prefix": 0.5,
    # Parts of which the dense model can do too little have no say in what was kept.
    "loops_increase": 0.25, "closed_kept": 0.9, "copy_kept": 0.75, "arithmetic_kept": 0.6,
}  # fmt: skip


def domain(name: str = "books", **changes: Any) -> Domain:
    fields: dict[str, Any] = {
        "name": name, "files": ["a.txt"], "protocol": {}, "dense_perplexity": 7.0,
        "pruned_perplexity": 7.0, "losses": LOSSES, "bands": [RARE], "greedy": GREEDY,
        "examples": [], "generation": GENERATION,
    }  # fmt: skip
    return Domain(**(fields | changes))


def criteria(text: str, tmp_path: Path, domains: tuple[str, ...] = ("books", "law")) -> Any:
    path = tmp_path / "accept.yaml"
    path.write_text(text)
    return read_criteria(path, domains)[0]


def test_every_criterion_is_measured_here() -> None:
    assert MEASURED.keys() == VALUES.keys()


@pytest.mark.parametrize("criterion", MEASURED)
def test_a_limit_is_met_at_the_limit_and_missed_beyond_it(criterion: str, tmp_path: Path) -> None:
    measured = MEASURED[criterion]
    better = -1e-6 if VALUES[criterion][1] == "at most" else 1e-6
    for limit, passed in ((measured, True), (measured + better, False), (measured - better, True)):
        (outcome,) = judge(criteria(f"{criterion}: {limit!r}", tmp_path), [domain()])
        assert outcome.value == pytest.approx(measured)
        assert outcome.passed is passed
        assert outcome.reason is None


def without(**parts: Any) -> dict[str, Any]:
    return {"generation": GENERATION.model_copy(update=parts)}


@pytest.mark.parametrize(
    ("criterion", "changes", "told"),
    [
        ("greedy_prefix", {"greedy": None}, "--prompts is 0"),
        ("rare_increase", {"bands": []}, "no tokens"),
        ("top1_lost", {"losses": LOSSES.model_copy(update={"top1_lost": None})}, "never right"),
        ("tail_ratio", {"losses": LOSSES.model_copy(update={"tail_dense": 0.0})}, "loses nothing"),
        ("loops_increase", {"generation": None}, "--prompts is 0"),
        ("closed_kept", {"generation": None}, "--prompts is 0"),
        ("copy_kept", {"generation": None}, "--prompts is 0"),
        ("arithmetic_kept", {"generation": None}, "--prompts is 0"),
        (
            "loops_increase",
            without(loops=GENERATION.loops.model_copy(update={"free": right(4, 0, 2, 10)})),
            "without a loop in 4 of 16; 5 are needed",
        ),
        (
            "closed_kept",
            without(closing=GENERATION.closing.model_copy(update={"right": right(4, 0, 0, 1)})),
            "closes 4 of 5 where 5 are needed",
        ),
        ("copy_kept", without(copies=GENERATION.copies[1:]), "copies 4 of 95 where 5 are needed"),
        ("copy_kept", without(copies=GENERATION.copies[2:]), "too short"),
        ("arithmetic_kept", without(sums=[]), "too short"),
        ("arithmetic_kept", without(sums=GENERATION.sums[1:]), "adds 4 of 16 where 5 are needed"),
    ],
)
@pytest.mark.parametrize("limit", ["0", "99"])
def test_what_was_not_measured_is_not_passed(
    criterion: str, changes: dict[str, Any], told: str, limit: str, tmp_path: Path
) -> None:
    (outcome,) = judge(criteria(f"{criterion}: {limit}", tmp_path), [domain(**changes)])
    assert outcome.value is None
    assert not outcome.passed
    assert outcome.reason is not None
    assert told in outcome.reason


def test_a_domain_has_limits_of_its_own(tmp_path: Path) -> None:
    text = "kl: 1\ndomains:\n  law: {kl: 0.1, top1_lost: 0.5}\n"
    found = judge(criteria(text, tmp_path), [domain("books"), domain("law")])
    told = [(outcome.domain, outcome.criterion, outcome.limit, outcome.passed) for outcome in found]
    assert told == [
        ("books", "kl", 1, True), ("law", "kl", 0.1, False), ("law", "top1_lost", 0.5, True),
    ]  # fmt: skip


def test_a_domain_has_limits_of_its_own_for_generation(tmp_path: Path) -> None:
    text = "copy_kept: 0.7\ndomains:\n  law: {copy_kept: 0.8, arithmetic_kept: 0.6}\n"
    found = judge(criteria(text, tmp_path), [domain("books"), domain("law")])
    told = [(outcome.domain, outcome.criterion, outcome.limit, outcome.passed) for outcome in found]
    assert told == [
        ("books", "copy_kept", 0.7, True), ("law", "copy_kept", 0.8, False),
        ("law", "arithmetic_kept", 0.6, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected limits by name"),
        ("- kl", "expected limits by name"),
        ("kl: [", "is not YAML"),
        ("{}", "sets no limit"),
        ("kl: 0.1\nkl: 99", "'kl' stands twice"),
        ("kl: yes", "kl: .*number"),
        ("kl: 2024-13-45", "is not YAML"),
        ("[" * 3000, "is not YAML"),
        ("domains: {law: {}}", "sets no limit"),
        ("klx: 1", "klx: .*the criteria are perplexity_ratio"),
        ("kl: much", "kl: .*number"),
        ("kl: .nan", "kl: .*finite"),
        ("domains: {poems: {kl: 1}}", "domain 'poems' is not audited; the audited ones are books"),
        ("domains: {law: {klx: 1}}", r"domains\.law\.klx"),
    ],
)
def test_mistakes_are_one_line(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told) as raised:
        criteria(text, tmp_path)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_criteria(tmp_path, ["books"])
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        read_criteria(large, ["books"])
