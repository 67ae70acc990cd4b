"""Names of modules and patterns for them, written for the layers that stay.

Tools differ in how they read an entry of a list: as a whole name, the beginning, the end or a part
of one, a shell's pattern or a regular expression. What is written here means the same before and
after in each reading, on every module that any layer has, or it is refused.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from reprlib import repr as brief

from trsp.pruner.errors import UserError

# Whether a pattern takes a module, and a way to read one: tools differ in where it may begin.
_Matches = Callable[[str], bool]
_Reading = Callable[[str, str], _Matches]
_NUMBERED = re.compile(r"((?:.*\.)?(?:layers|h|blocks|block)\.)(0|[1-9][0-9]{0,8})(?=\.|$)(.*)")
_NUMBERED_ENTRY = re.compile(
    r"((?:.*\.)?(?:layers|h|blocks|block)\.)(0|[1-9][0-9]{0,8})(\*?$|\..*)"
)
_MAX_PATTERN = 500
_PATTERN = re.compile(r"[*?\[\]()|\\^$+{}]")
# Behind a letter it is read alike by a shell and as a regular expression, but for that letter.
_LAST_STAR = re.compile(r"(?<=[A-Za-z_])\*$")
# A whole number in a pattern that stands for itself: in no name, set of characters or count.
_INTEGER = re.compile(r"(?<![\w\\\[{,-])(0|[1-9][0-9]*)(?![\w\]},-])")
_DIGIT = re.compile(r"(?<![A-Za-z_\\])[0-9]")
_MATCHES_NOTHING = "(?!)"
# vLLM gives these names to modules that checkpoints have in parts, and patterns may use them.
_FUSED = (
    *("qkv_proj", "gate_up_proj", "up_gate_proj", "fused_qkv_a_proj", "in_proj_qkvz"),
    *("in_proj_ba", "query_key_value", "qkv", "w13"),
)


@dataclass(frozen=True)
class Renumbering:
    """The layers that stay and the names of all modules.

    Attributes:
        prefix: what stands before a decoder layer's number, as in "model.layers.".
        kept: source layers, ascending.
        num_layers: of the unpruned model.
        modules: every module that has a tensor, by its full name.
    """

    prefix: str
    kept: Sequence[int]
    num_layers: int
    modules: frozenset[str]

    def name(self, module: str) -> str | None:
        """A module's new name; None where its layer goes.

        Raises:
            UserError: it has a number, and nothing tells of which layers.
        """
        match = _NUMBERED.fullmatch(module)
        if match is None:
            return module
        stack, number, rest = match[1], int(match[2]), match[3]
        if not self._is_ours(stack):
            if any(known.startswith(stack) for known in self.modules):
                return module  # a tower's
            raise UserError(f"{brief(module)} names a layer of no stack that is in the weights")
        new = self.layer(number)
        return None if new is None else f"{stack}{new}{rest}"

    def layer(self, number: int) -> int | None:
        """A layer's new number; None where it goes. Draft layers stand behind the others."""
        if number >= self.num_layers:
            return number - self.num_layers + len(self.kept)
        return self._numbers.get(number)

    def is_one_layer(self, number: int) -> bool:
        """Whether no other layer's number begins with these digits, before and after."""
        new = self.layer(number)
        after = [layer for old in self._layers if (layer := self.layer(old)) is not None]
        return _is_no_beginning(number, self._layers) and (
            new is None or _is_no_beginning(new, after)
        )

    @cached_property
    def grid(self) -> dict[str, str | None]:
        """Every module that any layer has, in every layer, and the others: new names by old ones.

        A pattern that speaks of a module which one layer alone has still speaks of that layer.
        """
        rests, others = {""}, set()
        for module in self.modules:
            match = _NUMBERED.fullmatch(module)
            if match is not None and match[1] == self.prefix:
                rests |= set(_and_its_parents(match[3]))
            else:
                others.add(module)
        blocks = {rest.rpartition(".")[0] for rest in rests if rest.count(".") == 2}
        rests |= {f"{block}.{name}" for block in blocks for name in _FUSED}
        names: dict[str, str | None] = {module: module for module in others}
        for old in self._layers:
            new = self.layer(old)
            for rest in rests:
                renamed = None if new is None else f"{self.prefix}{new}{rest}"
                names[f"{self.prefix}{old}{rest}"] = renamed
        return names

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.kept)}

    @cached_property
    def _layers(self) -> range:
        """All layers, with those for drafting."""
        numbers = (
            int(match[2])
            for match in map(_NUMBERED.fullmatch, self.modules)
            if match is not None and match[1] == self.prefix
        )
        return range(max(self.num_layers, 1 + max(numbers, default=0)))

    def _is_ours(self, stack: str) -> bool:
        """Whether `stack` is the decoder's prefix, whole, shortened or with more before it."""
        dotted = f".{self.prefix}"
        return dotted.endswith(f".{stack}") or f".{stack}".endswith(dotted)


