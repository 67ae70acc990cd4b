"""A zero-shot task of choices out of one's own text: which passage goes on from here?

    python -m trsp.bench.continuation_task --text heldout.txt --out goes_on.jsonl

For `trsp tasks` and `trsp compare --task`, offline and in the domain that counts. The form is
HellaSwag's (arXiv 1905.07830), without its adversarial filter: the wrong choices are what really
follows other contexts of the same task, so that, where all of it is asked, each passage is right
once and a model that does not look at the context is at chance. Lines and runs of white space
become single spaces: for code or verse this is not the text's own form.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trsp.bench.task_file import MAX_FILE_BYTES, Choice
from trsp.pruner.console import ErrorsAsExitCodes
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError
from trsp.pruner.text_files import read_texts

app = typer.Typer(cls=ErrorsAsExitCodes, add_completion=False, pretty_exceptions_enable=False)


def continuation_items(
    documents: Sequence[str],
    *,
    num_items: int,
    context_words: int,
    choice_words: int,
    num_choices: int,
    seed: int,
) -> list[Choice]:
    """Draw items from passages that do not overlap; a word is what white space parts.

    Args:
        documents: texts; no passage goes from one into the next.
        num_items: at least num_choices.
        num_choices: at least 2, one of them right.
    Raises:
        UserError: a number is too small, or the text does not hold so many passages of which no
            two begin or end with the same words.
    """
    for name, number, least in (
        ("context-words", context_words, 1),
        ("choice-words", choice_words, 1),
        ("choices", num_choices, 2),
        ("items", num_items, num_choices),
    ):
        if number < least:
            raise UserError(f"--{name} {number}: expected at least {least}")
    length = context_words + choice_words
    passages = []
    contexts, endings = set(), set()
    for document in documents:
        words = document.split()
        for start in range(0, len(words) - length + 1, length):
            context = " ".join(words[start : start + context_words])
            ending = " ".join(words[start + context_words : start + length])
            if context not in contexts and ending not in endings:
                contexts.add(context)
                endings.add(ending)
                passages.append((context, ending))
    if len(passages) < num_items:
        raise UserError(
            f"the text has {len(passages)} passages of {length} words (parted by white space) that "
            f"begin and end as no other does; {num_items} items need so many: give more text, or "
            "fewer --items, --context-words or --choice-words"
        )
    chance = random.Random(seed)
    chosen = chance.sample(passages, num_items)
    items = []
    for context, ending in chosen:
        others = (passage[1] for passage in chance.sample(chosen, num_choices))
        choices = [other for other in others if other != ending][: num_choices - 1]
        label = chance.randrange(num_choices)
        choices.insert(label, ending)
        items.append(Choice(context=context, choices=choices, label=label))
    return items


# A group's only action rather than a command: groups are what turns errors into exit codes.
@app.callback(invoke_without_command=True)
def main(
    text: Annotated[list[Path], typer.Option(help="held-out text; file or folder, repeatable")],
    out: Annotated[Path, typer.Option(help="task file to write, .jsonl")],
    items: Annotated[int, typer.Option(help="questions")] = 1000,
    context_words: Annotated[int, typer.Option(help="before the choices")] = 48,
    choice_words: Annotated[int, typer.Option(help="of each choice")] = 12,
    choices: Annotated[int, typer.Option(help="of which one is right")] = 4,
    seed: Annotated[int, typer.Option()] = 0,
    text_field: Annotated[str, typer.Option(help="of jsonl and parquet rows")] = "text",
) -> None:
    """Write a zero-shot task of choices made of your own text."""
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: expected a name that ends in .jsonl")
    if out.exists():
        raise UserError(f"--out {out}: is there already; give another name")
    found = continuation_items(
        list(read_texts(text, text_field)),
        num_items=items,
        context_words=context_words,
        choice_words=choice_words,
        num_choices=choices,
        seed=seed,
    )
    lines = (json.dumps(item.model_dump(), ensure_ascii=False) for item in found)
    content = "".join(f"{line}\n" for line in lines).encode()
    if len(content) > MAX_FILE_BYTES:
        raise UserError(
            f"the task would have {len(content)} bytes, a task file at most {MAX_FILE_BYTES}: give "
            "fewer --items, --choices, --context-words or --choice-words"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, content)
    typer.echo(
        f"{out}: {len(found)} questions of {choices} choices; chance is {1 / choices:.0%}", err=True
    )


if __name__ == "__main__":
    app()
