"""Task files: the user's own items, checked line by line before any model runs."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trsp.pruner.bounded_json import parse_json_object
from trsp.pruner.errors import UserError, first_problem

MAX_FILE_BYTES = 2**26
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Choice(_Item):
    """A line of multiple choice: scored is the context, one space, and each choice."""

    context: Text
    choices: Annotated[list[Text], Field(min_length=2)]
    label: Count

    @model_validator(mode="after")
    def _sound(self) -> "Choice":
        if not self.context.strip() or self.context[-1].isspace():
            raise ValueError("context is blank or ends in white space; one space is put behind it")
        for number, choice in enumerate(self.choices):
            if not choice.strip() or choice[0].isspace():
                raise ValueError(f"choice {number} is blank or begins with white space")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("two choices are the same")
        if self.label >= len(self.choices):
            raise ValueError(
                f"label {self.label}: expected 0 to {len(self.choices) - 1}, the place of a choice"
            )
        return self


class Answer(_Item):
    """A line to answer: what the model writes behind the prompt, greedily, up to a line's end."""

    prompt: Text
    answer: Text

    @model_validator(mode="after")
    def _sound(self) -> "Answer":
        if not self.prompt.strip():
            raise ValueError("prompt is blank")
        if self.answer.strip() != self.answer or "\n" in self.answer:
            raise ValueError("answer has white space around it, or more than one line")
        return self


@dataclass(frozen=True)
class TaskFile:
    """A sound task file.   `items`: all of one form."""

    path: Path
    sha256: str
    items: Sequence[Choice] | Sequence[Answer]


def read_task_file(path: str | Path) -> TaskFile:
    """Read a task file: JSON objects, one a line, all `Choice` or all `Answer`.

    Raises:
        UserError: it cannot be read, is too large, empty, not UTF-8, or a line is of neither form;
            the text names the line.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{path}: is larger than {MAX_FILE_BYTES} bytes; split it into several")
    items: list[Any] = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        document = parse_json_object(line, where=where, unique_keys=True)
        form = Choice if "choices" in document else Answer if "answer" in document else None
        if form is None:
            raise UserError(
                f'{where}: expected {{"context": ..., "choices": [...], "label": ...}} or '
                '{"prompt": ..., "answer": ...}'
            )
        if items and not isinstance(items[0], form):
            raise UserError(f"{where}: choices and answers are mixed; make them two files")
        try:
            items.append(form.model_validate(document))
        except ValidationError as error:
            raise UserError(f"{where}: {first_problem(error)}") from error
    if not items:
        raise UserError(f"{path}: is empty; expected a JSON object a line")
    return TaskFile(path=path, sha256=hashlib.sha256(content).hexdigest(), items=items)
