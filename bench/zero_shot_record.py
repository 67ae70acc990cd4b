"""What zero-shot tasks found, and two models' results on the same samples."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trsp.bench.statistics import CHANCE, sign_test
from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.errors import UserError, first_problem

_MAX_BYTES = 2**26
Count = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Metric(_Frozen):
    """One figure of a task.

    Attributes:
        name, filter: lm-eval's names, such as "acc" and "none".
        value: lm-eval's aggregate, for accuracies the mean.
        stderr: of the value; None where lm-eval has none, such as for a single sample.
        hits: "1" or "0" for each sample in order; None where samples score anything else.
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    hits: str | None


class TaskResult(_Frozen):
    """One task on one model.

    Attributes:
        version: lm-eval's version of the task.
        num_samples, num_documents: scored, and in the task; they differ by `limit`, which takes the
            first ones.
        num_truncated: requests (one a choice) that did not fit the model and lost their beginning.
        documents_sha256: over lm-eval's hash of each scored document, in order.
        file, file_sha256: the task file; None for a task of lm-eval.
    """

    task: str
    version: str
    lm_eval: str
    num_fewshot: Literal[0] = 0
    seed: int
    num_samples: Count
    num_documents: Count
    num_truncated: Count
    documents_sha256: str
    file: str | None
    file_sha256: str | None
    metrics: list[Metric]


class Difference(_Frozen):
    """One metric of a task, a model less the other one, on the same samples.

    Attributes:
        stderr: of the mean of the samples' differences; None for a single sample.
        gained, lost: samples that only this model, or only the other one, has right.
        p: of as uneven a split between lost and gained by chance, two-sided exact (McNemar's).
        beyond: whether p is below CHANCE. A record from before `p` has None there, and says whether
            `difference` was more than two standard errors from 0.
    """

    task: str
    metric: str
    filter: str
    num_samples: Count
    difference: float
    stderr: float | None
    gained: Count
    lost: Count
    p: float | None = Field(None, ge=0, le=1)
    beyond: bool | None


class ModelRun(_Frozen):
    """All tasks on one checkpoint; `weights_sha256` as `checkpoint.sample_weights` takes it."""

    folder: str
    num_hidden_layers: Count
    fingerprint: str
    weights_sha256: str
    dtype: str
    device: str
    results: dict[str, TaskResult]


class ZeroShotRecord(_Frozen):
    """What `trsp tasks` found; `differences` are `model` less `against`, where there is one."""

    schema_version: Literal[1] = 1
    kind: Literal["zero_shot"] = "zero_shot"
    model: ModelRun
    against: ModelRun | None
    differences: list[Difference]
    limit: int | None
    batch_size: int
    environment: dict[str, Any]


def read_zero_shot_record(path: Path) -> ZeroShotRecord:
    """Read a record.   Raises: UserError: it is none of this schema."""
    document = read_json_object(path, max_bytes=_MAX_BYTES)
    try:
        return ZeroShotRecord.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from error


def paired_differences(
    results: Mapping[str, TaskResult], against: Mapping[str, TaskResult]
) -> list[Difference]:
    """Subtract `against` from `results`, sample by sample, for all tasks and metrics of hits.

    Raises:
        UserError: a task is missing from one of them, or was scored on other documents.
    """
    if other := sorted(set(results) ^ set(against)):
        raise UserError(f"task {other[0]!r} was run on one model alone; run the same on both")
    found = []
    for name, result in results.items():
        if result.documents_sha256 != against[name].documents_sha256:
            raise UserError(f"task {name!r}: the two results are of different documents; run again")
        others = {(metric.name, metric.filter): metric for metric in against[name].metrics}
        for metric in result.metrics:
            other_metric = others.get((metric.name, metric.filter))
            if metric.hits is None or other_metric is None or other_metric.hits is None:
                continue
            steps = [
                int(mine) - int(its)
                for mine, its in zip(metric.hits, other_metric.hits, strict=True)
            ]
            difference, count = statistics.fmean(steps), len(steps)
            stderr = statistics.stdev(steps) / math.sqrt(count) if count > 1 else None
            gained, lost = steps.count(1), steps.count(-1)
            p = sign_test(lost, gained)
            found.append(
                Difference(
                    task=name,
                    metric=metric.name,
                    filter=metric.filter,
                    num_samples=count,
                    difference=difference,
                    stderr=stderr,
                    gained=gained,
                    lost=lost,
                    p=p,
                    beyond=p < CHANCE,
                )
            )
    return found
