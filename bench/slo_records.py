"""What records of speed experiments say of cost against depth, and whether they may be joined.

Costs of two records stand on one line only if nothing differed but the number of layers.
"""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from trsp.bench.serve_record import Arm, Cell, Load, ServeRecord
from trsp.bench.speed_analysis import is_cost
from trsp.pruner.errors import UserError

# Cost of each block by depth; the k-th values of all depths of one record are of one block.
Costs = dict[int, list[float]]
# Both halves of a block, as a speed-up needs them.
_HALVES = 2
_FINGERPRINT = "fingerprint of the dense model"


def costs_by_depth(
    records: Sequence[ServeRecord], names: Sequence[str], metric: str, concurrency: int, layers: int
) -> Costs:
    """Cost of each block by depth under this load, from the blocks in which every arm counts.

    The control is left out: the dense model would count twice.

    Args:
        names: of the records, for messages.
        metric: a cost itself, or a rate, whose cost is its inverse.
        layers: of the dense model.
    Raises:
        UserError: a record is partial, invalid or of another model; the metric was not measured;
            fewer than two depths.
    """
    costs: Costs = {}
    load = f"closed {concurrency}"
    for record, name in zip(records, names, strict=True):
        _require_sound(record, name, layers)
        by_arm: dict[str, dict[int, float]] = {}
        for arm in record.arms:
            place = (arm.name, load, "equal-kv")
            cells = [cell for cell in record.cells if (cell.arm, cell.load, cell.memory) == place]
            blocks = _blocks(cells, metric, name)
            if blocks and arm.role != "control":
                by_arm[arm.name] = blocks
        common = sorted(set.intersection(*map(set, by_arm.values()))) if by_arm else []
        if by_arm and not common:
            raise UserError(f"{name}: no block of {load!r} counts for every depth; measure again")
        # Two arms of one depth, such as learned and random layers, are one cost.
        for depth in dict.fromkeys(record.arm(arm).num_hidden_layers for arm in by_arm):
            same = [blocks for arm, blocks in by_arm.items()
                    if record.arm(arm).num_hidden_layers == depth]  # fmt: skip
            costs.setdefault(depth, []).extend(
                fmean(blocks[block] for blocks in same) for block in common
            )
    if len(costs) < 2:
        raise UserError(
            f"{len(costs)} depths were measured under {load!r}; a line needs two. Measure the load "
            "with trsp bench serve, or leave out --record"
        )
    return costs


def require_agreement(records: Sequence[ServeRecord], names: Sequence[str], load: str) -> None:
    """Refuse records that differ in anything but their pruned arms and blocks.

    Raises:
        UserError: names the first difference.
    """
    for record, name in zip(records[1:], names[1:], strict=True):
        theirs = dict(_conditions(record, load))
        for what, ours in _conditions(records[0], load):
            # Random weights have no fingerprint, and speed does not depend on weights.
            if what == _FINGERPRINT and None in (ours, theirs[what]):
                continue
            if theirs[what] != ours:
                raise UserError(
                    f"{name}: {what} is {theirs[what]}, in {names[0]} {ours}: a line needs "
                    "records that differ in depth alone; leave one of them out"
                )


def require_same_model(model: Path, record: ServeRecord, name: str) -> None:
    """Refuse a record of another model of the same depth.   Raises: UserError."""
    from trsp.bench.bounds import ModelCost

    cost = ModelCost.from_config(model, dtype=record.workload.dtype)
    dense = _dense(record, name)
    for what, ours, theirs in (
        ("layers", cost.num_hidden_layers, dense.num_hidden_layers),
        ("parameters", cost.num_parameters, dense.num_parameters),
        ("bytes of KV cache per token", cost.kv_bytes_per_token, dense.kv_bytes_per_token),
    ):
        if ours != theirs:
            raise UserError(
                f"{name}: is of a model with {theirs:,} {what}, {model} has {ours:,}; give records "
                "of this model, or none"
            )


