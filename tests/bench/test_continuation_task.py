"""A task made of text: what is asked, that chance cannot answer it, and what is refused."""

from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trsp.bench.continuation_task import app, continuation_items
from trsp.bench.task_file import Choice, read_task_file
from trsp.pruner.errors import UserError

DOCUMENTS = [" ".join(f"w{document}.{number}" for number in range(103)) for document in range(3)]


def items(num_items: int = 24, seed: int = 0) -> list[Choice]:
    return continuation_items(
        DOCUMENTS, num_items=num_items, context_words=8, choice_words=4, num_choices=4, seed=seed
    )


def test_the_labelled_choice_is_what_follows_the_context() -> None:
    texts = {document: f"{document} " for document in DOCUMENTS}
    for item in items():
        whole = f"{item.context} {item.choices[item.label]} "
        assert any(whole in text for text in texts.values())
        assert len(set(item.choices)) == 4


def test_passages_do_not_overlap() -> None:
    contexts = Counter(word for item in items() for word in item.context.split())
    assert set(contexts.values()) == {1}
    assert len(contexts) == 24 * 8


def test_labels_are_everywhere_and_wrong_choices_are_right_elsewhere() -> None:
    found = items(12)
    assert {item.label for item in found} == {0, 1, 2, 3}
    right = {item.choices[item.label] for item in found}
    assert {choice for item in found for choice in item.choices} == right


def test_a_seed_repeats() -> None:
    assert items() == items()
    assert items(seed=1) != items()


@pytest.mark.parametrize("text", ["a b x c d x e f y", "a b x a b y e f z"])
def test_what_begins_or_ends_as_another_does_is_left_out(text: str) -> None:
    """Of two choices that both follow there is no right one."""
    numbers = {"context_words": 2, "choice_words": 1, "num_choices": 2, "seed": 0}
    with pytest.raises(UserError, match="has 2 passages of 3 words"):
        continuation_items([text], num_items=3, **numbers)
    assert len(continuation_items([text], num_items=2, **numbers)) == 2


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_items": 25}, "has 24 passages of 12 words .* 25 items need so many"),
        ({"num_items": 3}, "--items 3: expected at least 4"),
        ({"num_choices": 1}, "--choices 1: expected at least 2"),
        ({"context_words": 0}, "--context-words 0"),
        ({"choice_words": 0}, "--choice-words 0"),
    ],
)
def test_numbers_that_cannot_be(numbers: dict[str, int], message: str) -> None:
    usual = {"num_items": 4, "context_words": 8, "choice_words": 4, "num_choices": 4, "seed": 0}
    with pytest.raises(UserError, match=message):
        continuation_items(DOCUMENTS, **{**usual, **numbers})


def test_the_command_writes_a_task_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "made" / "goes_on.jsonl"
    text.write_text(" ".join(f"wört{number}" for number in range(600)))
    words = ["--text", str(text), "--out", str(out), "--items", "9"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "9 questions of 4 choices; chance is 25%" in found.output
    assert len(read_task_file(out).items) == 9
    monkeypatch.setattr("trsp.bench.continuation_task.MAX_FILE_BYTES", 100)
    large = CliRunner().invoke(app, [*words[:3], str(tmp_path / "large.jsonl"), *words[4:]])
    assert large.exit_code == 2
    assert "a task file at most 100: give fewer --items" in large.output
    assert not (tmp_path / "large.jsonl").exists()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert CliRunner().invoke(app, [*words[:3], str(tmp_path / "task.json")]).exit_code == 2