def _and_its_parents(rest: str) -> Iterator[str]:
    """A module and those it is in, which lists name as well: .mlp.experts.0, .mlp.experts, .mlp."""
    while rest:
        yield rest
        rest = rest.rpartition(".")[0]


def _is_no_beginning(number: int, layers: Iterable[int]) -> bool:
    digits = str(number)
    return not any(layer != number and str(layer).startswith(digits) for layer in layers)


class TellsLayersApartError(UserError):
    """A pattern that takes a module of some layers only."""


def from_start(field: str, pattern: str) -> _Matches:
    match = _compiled(field, pattern).match
    return lambda module: match(module) is not None


def _anywhere(field: str, pattern: str) -> _Matches:
    search = _compiled(field, pattern.removeprefix("re:")).search
    return lambda module: search(module) is not None


def _as_shell(field: str, pattern: str) -> _Matches:
    match = _compiled(field, pattern, fnmatch.translate).match
    return lambda module: match(module) is not None


# How lists are read: by ModelOpt and compressed-tensors, and by tools that differ.
SHELL_ONLY: tuple[_Reading, ...] = (_as_shell,)
ANY_READING: tuple[_Reading, ...] = (from_start, _anywhere, _as_shell)


def rewrite_entry(
    field: str,
    entry: str,
    renumbering: Renumbering,
    readings: tuple[_Reading, ...] = ANY_READING,
    *,
    is_whole: bool = False,
) -> str | None:
    """The entry of a list for the layers that stay; None where its layer goes.

    Args:
        readings: of an entry that is a pattern: it must take the same as each of them.
        is_whole: nobody reads a name as the beginning or a part of another one.
    Raises:
        UserError: tools differ in what it takes, or it cannot be written for the new numbers.
    """
    match = _NUMBERED_ENTRY.fullmatch(entry)
    # To a shell "3*" and "3.*" begin with this number; regular expressions read them otherwise.
    is_literal = from_start not in readings or not _PATTERN.search(_LAST_STAR.sub("", entry))
    if match is not None and is_literal and not _PATTERN.search(match[1]):
        stack, number, rest = match[1], int(match[2]), match[3]
        is_beginning = rest == "*" or (rest == "" and not is_whole)
        if is_beginning and not renumbering.is_one_layer(number):
            raise UserError(
                f"{field}: {brief(entry)} may be read as the beginning of other layers' names "
                "too; write the names of the layer's modules"
            )
        name = renumbering.name(f"{stack}{number}")
        return None if name is None else name + rest
    if _PATTERN.search(entry):
        return rewrite_pattern(field, entry, renumbering, readings)
    if re.match(r"[0-9]+(\.|$)", entry):
        raise UserError(f"{field}: {brief(entry)} begins with a number, maybe a layer's")
    return entry


def rewrite_or_expand(field: str, pattern: str, renumbering: Renumbering) -> list[str]:
    """A regular expression of compressed-tensors, or the names that it stands for."""
    try:
        rewritten = rewrite_pattern(field, pattern, renumbering, (from_start,))
    except TellsLayersApartError:
        matches = from_start(field, pattern)
        taken = sorted(filter(matches, renumbering.modules))
        return [name for old in taken if (name := renumbering.name(old)) is not None]
    return [] if rewritten is None else [f"re:{rewritten}"]


def rewrite_pattern(
    field: str, pattern: str, renumbering: Renumbering, readings: Sequence[_Reading]
) -> str | None:
    """The pattern that takes of the layers that stay what this one took; None where it is nothing.

    Raises:
        TellsLayersApartError: neither it nor it with the new numbers does.
        UserError: it is none; it has a number and takes no module at all.
    """
    grid = renumbering.grid
    before = [set(filter(reading(field, pattern), grid)) for reading in readings]
    if not any(before):
        if _DIGIT.search(pattern):
            raise UserError(
                f"{field}: the pattern {brief(pattern)} has a number, and takes no module"
            )
        return pattern
    wanted = [{new for old in taken if (new := grid[old]) is not None} for taken in before]
    if not any(wanted):
        return None
    names = [new for new in grid.values() if new is not None]

    def renumber(match: re.Match[str]) -> str:
        new = renumbering.layer(int(match[0]))
        return _MATCHES_NOTHING if new is None else str(new)

    for candidate in (pattern, _INTEGER.sub(renumber, pattern)):
        after = [set(filter(reading(field, candidate), names)) for reading in readings]
        if after == wanted:
            return candidate
    raise TellsLayersApartError(
        f"{field}: the pattern {brief(pattern)} tells layers apart, and cannot be written for "
        "their new numbers"
    )


def _compiled(field: str, pattern: str, translate: Callable[[str], str] = str) -> re.Pattern[str]:
    if len(pattern) > _MAX_PATTERN:
        raise UserError(f"{field}: a pattern has {len(pattern)} characters, at most {_MAX_PATTERN}")
    try:
        return re.compile(translate(pattern))
    except re.error as error:
        raise UserError(f"{field}: {brief(pattern)} is no regular expression: {error}") from error
