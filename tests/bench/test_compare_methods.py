"""Methods are read as they are written, or refused with what was meant."""

import pytest

from trsp.bench.compare_methods import (
    ALL_METHODS,
    DEFAULT_METHODS,
    RECOVERIES,
    REFERENCE,
    SELECTIONS,
    Method,
    parse_method,
)
from trsp.pruner.errors import UserError
from trsp.pruner.recipe import PRESETS, Recipe, build_recipe


def test_a_name_is_read_as_it_is_written() -> None:
    for name in (*ALL_METHODS, "sleb+half_labels", "last+distil@flops"):
        assert parse_method(name).name == name
    assert parse_method("sleb+finetune@flops") == Method("sleb", "finetune", "flops")
    assert REFERENCE in DEFAULT_METHODS
    assert len(set(DEFAULT_METHODS)) == len(DEFAULT_METHODS)
    assert set(DEFAULT_METHODS) < set(ALL_METHODS)
    assert len(set(ALL_METHODS)) == len(ALL_METHODS)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("slub", "did you mean sleb"),
        ("sleb+finetun", "did you mean finetune"),
        ("sleb+", "recovery '' is unknown"),
        ("sleb@flops", "SELECTION"),
        ("sleb+finetune@seconds", "SELECTION"),
        ("laco+transfer", "already folded"),
        ("trsp+transfer@flops", "what the budget is taken from"),
        ("", "selection '' is unknown"),
    ],
)
def test_what_is_no_method_is_refused(name: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem.replace("(", r"\(")):
        parse_method(name)


def test_every_label_is_its_own() -> None:
    methods = [Method(selection) for selection in SELECTIONS]
    methods += [Method("sleb", recovery) for recovery in RECOVERIES]
    methods += [Method("sleb", "distil", "flops"), parse_method(REFERENCE)]
    assert len({method.label for method in methods}) == len(methods)


def test_recoveries_are_valid_recipes_and_mean_what_they_say() -> None:
    recipe = Recipe()
    for recovery in RECOVERIES:
        Method("gates", recovery).transfer_recipe(recipe)
    assert parse_method(REFERENCE).transfer_recipe(recipe) == recipe.transfer
    finetune = Method("gates", "finetune").transfer_recipe(recipe)
    assert (finetune.closing, finetune.distill_weight) == ("at_once", 0.0)


def test_the_papers_method_is_the_papers_preset() -> None:
    paper = build_recipe(preset="paper")
    method = parse_method("paper_output_gates+penalty")
    assert method.transfer_recipe(Recipe()) == paper.transfer
    assert method.selection_recipe(Recipe()) == paper.selection
    assert "paper" in PRESETS
