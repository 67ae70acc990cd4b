"""The flags that a user gives to vLLM's server, read as vLLM reads them: also those in a file.

vLLM puts the flags of its `--config FILE` (YAML) before those of the command line, so the latter
win. Ours stand on the command line: a file that sets them too would lose without a word.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trsp.pruner.errors import UserError

MAX_CONFIG_BYTES = 2**20


def expand_config_file(flags: Sequence[str]) -> list[str]:
    """The flags with those of a `--config FILE` in front, in its place.

    Raises:
        UserError: no file, two of them, `--config=FILE` (which vLLM takes and does not read), or
            the file is no YAML mapping of flags.
    """
    words = list(flags)
    for word in words:
        if word.startswith("--config="):
            raise UserError(f"{word}: vLLM does not read it like this; write --config FILE")
    if "--config" not in words:
        return words
    place = words.index("--config")
    if words.count("--config") > 1 or place + 1 == len(words):
        raise UserError("--config: vLLM takes one file of flags; write --config FILE once")
    return [*_flags_of(Path(words[place + 1])), *words[:place], *words[place + 2 :]]


def flag_names(flags: Sequence[str]) -> Iterator[str]:
    """The names of the flags as vLLM documents them: it takes _ for -, and `--name.key value`."""
    for flag in flags:
        name = _name(flag)
        if name.startswith("-"):
            yield name


def flag_value(flags: Sequence[str], *names: str) -> str | None:
    """The value of a flag under any of its names, the last one given; None where there is none."""
    found = None
    for place, flag in enumerate(flags):
        if _name(flag) in names:
            _, equals, value = flag.partition("=")
            rest = flags[place + 1 : place + 2]
            found = value if equals else (rest[0] if rest else None)
    return found


def flag_number(flags: Sequence[str], *names: str, default: int) -> int:
    """The value of a flag that takes a number; `default` where it is none, which vLLM refuses."""
    value = flag_value(flags, *names) or ""
    return int(value) if value.isascii() and value.isdecimal() else default


def _name(flag: str) -> str:
    name = flag.partition("=")[0].partition(".")[0]
    return name.replace("_", "-") if name.startswith("--") else name


def _flags_of(file: Path) -> list[str]:
    """What vLLM makes of a file of flags: false and empty lists are left out."""
    import yaml

    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"--config {file}: vLLM reads .yaml and .yml files; give one of these")
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_CONFIG_BYTES:
        raise UserError(f"--config {file}: is larger than {MAX_CONFIG_BYTES} bytes, no flags")
    try:
        document: Any = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"--config {file}: is not YAML: {problem}") from error
    if not isinstance(document, dict) or not all(isinstance(name, str) for name in document):
        raise UserError(f"--config {file}: is no mapping of flags; write lines such as port: 8001")
    words: list[str] = []
    for name, value in document.items():
        if value is False or value == []:
            continue
        if isinstance(value, dict):
            value = json.dumps(value, default=str)
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    return words
