"""What an audit found: one document, which a release gate keeps."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError, first_problem

_MAX_BYTES = 2**26
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class AuditedModel(_Frozen):
    """`weights_sha256`: over samples of every shard, as `checkpoint.sample_weights` takes it."""

    folder: str
    num_hidden_layers: Count
    fingerprint: str
    weights_sha256: str


class Losses(_Frozen):
    """Both models on a set of tokens; losses in nats.

    Attributes:
        increase: mean of the pruned model's loss less the dense one's.
        increase_quantiles: of the tokens' increases, by percent: "50", "90", "99", "99.9".
        worst_increase: mean over the hundredth of the tokens with the largest increase.
        best_decrease: mean over the hundredth with the largest decrease: single tokens go up and
            down by chance, and this is how far they go down.
        tail_dense, tail_pruned: mean over each model's own costliest hundredth of the tokens.
        top1_agreement: share of tokens for which both models find the same one most likely.
        top1_lost: of those the dense model finds most likely and right, the share that the pruned
            one does not; None where the dense model is never right.
        kl: mean divergence of the pruned prediction from the dense one.
    """

    num_tokens: Count
    dense: float
    pruned: float
    increase: float
    increase_quantiles: dict[str, float]
    worst_increase: float
    best_decrease: float
    tail_dense: float
    tail_pruned: float
    top1_agreement: Share
    top1_lost: Share | None
    kl: float


class Band(_Frozen):
    """Tokens that occur `least` to `most` times in the audited text; no end where None."""

    least: Count
    most: Count | None
    losses: Losses


class Example(_Frozen):
    """A token that the pruned model lost most on, with the text before it."""

    before: str
    token: str
    dense_says: str
    pruned_says: str
    dense: float
    pruned: float


class ContinuedText(_Frozen):
    """A prompt and what each model makes of it."""

    prompt: str
    dense: str
    pruned: str
    same_prefix: Count


class Greedy(_Frozen):
    """Greedy continuations.

    Attributes:
        same_prefix: mean share of a continuation until the first other token.
        same_places: mean share of places with the same token.
        identical: share of prompts whose whole continuation is the same.
        worst: those that part first.
    """

    num_prompts: Count
    prompt_tokens: Count
    new_tokens: Count
    same_prefix: Share
    same_places: Share
    identical: Share
    worst: list[ContinuedText]


class Domain(_Frozen):
    """One text. `protocol`: what its losses hold for; see `windows.Protocol`."""

    name: str
    files: list[str]
    protocol: dict[str, Any]
    dense_perplexity: float
    pruned_perplexity: float
    losses: Losses
    bands: list[Band]
    greedy: Greedy | None
    examples: list[Example]


class Outcome(_Frozen):
    """One criterion in one domain. `value` None: it could not be measured, and so not passed."""

    criterion: str
    domain: str
    limit: float
    value: float | None
    passed: bool


class AuditRecord(_Frozen):
    """A whole audit.

    Attributes:
        criteria: the acceptance file as it was read, and its sha256; None without one.
        passed: whether every criterion was met; None without any.
        environment: see `record.environment`.
    """

    schema_version: Literal[1] = 1
    kind: Literal["audit"] = "audit"
    dense: AuditedModel
    pruned: AuditedModel
    domains: list[Domain]
    criteria: dict[str, Any] | None
    criteria_sha256: str | None
    outcomes: list[Outcome]
    passed: bool | None
    environment: dict[str, Any]


def read_audit_record(path: Path) -> AuditRecord:
    """Read a record.   Raises: UserError: it is none of this schema."""
    document = read_json_object(path, max_bytes=_MAX_BYTES)
    try:
        return AuditRecord.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from error


def write_audit_record(path: Path, record: AuditRecord) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, record.model_dump_json(indent=1) + "\n")
