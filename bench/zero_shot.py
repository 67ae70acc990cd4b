"""Zero-shot tasks through lm-eval: the field's tasks by name, or the user's own from a file.

Building requests and scoring them is lm-eval's; here are what it must not be left alone with: files
of users, its writing to caches and terminals, and the comparison of two models on the same items.
"""

import difflib
import functools
import hashlib
import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trsp.pruner.bounded_json import parse_json_object, read_json_object
from trsp.pruner.errors import RunError, UserError, first_problem
from trsp.pruner.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The five tasks of the paper's tables; their data come from the model hub or its local cache.
PAPER_TASKS = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
MAX_FILE_BYTES = 2**26
# Tokens beyond the longest answer, in which a model can show that its own answer goes on.
_TOKENS_AFTER_ANSWER = 4

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
        beyond: whether `difference` is more than two standard errors from 0.
    """

    task: str
    metric: str
    filter: str
    num_samples: Count
    difference: float
    stderr: float | None
    gained: Count
    lost: Count
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
    document = read_json_object(path, max_bytes=MAX_FILE_BYTES)
    try:
        return ZeroShotRecord.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from error


Text = Annotated[str, Field(min_length=1)]


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Choice(_Item):
    """A line of multiple choice: scored is the context, one space, and each choice."""

    context: Text
    choices: Annotated[list[Text], Field(min_length=2)]
    label: Count

    @model_validator(mode="after")
    def _sound(self) -> "Choice":
        if not self.context.strip() or self.context[-1].isspace():
            raise ValueError("context is blank or ends in white space; one space is put behind it")
        for number, choice in enumerate(self.choices):
            if not choice.strip() or choice[0].isspace():
                raise ValueError(f"choice {number} is blank or begins with white space")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("two choices are the same")
        if self.label >= len(self.choices):
            raise ValueError(
                f"label {self.label}: expected 0 to {len(self.choices) - 1}, the place of a choice"
            )
        return self


class Answer(_Item):
    """A line to answer: what the model writes behind the prompt, greedily, up to a line's end."""

    prompt: Text
    answer: Text

    @model_validator(mode="after")
    def _sound(self) -> "Answer":
        if not self.prompt.strip():
            raise ValueError("prompt is blank")
        if self.answer.strip() != self.answer or "\n" in self.answer:
            raise ValueError("answer has white space around it, or more than one line")
        return self


@dataclass(frozen=True)
class TaskFile:
    """A sound task file.   `items`: all of one form."""

    path: Path
    sha256: str
    items: Sequence[Choice] | Sequence[Answer]


@dataclass(frozen=True)
class LoadedTask:
    """A task with its documents; `task` is lm-eval's object, and `file` where they came from."""

    name: str
    task: Any
    file: TaskFile | None = None


