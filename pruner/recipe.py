"""The recipe: every setting of a run, one frozen model for YAML, flags and Python alike.

Sections are named after the modules they steer. Units: `lambda1` and `lambda2` are relative by
default (see selection.py and transfer.py for what that means); lengths are in tokens.
"""

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trsp.pruner.errors import UserError

MAX_RECIPE_BYTES = 1 << 20
Fraction = Field(gt=0, lt=1)


# Whether the RMSNorm behind a gated layer is computed in the gate's own pass.
FuseNorms = Literal["auto", "on", "off"]


# How the chosen layers close: before the first step, with or without the projections before them
# refitted; all together or one after the other while the rest learns; never.
Closing = Literal["local", "refit", "at_once", "linear", "progressive", "never"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CalibrationRecipe(_Section):
    """Which text, and how much of it (calibration.py)."""

    data: tuple[str, ...] = ()
    text_field: str = "text"
    num_sequences: int = Field(128, ge=1)
    sequence_length: int | None = Field(None, ge=8, description="None: min(2048, context)")


# What says which layer goes next: the loss without it, or trained gates, or how little a layer
# turns the residual stream; the last two propose, and the loss without them decides.
SelectionMethod = Literal["masked_loss", "gates", "block_influence"]


class SelectionRecipe(_Section):
    """Stage 1: which layers go (selection.py)."""

    method: SelectionMethod = "masked_loss"
    gate_kind: Literal["residual", "output"] = "residual"
    lambda1: float = Field(0.1, ge=0)
    lambda1_units: Literal["relative", "absolute"] = "relative"
    learning_rate: float = Field(0.05, gt=0)
    first_round_steps: int = Field(64, ge=1)
    round_steps: int = Field(16, ge=0, description="0: the first round's gates serve all picks")
    batch_size: int = Field(4, ge=1)
    num_candidates: int = Field(4, ge=1, description="1: the gate or influence decides alone")
    verification_sequences: int = Field(16, ge=1)
    protected: tuple[int, ...] = Field((0,), description="negative counts from the last layer")
    fuse_norms: FuseNorms = Field("auto", description="auto: on CUDA")


class LoraRecipe(_Section):
    """Low-rank transfer instead of full-parameter (peft)."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)


# Steps of local distillation where no training follows.
LOCAL_STEPS_ALONE = 128


class TransferRecipe(_Section):
    """Stage 2: move the knowledge before deletion (transfer.py)."""

    enabled: bool = True
    steps: int = Field(128, ge=0, description="0: local distillation or the refit alone")
    batch_size: int = Field(2, ge=1, description="sequences an optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="None: the whole batch at once")
    learning_rate: float | None = Field(None, gt=0, description="None: 0.1 / hidden size")
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    label_weight: float = Field(0.0, ge=0)
    distill_weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    by_entropy: bool = Field(False, description="weigh the distilled tokens by teacher entropy")
    hidden_weight: float = Field(0.0, ge=0, description="of the last hidden states' distance")
    lambda2: float = Field(0.03, ge=0)
    norm: Literal["l1", "l2", "l2_squared"] = "l2"
    norm_units: Literal["relative", "absolute"] = "relative"
    ramp_fraction: float = Field(0.0, ge=0, le=1, description="lambda2 grows from 0 over this part")
    closing: Closing = "local"
    local_steps: int | None = Field(
        None, ge=1, description="of local distillation; None: as steps, with 0 steps 128"
    )
    local_learning_rate: float | None = Field(
        None, gt=0, description="of local distillation; None: 0.8 / hidden size"
    )
    closing_fraction: float = Field(0.25, gt=0, le=1, description="linear, progressive: of steps")
    ridge: float = Field(0.01, ge=0, description="of the refit, relative (refit.py)")
    relaxation: float | None = Field(
        None, gt=0, le=1, description="of the refit; None: 0.5, with no steps 0.75 (refit.py)"
    )
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_activations: bool = False
    fuse_norms: FuseNorms = Field("auto", description="auto: on CUDA without checkpointing")
    lora: LoraRecipe | None = None

    @property
    def num_local_steps(self) -> int:
        """Steps of local distillation, where it is what closes the layers."""
        return self.local_steps or self.steps or LOCAL_STEPS_ALONE

    @model_validator(mode="after")
    def _has_an_objective(self) -> Self:
        if self.label_weight == self.distill_weight == self.hidden_weight == 0:
            raise ValueError(
                "label_weight, distill_weight and hidden_weight are all 0: nothing to learn from"
            )
        if self.steps == 0 and self.closing not in ("local", "refit"):
            raise ValueError(
                f"no steps with closing {self.closing!r} do nothing; give steps, or closing 'local'"
            )
        if self.steps == 1 and self.closing in ("linear", "progressive"):
            raise ValueError(
                f"one step with closing {self.closing!r} leaves the layers open: gates are 1 in "
                "the first step; give at least 2 steps, or closing 'local'"
            )
        if self.fuse_norms == "on" and self.checkpoint_activations:
            raise ValueError("fuse_norms 'on' excludes checkpoint_activations: choose 'auto'")
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {micro}"
            )
        return self


class EvaluationRecipe(_Section):
    """Held-out text on which the dense and the pruned model are compared (evaluation.py)."""

    data: tuple[str, ...] = ()
    window: int | None = Field(None, ge=8)
    stride: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    allow_overlap: bool = Field(False, description="evaluate on calibration text all the same")


class AutoRecipe(_Section):
    """The search for settings on held-out calibration text (auto.py); its presence turns it on."""

    max_increase: float | None = Field(None, gt=0, description="of perplexity; chooses the depth")
    held_out: float = Field(0.125, gt=0, lt=1, description="part of the sequences, 4 at least")
    lambda1: tuple[float, ...] = Field((0.03, 0.1, 0.3), description="beside the recipe's own")
    learning_rate_factors: tuple[float, ...] = Field((2.0, 0.5), description="beside 1")
    deepest_ratio: float = Field(0.5, gt=0, lt=1, description="of the layers, with max_increase")
    raw_limit: float = Field(0.1, gt=0, description="increase without recovery: the knee")
    max_steps_factor: int = Field(
        2, ge=1, description="steps double while it helps, up to this times the recipe's; 1: never"
    )
    max_transfers: int = Field(8, ge=1, description="one of twice the steps counts as two")

    @model_validator(mode="after")
    def _lists_are_usable(self) -> Self:
        if any(value < 0 for value in self.lambda1):
            raise ValueError(f"auto.lambda1 {list(self.lambda1)}: none may be below 0")
        if any(factor <= 0 for factor in self.learning_rate_factors):
            raise ValueError(
                f"auto.learning_rate_factors {list(self.learning_rate_factors)}: all above 0"
            )
        return self


class Recipe(_Section):
    """One run, from the checkpoint to the proof."""

    schema_version: Literal[1] = 1
    seed: int = Field(0, ge=0, lt=2**31)
    ratio: float | None = Field(None, gt=0, lt=1, description="part of the layers to remove")
    layers: int | None = Field(None, ge=1, description="number of layers to remove")
    keep: tuple[int, ...] | None = Field(None, description="layers to keep: no stage 1")
    device: str = "auto"
    state_every_seconds: float = Field(300.0, ge=0)
    calibration: CalibrationRecipe = CalibrationRecipe()
    selection: SelectionRecipe = SelectionRecipe()
    transfer: TransferRecipe = TransferRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    auto: AutoRecipe | None = None

    @field_validator("keep")
    @classmethod
    def _keep_is_a_set(cls, keep: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if keep is not None and len(set(keep)) != len(keep):
            repeated = sorted({layer for layer in keep if keep.count(layer) > 1})
            raise ValueError(f"layers {repeated} are repeated; name each kept layer once")
        return keep

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [name for name in ("ratio", "layers", "keep") if getattr(self, name) is not None]
        if self.auto is not None and self.auto.max_increase is not None:
            given.append("max_increase")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; choose one")
        if self.auto is not None and self.keep is not None:
            raise ValueError("keep names the layers; there is nothing for auto to search")
        return self

    def num_to_remove(self, num_hidden_layers: int) -> int:
        """How many of `num_hidden_layers` go; 25 % where the recipe does not say.

        Raises UserError when that is none or all of them.
        """
        if self.keep is not None:
            count = num_hidden_layers - len(self.keep)
        elif self.layers is not None:
            count = self.layers
        else:
            count = round((0.25 if self.ratio is None else self.ratio) * num_hidden_layers)
        if not 0 < count < num_hidden_layers:
            raise UserError(
                f"removing {count} of {num_hidden_layers} layers is not pruning: "
                f"remove between 1 and {num_hidden_layers - 1} (--layers, --ratio)"
            )
        return count

    def deepest_to_remove(self, num_hidden_layers: int, needed: Iterable[int] = ()) -> int:
        """How many layers are ordered at most: a search by quality looks deeper than it cuts.

        `needed`: layers that the model's family needs, beside the protected ones.
        """
        if self.auto is None or self.auto.max_increase is None:
            return self.num_to_remove(num_hidden_layers)
        protected = self.protected_layers(num_hidden_layers) | set(needed)
        removable = num_hidden_layers - len(protected)
        wanted = round(self.auto.deepest_ratio * num_hidden_layers)
        return max(1, min(wanted, removable, num_hidden_layers - 1))

    def protected_layers(self, num_hidden_layers: int) -> frozenset[int]:
        """`selection.protected` with negative indices resolved; UserError if out of range."""
        for layer in self.selection.protected:
            if not -num_hidden_layers <= layer < num_hidden_layers:
                raise UserError(
                    f"selection.protected names layer {layer}; "
                    f"the model has layers 0 to {num_hidden_layers - 1}"
                )
        return frozenset(layer % num_hidden_layers for layer in self.selection.protected)


PAPER: dict[str, Any] = {
    "selection": {"method": "gates", "gate_kind": "output", "num_candidates": 1, "protected": []},
    "transfer": {
        "label_weight": 1.0,
        "distill_weight": 0.0,
        "closing": "never",
        "lambda2": 0.03,
        "norm": "l2",
    },
}
PRESETS: dict[str, dict[str, Any]] = {"trsp": {}, "paper": PAPER}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            merged[key] = _merge(inner, value)
        else:
            merged[key] = value
    return merged


def _validate(document: dict[str, Any], origin: str) -> Recipe:
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "recipe"
        shown = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        raise UserError(f"{origin}: {place}: {first['msg']}{shown}") from error


def parse_setting(text: str) -> dict[str, Any]:
    """`transfer.lambda2=1e-3` as a nested document; the value is YAML."""
    path, separator, value = text.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in keys):
        raise UserError(f"--set {text!r}: write it as section.name=value")
    parsed = _load_yaml(value, f"--set {text!r}")
    # YAML 1.1 reads 1e-3 as a string: only a number with a dot counts there.
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    for key in reversed(keys):
        parsed = {key: parsed}
    return parsed  # type: ignore[no-any-return]


def _load_yaml(text: str, origin: str) -> Any:
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
                raise UserError(f"{origin}: YAML anchors and aliases are refused; write it out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{origin}: not YAML: {problem}") from error


def read_recipe(path: Path) -> dict[str, Any]:
    """The document in a recipe file, unvalidated; UserError when it is no YAML mapping."""
    if not path.is_file():
        raise UserError(f"recipe {path} is not a file")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UserError(f"recipe {path} is larger than {MAX_RECIPE_BYTES} bytes")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not UTF-8 (byte {error.start})") from error
    document = _load_yaml(text, f"recipe {path}")
    if not isinstance(document, dict):
        raise UserError(f"recipe {path} holds no mapping of settings")
    return document


def build_recipe(
    *,
    file: Path | None = None,
    preset: str = "trsp",
    flags: dict[str, Any] | None = None,
    settings: tuple[str, ...] = (),
) -> Recipe:
    """Preset, then file, then flags, then `--set`: later wins; the result is validated once.

    Args:
        flags: a nested document of what the command line's own options said.
        settings: `section.name=value` strings.
    Raises:
        UserError: unknown preset or field, or a value outside its range, named by its place.
    """
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is unknown; choose from {', '.join(PRESETS)}")
    document = PRESETS[preset]
    if file is not None:
        document = _merge(document, read_recipe(file))
    document = _merge(document, flags or {})
    for setting in settings:
        document = _merge(document, parse_setting(setting))
    return _validate(document, str(file) if file is not None else "settings")


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out, as it is saved beside the output."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
