"""The calibration text of a comparison, one set for each seed: from files, or the model's own."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trsp.pruner.calibration import CalibrationSet, build_calibration, sequence_length
from trsp.pruner.checkpoint import Checkpoint
from trsp.pruner.progress import Progress
from trsp.pruner.recipe import Recipe
from trsp.pruner.self_text import (
    read_self_text,
    sample_self_text,
    self_text_key,
    write_self_text,
)


def read_calibrations(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    seeds: Sequence[int],
    progress: Progress,
) -> dict[int, CalibrationSet]:
    """Draw each seed's set from the recipe's files; errors as build_calibration."""
    length = sequence_length(checkpoint, recipe.calibration.sequence_length)
    return {
        seed: build_calibration(
            recipe.calibration.data,
            tokenizer,
            num_sequences=recipe.calibration.num_sequences,
            sequence_length=length,
            seed=seed,
            text_field=recipe.calibration.text_field,
            progress=progress,
        )
        for seed in seeds
    }


def written_calibrations(
    folder: Path,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    recipe: Recipe,
    seeds: Sequence[int],
    progress: Progress,
) -> dict[int, CalibrationSet]:
    """Let the dense model write each seed's set; errors as sample_self_text.

    What was written before lies in `folder`: drawn again it could differ in a token, and every
    stored cell belongs to its calibration tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for seed in seeds:
        key = self_text_key(checkpoint, tokenizer, recipe, seed)
        path = folder / f"self_text_{key.digest}.safetensors"
        calibration = read_self_text(path, key)
        if calibration is None:
            calibration = sample_self_text(model, tokenizer, key, progress=progress)
            write_self_text(path, calibration, key)
        found[seed] = calibration
    return found
