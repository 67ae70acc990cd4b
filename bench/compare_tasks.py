"""Zero-shot tasks inside a comparison: on the same masked model that perplexity is taken of.

Only tasks that score choices: greedy answers go through a KV cache, in which masked layers leave
holes. `trsp tasks` runs those on finished checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trsp.bench.zero_shot_record import Metric, TaskResult
from trsp.pruner.errors import UserError
from trsp.pruner.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trsp.bench.zero_shot import LoadedTask


@dataclass(frozen=True)
class CompareTasks:
    """Loaded tasks, the same for every cell."""

    loaded: "Sequence[LoadedTask]"
    limit: int | None
    batch_size: int

    @classmethod
    def load(cls, words: Sequence[str], limit: int | None, batch_size: int) -> "CompareTasks":
        """Load tasks by lm-eval's names or files ending in .jsonl; errors as load_tasks.

        Raises:
            UserError: besides, a task whose answers are written and not chosen.
        """
        from trsp.bench.zero_shot import load_tasks

        if limit is not None and limit < 1:
            raise UserError(f"--task-limit {limit}: expected at least 1")
        if not words:
            return cls((), limit, batch_size)
        files = [word for word in words if word.endswith(".jsonl")]
        loaded = load_tasks([word for word in words if word not in files], files)
        for one in loaded:
            if one.task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
                raise UserError(
                    f"task {one.name!r} is of kind {one.task.OUTPUT_TYPE}; a comparison scores "
                    "choices; run it on finished checkpoints with trsp tasks"
                )
        return cls(tuple(loaded), limit, batch_size)

    def identity(self) -> dict[str, Any]:
        """What the results belong to; nothing without tasks."""
        if not self.loaded:
            return {}
        tasks = {
            one.name: str(one.task.VERSION) if one.file is None else one.file.sha256
            for one in self.loaded
        }
        return {"tasks": tasks, "task_limit": self.limit}

    def run(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", progress: Progress
    ) -> dict[str, TaskResult]:
        """Results by task on the model as its layers are masked now."""
        from trsp.bench.zero_shot import zero_shot

        if not self.loaded:
            return {}
        return zero_shot(
            model,
            tokenizer,
            self.loaded,
            limit=self.limit,
            batch_size=self.batch_size,
            progress=progress,
        )


def accuracy(result: TaskResult) -> Metric | None:
    """What a table shows of a task: acc_norm (by the length of the choice) or acc."""
    by_name = {metric.name: metric for metric in result.metrics}
    return by_name.get("acc_norm") or by_name.get("acc")