def require_same_machine(record: ServeRecord, name: str) -> None:
    """Refuse to measure beside a record from another engine, GPU or processor.

    Raises:
        UserError: it differs, or no vLLM is installed.
    """
    from trsp.bench.record import environment
    from trsp.serving.vllm_versions import installed_vllm

    try:
        engine = " ".join(installed_vllm())
    except ImportError as error:
        raise UserError(f"{error}; or --no-verify, which measures nothing") from error
    here = [("engine", engine), *_machine(environment())]
    for (what, ours), (_, theirs) in zip(
        here, [("engine", record.engine), *_machine(record.environment)], strict=True
    ):
        if ours != theirs:
            raise UserError(
                f"{name}: {what} is {theirs}, here {ours}: what is measured here does not "
                "belong on its line; --no-verify, or leave out --record"
            )


def closed_load(record: ServeRecord, concurrency: int) -> Load | None:
    """The closed loop with this many requests in flight; None where it was not measured."""
    name = f"closed {concurrency}"
    return next((load for load in record.loads if load.name == name), None)


def engine_flags(record: ServeRecord) -> list[str]:
    """vLLM's flags of the record's own command: what stands after --."""
    words = shlex.split(str(record.environment.get("command", "")))
    return words[words.index("--") + 1 :] if "--" in words else []


def _conditions(record: ServeRecord, load: str) -> Iterator[tuple[str, Any]]:
    """What must be equal, by name, what tells most first."""
    dense = _dense(record, "a record")
    yield "backend", record.backend
    yield "engine", record.engine
    yield from _machine(record.environment)
    yield "variables of the engines", record.environment.get("engine_variables")
    yield "flags for vLLM", engine_flags(record)
    for name, value in record.workload.model_dump().items():
        yield f"workload's {name}", value
    yield (
        f"number of requests of {load!r}",
        next((one.num_requests for one in record.loads if one.name == load), None),
    )
    for name in ("num_hidden_layers", "num_parameters", "weight_bytes", "kv_bytes_per_token"):
        yield f"{name} of the dense model", getattr(dense, name)
    yield _FINGERPRINT, dense.fingerprint


def _machine(surroundings: dict[str, Any]) -> list[tuple[str, Any]]:
    """GPU and driver; the processor where there is no GPU, since then it does the work."""
    gpu = surroundings.get("gpu")
    gpu = gpu if isinstance(gpu, dict) else {}
    processor = None if gpu else (surroundings.get("processor"), surroundings.get("num_cpus"))
    return [
        ("GPU", gpu.get("name")),
        ("driver of the GPU", gpu.get("driver_version")),
        ("processor and cores", processor),
    ]


def _dense(record: ServeRecord, name: str) -> Arm:
    dense = next((arm for arm in record.arms if arm.role == "dense"), None)
    if dense is None:
        raise UserError(f"{name}: has no dense arm to compare with; measure again")
    return dense


def _require_sound(record: ServeRecord, name: str, layers: int) -> None:
    if record.backend != "serve":
        raise UserError(
            f"{name}: is of --backend {record.backend}; requests in flight need a server's record"
        )
    if record.invalid or record.partial:
        state = "partial" if record.partial else f"invalid ({record.invalid[0]})"
        raise UserError(f"{name}: is {state}; measure again, or leave it out")
    dense = _dense(record, name)
    if dense.num_hidden_layers != layers:
        raise UserError(
            f"{name}: is of a model with {dense.num_hidden_layers} layers, this one has {layers}"
        )


def _blocks(cells: Sequence[Cell], metric: str, name: str) -> dict[int, float]:
    """The cost of each block with both halves valid."""
    halves: dict[int, list[float]] = {}
    for cell in cells:
        if cell.invalid:
            continue
        if metric not in cell.metrics:
            raise UserError(
                f"{name}: {metric} was not measured; choose from {', '.join(sorted(cell.metrics))}"
            )
        value = cell.metrics[metric]
        if value <= 0:
            raise UserError(f"{name}: {metric} is {value} for {cell.arm}: no cost of it")
        halves.setdefault(cell.block, []).append(value if is_cost(metric) else 1 / value)
    return {block: fmean(values) for block, values in halves.items() if len(values) == _HALVES}
