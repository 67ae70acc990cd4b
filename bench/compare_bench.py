"""What one comparison works with: options, model, texts, and the folder of what is done."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trsp.bench.compare_methods import Method
from trsp.bench.compare_selection import Choice
from trsp.bench.compare_tasks import CompareTasks
from trsp.bench.domain_quality import DomainQuality, Quality
from trsp.bench.zero_shot_record import TaskResult
from trsp.pruner.calibration import CalibrationSet
from trsp.pruner.durable import atomic_write
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.progress import Progress
from trsp.pruner.recipe import Recipe

# Raised whenever a kept result would come out otherwise if it were made again.
CELLS_VERSION = 4


@dataclass(frozen=True)
class CompareOptions:
    """What the user asked for; see the command's help.

    Attributes:
        eval_data: held-out files by the name of their text.
        num_removed: how many layers go, for each point of the curve.
        recipe: calibration, selection and transfer of TRSP; the others take its text and steps.
        tasks: zero-shot tasks of lm-eval by name, or files that end in .jsonl.
        task_limit: the first so many documents of each.
    """

    model: Path
    recipe: Recipe
    eval_data: Mapping[str, Sequence[Path]]
    num_removed: tuple[int, ...]
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    folder: Path
    window: int | None = None
    max_tokens: int | None = None
    batch_size: int = 4
    trust_remote_code: bool = False
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None


class Measured(BaseModel):
    """A model's quality by text, and its zero-shot results by task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quality: dict[str, Quality]
    tasks: dict[str, TaskResult]


@dataclass
class Bench:
    """One comparison: its model and texts, and the results that it need not make again."""

    options: CompareOptions
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: dict[str, DomainQuality]
    tasks: CompareTasks
    calibrations: dict[int, CalibrationSet]
    identity: dict[str, Any]
    progress: Progress
    weights: dict[str, Tensor] = field(default_factory=dict)
    choices: dict[tuple[str, int], dict[int, Choice]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Not on the device: what a method needs there is measured.
        self.weights = {
            name: value.detach().to("cpu", copy=True)
            for name, value in self.model.state_dict().items()
        }

    @property
    def device(self) -> str:
        return str(self.model.device)

    @contextmanager
    def dense(self) -> Iterator[PreTrainedModel]:
        """The dense model; whatever the block does to its weights is undone after it."""
        try:
            yield self.model
        finally:
            self.model.load_state_dict(self.weights)
            self.model.zero_grad(set_to_none=True)
            self.model.requires_grad_(True)

    def measure(self, model: PreTrainedModel, removed: tuple[int, ...]) -> Measured:
        """Quality and zero-shot results with these layers masked."""
        with GatedModel(model) as gated, gated.masking(removed):
            quality = {
                name: text.measure(
                    lambda ids: gated.logits(ids.to(model.device)),
                    lambda task, done, total, name=name: self.progress(
                        f"{task}, {name}", done, total
                    ),
                )
                for name, text in self.texts.items()
            }
            return Measured(
                quality=quality, tasks=self.tasks.run(model, self.tokenizer, self.progress)
            )

    def kept(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`make`'s document, from the folder where it was made before for the same key."""
        whole = {**self.identity, **key}
        name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]
        path = self.options.folder / "done" / f"{name}.json"
        if path.is_file():
            stored: dict[str, Any] = json.loads(path.read_text("utf-8"))
            return stored["result"]  # type: ignore[no-any-return]
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps({"key": whole, "result": result}, indent=1) + "\n")
        return result