def read_task_file(path: str | Path) -> TaskFile:
    """Read a task file: JSON objects, one a line, all `Choice` or all `Answer`.

    Raises:
        UserError: it cannot be read, is too large, empty, not UTF-8, or a line is of neither form;
            the text names the line.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{path}: is larger than {MAX_FILE_BYTES} bytes; split it into several")
    items: list[Any] = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        document = parse_json_object(line, where=where, unique_keys=True)
        form = Choice if "choices" in document else Answer if "answer" in document else None
        if form is None:
            raise UserError(
                f'{where}: expected {{"context": ..., "choices": [...], "label": ...}} or '
                '{"prompt": ..., "answer": ...}'
            )
        if items and not isinstance(items[0], form):
            raise UserError(f"{where}: choices and answers are mixed; make them two files")
        try:
            items.append(form.model_validate(document))
        except ValidationError as error:
            raise UserError(f"{where}: {first_problem(error)}") from error
    if not items:
        raise UserError(f"{path}: is empty; expected a JSON object a line")
    return TaskFile(path=path, sha256=hashlib.sha256(content).hexdigest(), items=items)


def load_tasks(
    tasks: Sequence[str], task_files: Sequence[str | Path | TaskFile] = ()
) -> list[LoadedTask]:
    """Find tasks of lm-eval by name, with their data, and read task files; no model is needed.

    A file's task is called by the name of the file.
    Raises:
        UserError: nothing is named, or something twice; a file is of the wrong form; lm-eval is not
            installed; a name is unknown, of a group, or of a task that runs code or takes images;
            a task's data are neither in the local cache nor to be had.
    """
    files = [one if isinstance(one, TaskFile) else read_task_file(one) for one in task_files]
    names = [*tasks, *(file.path.name for file in files)]
    if not names:
        raise UserError(f"no task is named; expected {', '.join(PAPER_TASKS)} or FILE.jsonl")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"task {twice[0]!r} is named twice; name each once, files by other names")
    if find_spec("lm_eval") is None:
        raise UserError("zero-shot tasks need lm-eval, which is missing: pip install 'trsp[eval]'")
    with _quiet():
        return [
            *(LoadedTask(name, _named_task(name)) for name in tasks),
            *(LoadedTask(file.path.name, _file_task(file), file) for file in files),
        ]


def zero_shot(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str | LoadedTask],
    *,
    task_files: Sequence[str | Path | TaskFile] = (),
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, TaskResult]:
    """Run tasks on a model in memory, without examples in the prompt.

    Log-probabilities are taken in float32, whatever the model's dtype. Choices and greedy answers
    use no random numbers; `seed` is for tasks of lm-eval that sample. The caller's random state,
    tokenizer and training mode are as before.

    Args:
        tasks: lm-eval's names, or what `load_tasks` returned, which spares loading them again.
        limit: the first so many documents of each task.
    Returns:
        Results by the name of the task, in the order asked for.
    Raises:
        UserError: as `load_tasks`; limit or batch_size under 1; a tokenizer without begin- and
            end-of-text token; an answer or choice that is longer than the model's context.
        RunError: a log-probability is not a number.
    """
    for name, number in (("limit", limit), ("batch size", batch_size)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number}: expected at least 1")
    named = [one for one in tasks if isinstance(one, str)]
    loaded = {one.name: one for one in tasks if isinstance(one, LoadedTask)}
    if named or task_files or not loaded:
        loaded |= {one.name: one for one in load_tasks(named, task_files)}
    was_training = model.training
    try:
        with _quiet(), _seeded(seed, model):
            return {
                name: _run(one, _Runner(model, tokenizer, batch_size, name, progress), limit, seed)
                for name, one in loaded.items()
            }
    finally:
        model.train(was_training)


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
            found.append(
                Difference(
                    task=name,
                    metric=metric.name,
                    filter=metric.filter,
                    num_samples=count,
                    difference=difference,
                    stderr=stderr,
                    gained=steps.count(1),
                    lost=steps.count(-1),
                    beyond=None if stderr is None else abs(difference) > 2 * stderr,
                )
            )
    return found


@functools.cache
def _task_manager() -> Any:
    """lm-eval's index of its tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _named_task(name: str) -> Any:
    manager = _task_manager()
    if name not in manager.all_subtasks:
        if name in manager.all_groups or name in manager.all_tags:
            raise UserError(f"task {name!r} is a group of lm-eval's; name single tasks of it")
        near = difflib.get_close_matches(name, manager.all_subtasks, n=3)
        hint = f"near ones are {', '.join(near)}" if near else f"try {', '.join(PAPER_TASKS)}"
        raise UserError(f"lm-eval has no task {name!r}; {hint}; a task file ends in .jsonl")
    try:
        (task,) = manager.load([name])["tasks"].values()
    except ConnectionError as error:
        # What datasets raises for a set that is not cached, offline or not reached; its text names
        # the set.
        raise UserError(
            f"task {name!r}: its data are not in the local cache ({error}); run once with a "
            "network and without HF_HUB_OFFLINE, or use local task files, which need none"
        ) from error
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name!r} runs code or takes images, which is not done here")
    return task


