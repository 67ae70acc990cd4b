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
        shortened: why there are fewer new tokens than the default, where there are.
    """

    num_prompts: Count
    prompt_tokens: Count
    new_tokens: Count
    same_prefix: Share
    same_places: Share
    identical: Share
    worst: list[ContinuedText]
    shortened: str | None = None


class Paired(_Frozen):
    """The same cases put to both models, one or more in a prompt.

    Attributes:
        both, only_dense, only_pruned, neither: cases by who gets them right.
        lost, gained: prompts of which the pruned model gets fewer and more cases right.
        p: of as uneven a split between lost and gained by chance, two-sided exact.
        needed: cases that the dense model must get right; with fewer nothing is compared.
    """

    num_prompts: Count
    both: Count
    only_dense: Count
    only_pruned: Count
    neither: Count
    lost: Count
    gained: Count
    p: Share
    needed: Count

    @property
    def cases(self) -> int:
        """How many there are."""
        return self.both + self.only_dense + self.only_pruned + self.neither

    @property
    def dense(self) -> int:
        """Cases that the dense model gets right."""
        return self.both + self.only_dense

    @property
    def pruned(self) -> int:
        """Cases that the pruned model gets right."""
        return self.both + self.only_pruned

    @property
    def comparable(self) -> bool:
        """Whether the dense model gets enough right to lose some."""
        return self.dense >= self.needed


class Loops(_Frozen):
    """`free`: continuations of `new_tokens` whose last half is no cycle.

    `distinct_dense`, `distinct_pruned`: different runs of three tokens over all, mean over the
    continuations; None, as no case, where they are too short to tell.
    """

    new_tokens: Count
    free: Paired
    distinct_dense: Share | None
    distinct_pruned: Share | None


class Closing(_Frozen):
    """Prompts that end inside a bracket or quotation, which the text closes soon.

    Attributes:
        num_places: such places in the text.   opened: prompts by opening sign.
        right: closed within `new_tokens`.
    """

    prompt_tokens: Count
    new_tokens: Count
    num_places: Count
    opened: dict[str, int]
    right: Paired


class Copies(_Frozen):
    """Spans said again, of the text or of random tokens of it.

    Attributes:
        length: tokens of a span, of which the first `given` are given.
        num_known: tokens that are no case, as a model finds them at first sight.
    """

    source: Literal["text", "random"]
    length: Count
    given: Count
    num_known: Count
    right: Paired


class Sums(_Frozen):
    """Sums of two numbers of so many digits, after three examples."""

    digits: Count
    right: Paired


class Generation(_Frozen):
    """Skills of generation; see `generation_checks`.

    Attributes:
        sums: the same in every domain.
        num_prompts, num_new_tokens: of all checks, put to and made by each model.
        seconds: for brackets and copies, both models.
    """

    loops: Loops
    closing: Closing
    copies: list[Copies]
    sums: list[Sums]
    num_prompts: Count
    num_new_tokens: Count
    seconds: float


class SharedText(_Frozen):
    """What a text has in common with the calibration text: `text_checks.Overlap`."""

    n: Count
    num_ngrams: Count
    share: Share
    calibration_share: Share
    longest_run: Count
    longest_start: Count


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
    # Records of before these checks lack it.
    generation: Generation | None = None
    # The dense model's; None also in older records.
    bits_per_byte: float | None = None
    # None where the calibration text could not be drawn again, and in older records.
    overlap: SharedText | None = None


class Outcome(_Frozen):
    """One criterion in one domain.

    `value` None: it could not be measured, for this `reason`, and so not passed.
    """

    criterion: str
    domain: str
    limit: float
    value: float | None
    passed: bool
    reason: str | None = None


class AuditRecord(_Frozen):
    """A whole audit.

    Attributes:
        criteria: the acceptance file as it was read, and its sha256; None without one.
        passed: whether every criterion was met; None without any.
        environment: see `record.environment`.
        warnings: what speaks against the texts.
        overlap_unknown: why the overlap with the calibration text was not measured.
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
    warnings: list[str] = []
    overlap_unknown: str | None = None

    def overlap_lines(self) -> tuple[str, ...]:
        """How much of each text the pruned model has seen, or why nobody could tell."""
        why = self.overlap_unknown or "the record was written before this was measured"
        return tuple(
            f"{one.name}: overlap with the calibration sequences was not measured: {why}."
            if one.overlap is None
            else f"{one.name}: {100 * one.overlap.share:.2g} % of its {one.overlap.n}-token runs "
            "stand in the calibration sequences."
            for one in self.domains
        )


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
