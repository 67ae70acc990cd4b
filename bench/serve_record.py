"""What a speed experiment found: one document, from which tables, plots and report are made.

Metric names are vLLM's own (`median_ttft_ms`, `output_throughput`, ...). A ratio is always a
speed-up: above 1 the pruned model is better, whatever the metric's direction.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError, first_problem

MAX_RECORD_BYTES = 64 * 2**20

Memory = Literal["equal-kv", "equal-memory"]
Backend = Literal["serve", "latency", "throughput", "transformers"]
Count = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Quality(_Frozen):
    """Perplexity of an arm's model on one text, with the protocol it was measured by."""

    text: str
    perplexity: Annotated[float, Field(gt=0)]
    protocol: dict[str, Any]


class Arm(_Frozen):
    """One model of the experiment. `control`: the dense model again, the A/A noise floor.

    Attributes:
        model: the folder or shape as it was named.
        weights: "dummy" weights are random: their speed counts, their text does not.
        fingerprint: of a checkpoint; None for dummy weights.
        disk_bytes: the folder's size; None for dummy weights.
        kv_bytes_per_token: over all layers.
        quality: measured elsewhere and read from the model's folder; may be empty.
    """

    name: str
    role: Literal["dense", "control", "pruned"]
    model: str
    num_hidden_layers: Annotated[int, Field(ge=1)]
    weights: Literal["checkpoint", "dummy"]
    fingerprint: str | None
    disk_bytes: Count | None
    num_parameters: Count
    weight_bytes: Count
    kv_bytes_per_token: Count
    quality: list[Quality]


class Load(_Frozen):
    """What the client does to the server, or one offline measurement.

    closed: so many requests always in flight. open: Poisson arrivals at `share` of the dense
    model's capacity. batch: one offline batch.
    """

    name: str
    kind: Literal["closed", "open", "batch"]
    concurrency: Count | None = None
    share: float | None = None
    request_rate: float | None = Field(None, description="requests/s; open loads only")
    num_requests: Count


class Workload(_Frozen):
    """Tokens in and out of each request, and the two bounds of goodput."""

    input_len: Annotated[int, Field(ge=1)]
    output_len: Annotated[int, Field(ge=1)]
    dtype: str
    seed: int
    ttft_slo_ms: float
    tpot_slo_ms: float


class Start(_Frozen):
    """One start of an arm's engine and what it said of itself.

    Attributes:
        load_seconds: from the start of the process to its health.
        weights_gib: what the engine says the weights take; None where it says nothing.
        kv_cache_tokens, num_kv_blocks: room in the KV cache.
        engine_config: the parts of the engine's configuration, flattened: dotted name to text.
    """

    arm: str
    memory: Memory
    block: Count
    command: str
    load_seconds: float
    weights_gib: float | None
    kv_cache_tokens: Count | None
    num_kv_blocks: Count | None
    engine_config: dict[str, str]


class Cell(_Frozen):
    """One measurement: an arm under a load, in one half of one block.

    Attributes:
        position: place in the block's palindrome, 0 first.
        metrics: by vLLM's names; milliseconds, requests/s and tokens/s as the names say.
        prompts_sha256: over the prompts' text and lengths as they were sent.
        client_cpu_share: processor time of the client over the window; 1 is a full core.
        notes: facts that do not invalidate.   invalid: why it does not count; empty: it does.
    """

    block: Count
    position: Count
    memory: Memory
    arm: str
    load: str
    started_at: str
    completed: Count
    failed: Count
    total_input_tokens: Count
    total_output_tokens: Count
    metrics: dict[str, float]
    prompts_sha256: str | None
    client_cpu_share: float | None
    prefix_cache_hits: Count | None
    num_preemptions: Count | None
    notes: list[str]
    invalid: list[str]


class Ratio(_Frozen):
    """Speed-up of an arm over the dense one in one metric under one load.

    Attributes:
        estimate: geometric mean over blocks.   low, high: 95 % interval; None with one block.
        blocks: each block's own speed-up, in order.   block_numbers: which blocks, 0 first; empty
            in records from before it was written, where none was left out.
        bound: the most that bytes and FLOPs allow; None where none applies (queueing, KV room).
        verdict: how the interval lies to the bound; for a control, whether it contains 1.
    """

    memory: Memory
    arm: str
    load: str
    metric: str
    dense: float
    pruned: float
    estimate: float
    low: float | None
    high: float | None
    blocks: list[float]
    block_numbers: list[Count] = []
    bound: float | None
    achieved_over_bound: float | None
    verdict: str


class ServeRecord(_Frozen):
    """A whole experiment.

    Attributes:
        label: what must stand beside every number, such as "CPU, not a serving claim"; or None.
        partial: it ended before all planned cells were measured.
        invalid: why the whole experiment does not count; empty: it does.
        explained: differences of the engines' configurations that follow from the layers.
        not_measured: one line for each thing a reader might expect and that is not here.
        commands: what was run, the experiment's own command first.
        hashes: sha256 by name: prompts, models.
        environment: see `record.environment`.
    """

    schema_version: Literal[1] = 1
    kind: Literal["serve"] = "serve"
    backend: Backend
    engine: str
    label: str | None
    partial: bool
    num_blocks: Count
    confidence: float
    arms: list[Arm]
    loads: list[Load]
    workload: Workload
    memories: list[Memory]
    starts: list[Start]
    cells: list[Cell]
    ratios: list[Ratio]
    invalid: list[str]
    explained: list[str]
    not_measured: list[str]
    commands: list[str]
    hashes: dict[str, str]
    environment: dict[str, Any]

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)


def read_serve_record(path: Path) -> ServeRecord:
    """Read a record.

    Raises:
        UserError: missing, too large, not JSON, or not a record of this schema; one line.
    """
    document = read_json_object(path, max_bytes=MAX_RECORD_BYTES)
    if document.get("kind") != "serve" or document.get("schema_version") != 1:
        raise UserError(
            f"{path}: kind {document.get('kind')!r}, schema_version "
            f"{document.get('schema_version')!r}: not a record of `trsp bench serve`, version 1"
        )
    try:
        return ServeRecord.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from error


def write_serve_record(path: Path, record: ServeRecord) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, record.model_dump_json(indent=1) + "\n")
