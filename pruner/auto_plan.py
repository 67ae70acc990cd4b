"""How much a search will train at most: known from the recipe and the number of layers alone."""

import math
from collections.abc import Collection

from trsp.pruner.auto_record import SearchPlan
from trsp.pruner.recipe import AutoRecipe, Recipe

MIN_RANKED_LAYERS = 3


def plan_search(recipe: Recipe, num_hidden_layers: int, needed: Collection[int] = ()) -> SearchPlan:
    """How much the search will train at most, beside a plain run; `recipe.auto` is set.

    `needed`: layers that no selection takes because of the model's family.
    """
    auto = section_of(recipe)
    selection, transfer = recipe.selection, recipe.transfer
    deepest = recipe.deepest_to_remove(num_hidden_layers, needed)
    rounds = deepest if selection.method == "gates" else 0
    halves = 2 * len(lambda1_values(recipe, num_hidden_layers, needed))
    transfers = 0
    if transfer.enabled:
        longer = steps_factors(recipe)
        transfers = 1 + len(rate_factors(recipe)) + sum(longer)
        if auto.max_increase is not None:
            transfers += math.ceil(math.log2(deepest + 1)) - 1
            transfers += (deepest - 1) * max(longer, default=1)
        transfers = min(auto.max_transfers, transfers)
    per_transfer = transfer.steps * transfer.batch_size
    steps = selection.first_round_steps + (rounds - 1) * selection.round_steps if rounds else 0
    ordering = steps * selection.batch_size
    stability = halves * selection.first_round_steps * selection.batch_size
    plain = ordering + (per_transfer if transfer.enabled else 0)
    return SearchPlan(
        gate_trainings=halves + rounds,
        plain_gate_trainings=rounds,
        transfers=transfers,
        plain_transfers=1 if transfer.enabled else 0,
        proportion=(stability + ordering + transfers * per_transfer) / plain if plain else 1.0,
    )


def section_of(recipe: Recipe) -> AutoRecipe:
    """The recipe's settings of its search."""
    assert recipe.auto is not None, "a search is run only where the recipe has its section"
    return recipe.auto


def rate_factors(recipe: Recipe) -> tuple[float, ...]:
    """Learning rates to try beside the recipe's own: none where nothing is trained."""
    return section_of(recipe).learning_rate_factors if recipe.transfer.steps else ()


def steps_factors(recipe: Recipe) -> tuple[int, ...]:
    """2, 4, ... times the recipe's steps, as far as they are to be tried."""
    most = section_of(recipe).max_steps_factor if recipe.transfer.steps else 1
    return tuple(2**doubling for doubling in range(1, most.bit_length()))


def lambda1_values(
    recipe: Recipe, num_hidden_layers: int, needed: Collection[int] = ()
) -> tuple[float, ...]:
    """What is tried for lambda1: none where gates choose nothing, or too few layers are ranked."""
    ranked = num_hidden_layers - len(recipe.protected_layers(num_hidden_layers) | set(needed))
    if recipe.selection.method != "gates" or ranked < MIN_RANKED_LAYERS:
        return ()
    return tuple(sorted({recipe.selection.lambda1, *section_of(recipe).lambda1}))
