"""How many layers must go for a speed target: a line through measured depths, then the proof.

Cost = a + b * layers, where cost is a latency, or the time of one token or request (1 / throughput)
at a given number of requests in flight. The depth that the line names is measured; where it misses
the target, it joins the line and the next one is tried.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trsp.bench.serve import run_serve
from trsp.bench.serve_design import ServeOptions
from trsp.bench.serve_record import ServeRecord, read_serve_record
from trsp.bench.slo_answer import SloPlan, answer, mean_cost
from trsp.bench.slo_records import (
    Costs,
    closed_load,
    costs_by_depth,
    engine_flags,
    require_agreement,
    require_same_machine,
    require_same_model,
)
from trsp.bench.slo_target import Target, require_measurable
from trsp.bench.statistics import LinearFit, linear_fit
from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.config_surgery import num_hidden_layers
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError

MAX_ROUNDS = 3
_QUESTION_NAME = "question.json"
# Dense models that differ by more between records ran on machines that differ.
_DRIFT = 0.05


def plan_for_slo(
    model: Path,
    target: Target,
    *,
    concurrency: int,
    records: Sequence[Path],
    options: ServeOptions,
    verify: bool,
    tell: Callable[[str], None],
) -> SloPlan:
    """Answer how many layers must go, from records or from measuring, and verify the answer.

    Args:
        model: the dense model's folder; its config is enough, speed does not depend on weights.
        records: of `trsp bench serve` on this model; none: three depths are measured first.
        options: how to measure; `out` is the folder for the experiments, which goes on with the
            same question by itself. With records, lengths, dtype, seed and number of requests are
            theirs.
    Raises:
        UserError: records of another model, load or metric, or that do not agree; fewer than two
            depths; the folder holds the measurements of another question; what is measured here
            would not belong beside the records.
    """
    layers = num_hidden_layers(read_json_object(model / "config.json", max_bytes=2**22))
    if layers < 4:
        raise UserError(f"{model}: has {layers} layers; a line needs at least 4 to choose from")
    if concurrency < 1:
        raise UserError(f"--concurrency {concurrency}: expected at least 1")
    found = [read_serve_record(path) for path in records]
    names = [str(path) for path in records]
    if (verify or not found) and options.num_blocks < 2:
        raise UserError(
            f"--num-blocks {options.num_blocks}: one block has no interval, and a target is met "
            "with all of an interval; give at least 2"
        )
    if found:
        costs_by_depth(found, names, target.metric, concurrency, layers)
        require_agreement(found, names, f"closed {concurrency}")
        require_same_model(model, found[0], names[0])
        options = _as_recorded(options, found[0], concurrency)
    else:
        require_measurable(target, options.num_requests)
    question = _question(model, target, concurrency, records, options)

    def measure(removals: Sequence[int], folder: str) -> None:
        if records:
            require_same_machine(found[0], names[0])
        _keep_question(options.out, question)
        experiment = replace(
            options,
            dense=model,
            remove=tuple(removals),
            load_format="dummy",
            concurrencies=(concurrency,),
            shares=(),
            memories=("equal-kv",),
            out=options.out / folder,
            resume=(options.out / folder / "plan.json").exists(),
        )
        found.append(run_serve(experiment, tell=tell))
        names.append(str(experiment.out / "record.json"))
        require_agreement(found, names, f"closed {concurrency}")

    if not found:
        measure((layers // 4, layers // 2), "depths")
    remarks: list[str] = []

    def fitted() -> tuple[Costs, LinearFit]:
        costs = costs_by_depth(found, names, target.metric, concurrency, layers)
        return costs, linear_fit(list(costs), _paired(costs))

    costs, fit = fitted()
    depth, verified = fit.layers_for(target.cost_limit), None
    for attempt in range(MAX_ROUNDS if verify else 0):
        if depth is None:
            break
        # One block of a record has no interval: it is measured again.
        if len(costs.get(depth, [])) < 2:
            measure((layers - depth,) if depth < layers else (layers // 4,), f"{depth}-layers")
            costs, fit = fitted()
        interval = mean_cost(costs[depth])
        verified = interval.high is not None and interval.high <= target.cost_limit
        if verified or attempt + 1 == MAX_ROUNDS:
            break
        remarks.append(
            f"{depth} layers were named by the line and measured "
            f"{target.shown(interval.estimate)}: not all of the interval meets the target"
        )
        named = fit.layers_for(target.cost_limit)
        depth = None if named is None or depth == 1 else min(named, depth - 1)
    remarks += _drift(found, names, target, concurrency, layers)
    return answer(model, target, concurrency, layers, fit, depth, costs, verified, remarks, names)


def _as_recorded(options: ServeOptions, record: ServeRecord, concurrency: int) -> ServeOptions:
    """The same load as the records', so that what is measured belongs on their line."""
    workload, load = record.workload, closed_load(record, concurrency)
    return replace(
        options,
        input_len=workload.input_len,
        output_len=workload.output_len,
        dtype=workload.dtype,
        seed=workload.seed,
        ttft_slo_ms=workload.ttft_slo_ms,
        tpot_slo_ms=workload.tpot_slo_ms,
        num_requests=options.num_requests if load is None else load.num_requests,
        flags=tuple(engine_flags(record)),
    )


def _question(
    model: Path, target: Target, concurrency: int, records: Sequence[Path], options: ServeOptions
) -> dict[str, Any]:
    """Everything that decides what is measured in the folder of the experiments."""
    return {
        "schema_version": 1,
        "kind": "slo-question",
        "model": _sha256(model / "config.json"),
        "target": str(target),
        "concurrency": concurrency,
        "records": [_sha256(path) for path in records],
        "num_blocks": options.num_blocks,
        "num_requests": options.num_requests,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "dtype": options.dtype,
        "seed": options.seed,
        "flags": list(options.flags),
    }


def _keep_question(folder: Path, question: dict[str, Any]) -> None:
    """Write down what the folder's measurements are for; refuse those of another question."""
    path = folder / _QUESTION_NAME
    if path.exists():
        old = read_json_object(path, max_bytes=2**20)
        changed = sorted(key for key in old.keys() | question.keys()
                         if old.get(key) != question.get(key))  # fmt: skip
        if changed:
            raise UserError(
                f"{folder}: holds the measurements of another question ({', '.join(changed)} "
                "differ); give another --work, or what was measured with --record "
                f"{folder / 'depths' / 'record.json'}"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: is there and holds no measurements of trsp plan --slo; give another --work"
        )
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(question, indent=1) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _drift(
    records: Sequence[ServeRecord],
    names: Sequence[str],
    target: Target,
    concurrency: int,
    layers: int,
) -> list[str]:
    """Records in which the dense model itself costs something else than in the first."""
    means = []
    for record, name in zip(records, names, strict=True):
        costs = costs_by_depth([record], [name], target.metric, concurrency, layers)
        means.append(mean_cost(costs[layers]).estimate)
    return [
        f"the dense model costs {mean / means[0]:.2f} x as much in {name} as in {names[0]}: the "
        "machine was not the same, and the line mixes both"
        for mean, name in zip(means, names, strict=True)
        if abs(math.log(mean / means[0])) > _DRIFT
    ]


def _paired(costs: Costs) -> list[list[float]]:
    """As many blocks of every depth: the first ones of each."""
    count = min(len(values) for values in costs.values())
    return [values[:count] for values in costs.values()]
