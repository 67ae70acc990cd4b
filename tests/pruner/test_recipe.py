"""Recipe: YAML, flags and --set are one model, validated once, refused by place."""

from pathlib import Path

import pytest

from trsp.pruner.errors import UserError
from trsp.pruner.recipe import Recipe, build_recipe, parse_setting, recipe_yaml


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("ratio: 0.5\nseed: 3\ntransfer: {steps: 7, lambda2: 0.5}\n")
    recipe = build_recipe(
        file=file, preset="paper", flags={"seed": 4}, settings=("transfer.lambda2=1e-3",)
    )
    assert (recipe.ratio, recipe.seed) == (0.5, 4)
    assert (recipe.transfer.steps, recipe.transfer.lambda2) == (7, 1e-3)
    assert recipe.selection.gate_kind == "output", "the preset stays where nothing overrides it"


def test_saved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = build_recipe(settings=("keep=[0, 2, 5]", "transfer.lora={rank: 4, alpha: 8}"))
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_yaml(recipe))
    assert build_recipe(file=file) == recipe


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("transfer.lamda2=1",), "transfer.lamda2"),
        (("ratio=0",), "ratio"),
        (("ratio=1",), "ratio"),
        (("ratio=.nan",), "ratio"),
        (("ratio=0.5", "layers=3"), "choose one"),
        (("keep=[1, 1, 2]",), "repeated"),
        (("transfer.batch_size=4", "transfer.micro_batch_size=3"), "not a multiple"),
        (("transfer.distill_weight=0",), "nothing to learn from"),
        (("schema_version=2",), "schema_version"),
        (("nonsense",), "section.name=value"),
        (("transfer.lambda2={",), "not YAML"),
    ],
)
def test_bad_settings_are_named(settings: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError, match=named):
        build_recipe(settings=settings)


def test_alias_bombs_and_huge_files_are_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text("a: &a [1, 1]\nb: [*a, *a]\n")
    with pytest.raises(UserError, match="aliases"):
        build_recipe(file=bomb)
    huge = tmp_path / "huge.yaml"
    huge.write_text("# " + "x" * (1 << 20))
    with pytest.raises(UserError, match="larger than"):
        build_recipe(file=huge)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("0.5", 0.5), ("true", True)])
def test_a_setting_is_read_as_its_type(text: str, value: object) -> None:
    assert parse_setting(f"a.b={text}") == {"a": {"b": value}}


def test_counts() -> None:
    assert Recipe().num_to_remove(16) == 4
    assert Recipe(layers=3).num_to_remove(16) == 3
    assert Recipe(keep=(0, 1)).num_to_remove(16) == 14
    for recipe, layers in ((Recipe(layers=6), 6), (Recipe(ratio=0.01), 6), (Recipe(keep=()), 6)):
        with pytest.raises(UserError, match="not pruning"):
            recipe.num_to_remove(layers)


def test_protected_layers_count_from_both_ends() -> None:
    recipe = build_recipe(settings=("selection.protected=[0, -1]",))
    assert recipe.protected_layers(8) == {0, 7}
    with pytest.raises(UserError, match="layer 9"):
        build_recipe(settings=("selection.protected=[9]",)).protected_layers(8)