def _file_task(file: TaskFile) -> Any:
    """lm-eval's task for a file. The documents are in memory: no loader, no cache, no network."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    documents = {"test": Dataset.from_list([item.model_dump() for item in file.items])}
    config: dict[str, Any] = {
        "task": file.path.name,
        "custom_dataset": lambda **_: documents,
        "test_split": "test",
        "metadata": {"version": 1},
    }
    if isinstance(file.items[0], Choice):
        metrics = ("acc", "acc_norm")
        config |= {
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
        }
    else:
        metrics = ("exact_match", "prefix_match")
        config |= {
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "answer",
            "process_results": _score_answer,
            "generation_kwargs": {"until": ["\n"], "do_sample": False},
        }
    config["metric_list"] = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
    ]
    return ConfigurableTask(config=config)


def _score_answer(document: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """exact_match: the line is the answer. prefix_match: it begins with it, as a whole word.

    A base model rarely ends its line, so the second is the one that tells its knowledge.
    """
    from lm_eval.api.metrics import exact_match_hf_evaluate

    line, answer = results[0].strip(), document["answer"]
    exact = exact_match_hf_evaluate(predictions=[line], references=[answer])["exact_match"]
    goes_on = line[len(answer) : len(answer) + 1].isalnum() and answer[-1].isalnum()
    return {
        "exact_match": float(exact),
        "prefix_match": float(line.startswith(answer) and not goes_on),
    }


class _Runner:
    """lm-eval's model around ours, which counts what it does and checks what goes in and out."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int,
        label: str,
        progress: Progress,
    ) -> None:
        import copy

        from lm_eval.models.huggingface import HFLM

        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r}: has neither a begin- nor an end-of-text "
                "token, one of which lm-eval needs; set one in tokenizer_config.json"
            )
        # A copy, because lm-eval sets a padding token.
        self.lm: Any = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        self.num_truncated = 0
        self._label, self._progress = label, progress
        self._done = self._total = 0
        self._tokens_inner = self.lm._loglikelihood_tokens
        self._generate_inner = self.lm.generate_until
        self.lm._loglikelihood_tokens = self._loglikelihoods
        self.lm.loglikelihood = functools.partial(self.lm.loglikelihood, disable_tqdm=True)
        self.lm.loglikelihood_rolling = functools.partial(
            self.lm.loglikelihood_rolling, disable_tqdm=True
        )
        self.lm.generate_until = self._generate
        self.lm._model_call = self._counted(self.lm._model_call)
        self.lm._model_generate = self._counted(self.lm._model_generate)

    def _loglikelihoods(self, requests: Any, *arguments: Any, **options: Any) -> Any:
        room = self.lm.max_length
        for text, context, continuation in requests:
            if not continuation or len(continuation) > room:
                raise UserError(
                    f"task {self._label!r}: {text[1][:60]!r} is {len(continuation)} tokens, "
                    f"expected 1 to {room}, the model's context; leave this item out"
                )
            self.num_truncated += len(context) + len(continuation) > room + 1
        self._begin(len(requests))
        found = self._tokens_inner(requests, *arguments, **options)
        if any(math.isnan(answer[0]) for answer in found):
            raise RunError(f"task {self._label!r}: a log-probability is not a number")
        self._progress(self._label, self._total, self._total)
        return found

    def _generate(self, requests: Any, disable_tqdm: bool = True) -> Any:
        room = self.lm.max_length
        if self.lm.eot_token_id is None:
            raise UserError(
                f"task {self._label!r}: the tokenizer has no end-of-text token, which lm-eval's "
                "generation needs; set eos_token in tokenizer_config.json"
            )
        for request in requests:
            prompt, options = request.args
            new = options.get("max_gen_toks", self.lm.max_gen_toks)
            if new >= room:
                raise UserError(
                    f"task {self._label!r}: wants {new} new tokens, the model's context is {room}"
                )
            self.num_truncated += len(self.lm.tok_encode(prompt)) > room - new
        self._begin(len(requests))
        found = self._generate_inner(requests, disable_tqdm=disable_tqdm)
        self._progress(self._label, self._total, self._total)
        return found

    def _begin(self, count: int) -> None:
        self._done, self._total = 0, count
        self._progress(self._label, 0, count)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            found = call(*arguments, **options)
            # Rows; fewer than requests, because choices of one token share a row.
            self._done += len(found)
            self._progress(self._label, min(self._done, self._total), max(self._total, 1))
            return found

        return counted


def _run(loaded: LoadedTask, runner: _Runner, limit: int | None, seed: int) -> TaskResult:
    from importlib.metadata import version

    from lm_eval.evaluator import evaluate

    task, name = loaded.task, loaded.task.task_name
    task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed)
    if loaded.file is not None and task.OUTPUT_TYPE == "generate_until":
        answers = [f" {item.answer}" for item in loaded.file.items if isinstance(item, Answer)]
        longest = max(len(runner.lm.tok_encode(one, add_special_tokens=False)) for one in answers)
        task.set_config(
            "generation_kwargs", {"max_gen_toks": longest + _TOKENS_AFTER_ANSWER}, update=True
        )
    found = evaluate(lm=runner.lm, task_dict={"tasks": {name: task}}, limit=limit)
    figures, samples = found["results"][name], found["samples"][name]
    metrics = []
    for key, value in figures.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = figures.get(f"{metric}_stderr,{kind}")
        scores = [sample.get(metric) for sample in samples if sample["filter"] == kind]
        binary = all(isinstance(score, int | float) and score in (0, 1) for score in scores)
        metrics.append(
            Metric(
                name=metric,
                filter=kind,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=found["higher_is_better"][name].get(metric),
                hits="".join(str(int(score)) for score in scores) if binary else None,
            )
        )
    hashes = [one["doc_hash"] for one in samples if one["filter"] == samples[0]["filter"]]
    return TaskResult(
        task=loaded.name,
        version=str(found["versions"][name]),
        lm_eval=version("lm_eval"),
        seed=seed,
        num_samples=found["n-samples"][name]["effective"],
        num_documents=found["n-samples"][name]["original"],
        num_truncated=runner.num_truncated,
        documents_sha256=hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        file=None if loaded.file is None else str(loaded.file.path),
        file_sha256=None if loaded.file is None else loaded.file.sha256,
        metrics=metrics,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's warnings and bars off the terminal: results and one bar belong there."""
    import lm_eval.api.task as task_module

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, task_module.tqdm
    logger.setLevel(logging.ERROR)
    task_module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = bar


@contextmanager
def _seeded(seed: int, model: "PreTrainedModel") -> Iterator[None]:
    """Seed every generator that a task may draw from, and give the caller's states back."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
