"""Zero-shot tasks through lm-eval: the field's tasks by name, or the user's own from a file.

Building requests and scoring them is lm-eval's; here are what it must not be left alone with: files
of users, its writing to caches and terminals, and the comparison of two models on the same items.
"""

import difflib
import functools
import hashlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trsp.bench.lm_eval_runner import Runner
from trsp.bench.task_file import Answer, Choice, TaskFile, read_task_file
from trsp.bench.zero_shot_record import Metric, TaskResult
from trsp.pruner.errors import UserError
from trsp.pruner.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The five tasks of the paper's tables; their data come from the model hub or its local cache.
PAPER_TASKS = ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge")
# Tokens beyond the longest answer, in which a model can show that its own answer goes on.
_TOKENS_AFTER_ANSWER = 4


@dataclass(frozen=True)
class LoadedTask:
    """A task with its documents; `task` is lm-eval's object, and `file` where they came from."""

    name: str
    task: Any
    file: TaskFile | None = None


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
                name: _run(one, Runner(model, tokenizer, batch_size, name, progress), limit, seed)
                for name, one in loaded.items()
            }
    finally:
        model.train(was_training)


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


def _run(loaded: LoadedTask, runner: Runner, limit: int | None, seed: int) -> TaskResult:
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
        file=None if loaded.file is None else loaded.file.path.name,
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
