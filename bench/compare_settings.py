"""Settings of a recipe that a comparison has no use for: refused or told, never passed over.

A recipe says what one run of `trsp prune` does. A comparison takes its calibration, selection and
transfer; depths, seeds and held-out text are options of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trsp.pruner.errors import UserError
from trsp.pruner.recipe import Recipe, parse_setting

# Settings that options of `trsp compare` say instead.
COMPARE_OPTIONS: dict[str, tuple[str, ...]] = {
    "seed": ("--seed",),
    "ratio": ("--ratio", "--layers"),
    "layers": ("--layers", "--ratio"),
    "keep": ("--layers", "--ratio"),
    "evaluation.data": ("--eval-data",),
    "evaluation.window": ("--window",),
    "evaluation.max_tokens": ("--max-tokens",),
}
# Those that nothing says instead, and why.
_WITHOUT_USE = {
    "transfer.enabled": "a --method without +RECOVERY trains nothing",
    "auto": "nothing is searched: every --method takes the settings as they are",
    "evaluation.stride": "windows do not overlap",
    "evaluation.allow_overlap": "calibration text is never held-out text",
    "state_every_seconds": "each finished cell is kept",
}
_MAX_SEED = 2**31 - 1


def check_settings(
    recipe: Recipe,
    settings: Sequence[str],
    given: Iterable[str],
    options: Mapping[str, tuple[str, ...]] = COMPARE_OPTIONS,
) -> list[str]:
    """Refuse what would have no effect; a line for each that a recipe file merely carries.

    A file's setting that an option says instead is refused too, as its numbers would not be those
    that the file asks for, unless the option is given: options override the file.

    Args:
        recipe: the file with options and `settings` over it.
        settings: `section.name=value`, as --set takes them.
        given: the options of `options` that the user gave.
        options: by setting, what says it instead.
    Raises:
        UserError: a setting that differs from the default, named with what to do instead.
    """
    usual = Recipe().model_dump(mode="json")
    asked = recipe.model_dump(mode="json")
    typed = [parse_setting(setting) for setting in settings]
    given = set(given)
    told = []
    for name in (*COMPARE_OPTIONS, *_WITHOUT_USE):
        value = _at(asked, name)
        if value == _at(usual, name):
            continue
        by_hand = any(_names(document, name) for document in typed)
        instead = options.get(name, ())
        if instead and not by_hand and given & set(instead):
            continue
        remedy = (
            f"use {' or '.join(instead)}" if instead else _WITHOUT_USE.get(name, "leave it out")
        )
        said = f"{name}={_shown(value)}"
        if by_hand:
            raise UserError(f"--set {said} has no effect on a comparison: {remedy}")
        if instead:
            raise UserError(f"the recipe's {said} has no effect on a comparison: {remedy}")
        told.append(f"the recipe's {said} has no effect on a comparison: {remedy}")
    return told


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds as they are.   UserError: one is out of range, or comes twice."""
    for seed in seeds:
        if not 0 <= seed <= _MAX_SEED:
            raise UserError(f"--seed {seed} is not within 0 and {_MAX_SEED}; give a smaller one")
        if seeds.count(seed) > 1:
            raise UserError(
                f"--seed {seed} is given twice: its cells would count twice in means and "
                "intervals; give each seed once"
            )
    return tuple(seeds)


def _at(document: Any, name: str) -> Any:
    """What stands at `section.name`."""
    for key in name.split("."):
        document = document[key]
    return document


def _names(document: Any, name: str) -> bool:
    """Whether a nested document says something of `section.name`, or of a part of it."""
    for key in name.split("."):
        if not isinstance(document, dict) or key not in document:
            return False
        document = document[key]
    return True


def _shown(value: Any) -> str:
    """As --set writes it; of a section no more than that it is there."""
    if isinstance(value, dict):
        return "{...}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)
