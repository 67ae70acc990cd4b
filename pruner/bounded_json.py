"""Reading JSON from files that may be hostile: too large, too deep, repeated keys, or no JSON."""

import json
import os
from pathlib import Path
from typing import Any

from trsp.pruner.errors import UserError

# Nothing read here nests deeper than about 10; code that walks a document may then recurse.
MAX_DEPTH = 64


def read_json_object(
    path: str | os.PathLike[str], *, max_bytes: int, unique_keys: bool = False
) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: the file is missing, unreadable, over `max_bytes`, or not what parse_json_object
            takes; the text begins with the path.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise UserError(f"{path}: is larger than {max_bytes} bytes, far more than it should hold")
    return parse_json_object(content, where=str(path), unique_keys=unique_keys)


def parse_json_object(content: bytes, *, where: str, unique_keys: bool = False) -> dict[str, Any]:
    """Parse UTF-8 bytes as a JSON object; `where` begins the text of an error.

    Raises:
        UserError: not UTF-8, not JSON, no object, nested over MAX_DEPTH, or, with `unique_keys`,
            a key that is repeated within one object.
    """

    def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document: dict[str, Any] = {}
        for key, value in pairs:
            if key in document:
                raise UserError(f"{where}: the key {key!r} is repeated; the file is damaged")
            document[key] = value
        return document

    too_deep = UserError(f"{where}: is nested too deep to be what it should be")
    try:
        text = content.decode()
        document = json.loads(text, object_pairs_hook=refuse_repeats if unique_keys else None)
    except UserError:
        raise
    except RecursionError as error:
        raise too_deep from error
    except ValueError as error:
        raise UserError(f"{where}: is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{where}: holds {type(document).__name__}, expected a JSON object")
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        children = [
            child for node in level for child in (node.values() if isinstance(node, dict) else node)
        ]
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return document
    raise too_deep
