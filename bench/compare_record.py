"""The record of `trsp compare`: every cell with its layers, quality and cost."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trsp.bench.domain_quality import Quality
from trsp.bench.zero_shot_record import TaskResult
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError, first_problem
from trsp.pruner.text_checks import Overlap

MAX_RECORD_BYTES = 64 << 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Cost(_Part):
    """Spent on the device, evaluation not counted.

    Attributes:
        flops: matrix products and attention as they were run, two a multiply-add.
        steps, tokens: optimizer steps on weights, and the tokens they saw; 0 without training.
        peak_bytes: None where it cannot be read.
    """

    flops: int = Field(ge=0)
    seconds: float = Field(ge=0)
    steps: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)
    peak_bytes: int | None = None


class Cell(_Part):
    """One method at one depth with one seed.

    Attributes:
        removal_order: the layers that went, as the method took them.
        quality: by text.   note: why there is none.
        tasks: zero-shot results, by task.
        jump: loss after deletion minus before, nats on calibration text; None without training.
    """

    method: str
    label: str
    num_removed: int
    seed: int
    removal_order: tuple[int, ...]
    selection: Cost
    training: Cost | None = None
    quality: dict[str, Quality] | None
    tasks: dict[str, TaskResult] = {}
    jump: float | None = None
    note: str | None = None

    @property
    def total_flops(self) -> int:
        """Of choosing and training."""
        return self.selection.flops + (self.training.flops if self.training else 0)

    @property
    def total_seconds(self) -> float:
        """Of choosing and training."""
        return self.selection.seconds + (self.training.seconds if self.training else 0.0)


class DenseModel(_Part):
    """The model that everything was cut from."""

    folder: str
    num_hidden_layers: int
    num_parameters: int
    fingerprint: str
    weights_sha256: str
    quality: dict[str, Quality]
    tasks: dict[str, TaskResult] = {}


class TextFitness(_Part):
    """How the texts stand to each other and to the dense model (`trsp.pruner.text_checks`).

    Attributes:
        overlaps: with each seed's calibration sequences, by text, then by seed.
        calibration_bits: the dense model's loss on the first seed's calibration text, bits per
            byte; None where its tokens are no text.
        held_out_bits: the same by text.
    """

    overlaps: dict[str, dict[str, Overlap]]
    calibration_bits: float | None
    held_out_bits: dict[str, float | None]
    warnings: tuple[str, ...] = ()


class CompareRecord(_Part):
    """One comparison.

    Attributes:
        calibrations: what each seed's sequences were drawn from, by seed.
        protocols: of each text, what the perplexities hold for.
        complete: every cell that was asked for is there.
        fitness: of the texts; records of before it was kept lack it.
    """

    schema_version: Literal[1] = 1
    kind: Literal["trsp compare"] = "trsp compare"
    dense: DenseModel
    recipe: dict[str, Any]
    calibrations: dict[str, dict[str, Any]]
    protocols: dict[str, dict[str, Any]]
    num_removed: tuple[int, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    cells: tuple[Cell, ...]
    complete: bool
    environment: dict[str, Any]
    fitness: TextFitness | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against the texts; mostly nothing."""
        return () if self.fitness is None else self.fitness.warnings


def write_compare_record(path: Path, record: CompareRecord) -> None:
    """Write it atomically."""
    atomic_write(path, record.model_dump_json(indent=1) + "\n")


def read_compare_record(path: Path) -> CompareRecord:
    """Read one back.   UserError: no such record."""
    if not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
        raise UserError(f"{path} is no file, or larger than {MAX_RECORD_BYTES} bytes")
    try:
        document = json.loads(path.read_text("utf-8"))
        return CompareRecord.model_validate(document)
    except (UnicodeDecodeError, ValueError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{path} is no record of trsp compare: {problem}") from error
