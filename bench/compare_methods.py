"""What `trsp compare` compares: a way to choose layers, then nothing or a way to train.

A method is written SELECTION, SELECTION+RECOVERY or SELECTION+RECOVERY@flops: with the same
training steps as TRSP, or with as many as TRSP's whole budget of operations pays for.
"""

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from trsp.pruner.errors import UserError, first_problem
from trsp.pruner.recipe import Recipe, SelectionRecipe, TransferRecipe

# The product's selection by name: what differs from the run's own recipe.
_PAPER: dict[str, Any] = {"method": "gates", "num_candidates": 1, "protected": ()}
OURS: dict[str, dict[str, Any]] = {
    "trsp": {},
    "gates": {"method": "gates"},
    "gates_unverified": {"method": "gates", "num_candidates": 1},
    "gates_once": {"method": "gates", "round_steps": 0},
    "influence_verified": {"method": "block_influence"},
    "paper_output_gates": {**_PAPER, "gate_kind": "output"},
    "paper_residual_gates": {**_PAPER, "gate_kind": "residual"},
}
ONE_SHOT = "gates_one_shot"
# They leave the weights alone (baseline_orders, baseline_joint).
LAYER_CHOICES = (
    "random", "last", "block_influence", "angular", "sleb", "one_shot_loss", "taylor",
    "joint_gates",
)  # fmt: skip
# They change kept weights while they choose (baseline_merge, baseline_streamline).
FOLDS = ("laco", "replace_me", "streamline")
SELECTIONS = (*OURS, ONE_SHOT, *LAYER_CHOICES, *FOLDS)

# Ways to train: what differs from the recipe's transfer section.
_LABELS = {"label_weight": 1.0, "distill_weight": 0.0}
RECOVERIES: dict[str, dict[str, Any]] = {
    "transfer": {},
    "local": {"closing": "local", "steps": 0},
    "refit": {"closing": "refit", "steps": 0},
    "penalty": {**_LABELS, "closing": "never", "norm": "l2"},
    "penalty_l1": {**_LABELS, "closing": "never", "norm": "l1"},
    "finetune": {**_LABELS, "closing": "at_once"},
    "distil": {"closing": "at_once"},
    # Ablations of the transfer.
    "refit_distil": {"closing": "refit"},
    "labels": _LABELS,
    "half_labels": {"label_weight": 0.5, "distill_weight": 0.5},
    "entropy": {"by_entropy": True},
    "hidden": {"hidden_weight": 1.0},
    "linear": {"closing": "linear"},
    "linear_no_penalty": {"closing": "linear", "lambda2": 0.0},
    "progressive": {"closing": "progressive"},
    "penalty_distil": {"closing": "never"},
}
REFERENCE = "trsp+transfer"
LABELS = {
    "trsp": "TRSP selection",
    "gates": "gates, verified",
    "gates_unverified": "gates",
    "gates_one_shot": "gates, one shot",
    "gates_once": "gates trained once, verified",
    "influence_verified": "block influence, verified",
    "paper_output_gates": "paper's gates (output)",
    "paper_residual_gates": "paper's gates (residual)",
    "random": "random",
    "last": "last layers",
    "block_influence": "ShortGPT",
    "angular": "angular block (UIDL)",
    "sleb": "SLEB",
    "one_shot_loss": "one-shot PPL",
    "taylor": "Taylor+",
    "joint_gates": "joint gates (straight-through)",
    "laco": "LaCo-style merge",
    "replace_me": "ReplaceMe-style fold",
    "streamline": "LLM-Streamline-style layer",
}
_TRAINED = ("finetune", "finetune@flops", "distil", "distil@flops")


def _methods(trained: tuple[str, ...]) -> tuple[str, ...]:
    """Every selection alone, those in `trained` also trained, the paper's form and TRSP's."""
    return (
        *(name for name in SELECTIONS if name not in ("gates_unverified", ONE_SHOT)),
        "paper_output_gates+penalty",
        "paper_output_gates+penalty_l1",
        "paper_residual_gates+penalty",
        "paper_residual_gates+penalty_l1",
        *(f"{name}+{recovery}" for name in trained for recovery in _TRAINED),
        "trsp+refit",
        "trsp+local",
        REFERENCE,
    )


# `--method all` is every rival, trained in each way; the default trains the strongest only.
DEFAULT_METHODS = _methods(("block_influence", "sleb", "replace_me"))
ALL_METHODS = _methods((*LAYER_CHOICES, *FOLDS, "gates", "trsp"))
Budget = Literal["tokens", "flops"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        recovery: a key of RECOVERIES, or None: the layers go and nothing is trained.
        budget: what the training may spend, next to the reference's.
    """

    selection: str
    recovery: str | None = None
    budget: Budget = "tokens"

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        if self.recovery is None:
            return self.selection
        end = "@flops" if self.budget == "flops" else ""
        return f"{self.selection}+{self.recovery}{end}"

    @property
    def label(self) -> str:
        """For a table."""
        if self.name == REFERENCE:
            return "TRSP"
        label = LABELS[self.selection]
        if self.recovery is None:
            return label
        what = self.recovery.replace("_", " ")
        return f"{label} + {what}{', same FLOPs' if self.budget == 'flops' else ''}"

    def selection_recipe(self, recipe: Recipe) -> SelectionRecipe:
        """The recipe's selection with what this method changes of it."""
        return recipe.selection.model_copy(update=OURS.get(self.selection, {}))

    def transfer_recipe(self, recipe: Recipe) -> TransferRecipe:
        """The recipe's transfer with what this method changes of it.

        UserError: the two do not go together.
        """
        changes = RECOVERIES[self.recovery] if self.recovery else {}
        document = recipe.transfer.model_dump() | changes
        try:
            return TransferRecipe.model_validate(document)
        except ValidationError as error:
            raise UserError(f"{self.name}: transfer: {first_problem(error)}") from error


def parse_method(text: str) -> Method:
    """Read SELECTION[+RECOVERY[@flops]].   UserError: an unknown part, with near names."""
    body, at, budget = text.partition("@")
    selection, plus, recovery = body.partition("+")
    _require_known("selection", selection, SELECTIONS, text)
    if plus:
        _require_known("recovery", recovery, tuple(RECOVERIES), text)
        if selection in FOLDS and not _trains_without_layers(recovery):
            raise UserError(
                f"method {text!r}: the layers that {selection} takes are already folded into "
                "others; train without them (finetune, distil)"
            )
    if at and (budget != "flops" or not plus):
        raise UserError(f"method {text!r}: write SELECTION, SELECTION+RECOVERY or ...@flops")
    if budget == "flops" and not _trains_without_layers(recovery):
        raise UserError(
            f"method {text!r}: @flops is for training without the layers (finetune, distil); "
            f"{recovery} is what the budget is taken from"
        )
    return Method(selection, recovery or None, "flops" if budget else "tokens")


def _trains_without_layers(recovery: str) -> bool:
    return RECOVERIES[recovery].get("closing") == "at_once"


def _require_known(kind: str, name: str, known: tuple[str, ...], text: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else f": {', '.join(known)}"
        raise UserError(f"method {text!r}: {kind} {name!r} is unknown{hint}")
