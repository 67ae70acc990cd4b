"""Whether the texts of a comparison are apart, and of a kind that the dense model knows."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trsp.bench.compare_record import TextFitness
from trsp.pruner.calibration import CalibrationSet
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import require_finite
from trsp.pruner.recipe import Recipe
from trsp.pruner.text_checks import (
    WARNED_SHARE,
    Overlap,
    bits_per_byte,
    bytes_per_token,
    describe_overlap,
    domain_warnings,
    kind_warnings,
    overlap,
    require_no_overlap,
)

REMEDY = "name other files with --eval-data"


class TextsOfComparison:
    """Collects what is found of each text, then tells it; `own_text`: the model wrote it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        calibrations: Mapping[int, CalibrationSet],
        *,
        own_text: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._calibrations = calibrations
        self._own_text = own_text
        self._overlaps: dict[str, dict[str, Overlap]] = {}
        self._bytes: dict[str, float] = {}
        self._warnings: list[str] = []

    def add(self, name: str, ids: Tensor) -> None:
        """Measure what the held-out text [S] has in common with each seed's sequences.

        What the model wrote was trained on by nobody's mistake: a warning, no refusal.

        Raises:
            UserError: too much of it stands in one of them.
        """
        called = f"the text {name}"
        found = {}
        for seed, calibration in self._calibrations.items():
            if self._own_text:
                found[str(seed)] = overlap(calibration.input_ids, ids)
            else:
                found[str(seed)] = require_no_overlap(
                    calibration.input_ids, ids, self._tokenizer, held_out=called, remedy=REMEDY
                )
        self._overlaps[name] = found
        worst = max(found.values(), key=lambda one: (one.too_much, one.share))
        if worst.share > WARNED_SHARE or worst.too_much:
            self._warnings.append(describe_overlap(worst, ids, self._tokenizer, held_out=called))
        self._bytes[name] = bytes_per_token(self._tokenizer, ids)

    def fitness(
        self, model: PreTrainedModel, recipe: Recipe, losses: Mapping[str, float]
    ) -> TextFitness:
        """What was found, with what the dense model's losses on the texts say.

        Raises:
            RunError: the loss on calibration text is not finite.
        """
        calibration = self._bits_of_calibration(model, recipe)
        held_out = {name: bits_per_byte(loss, self._bytes[name]) for name, loss in losses.items()}
        warnings = [*self._warnings, *domain_warnings(calibration, own_text=self._own_text)]
        for name, bits in held_out.items():
            warnings += kind_warnings(calibration, bits, name=f"held-out text {name}")
        return TextFitness(
            overlaps=self._overlaps,
            calibration_bits=calibration,
            held_out_bits=held_out,
            warnings=tuple(warnings),
        )

    def _bits_of_calibration(self, model: PreTrainedModel, recipe: Recipe) -> float | None:
        """Of the first seed's: on another seed's sample they differ little (text_checks)."""
        first = next(iter(self._calibrations.values()))
        sample = first.input_ids[: recipe.selection.verification_sequences]
        with torch.no_grad(), GatedModel(model) as gated:
            loss = gated.masked_loss(sample, (), recipe.selection.batch_size)
        require_finite(loss, "the loss on calibration text", 0, [])
        return bits_per_byte(loss, bytes_per_token(self._tokenizer, sample))
