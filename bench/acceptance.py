"""Acceptance criteria of a release gate: a YAML file of limits, judged on an audit.

perplexity_ratio: 1.10     # pruned over dense, at most
tail_ratio: 1.15           # costliest hundredth of tokens, pruned over dense loss, at most
worst_increase: 4.0        # nats, mean over the hundredth that lost most, at most
rare_increase: 0.3         # nats, mean over the rarest tokens of the text, at most
top1_agreement: 0.85       # at least
top1_lost: 0.10            # of what the dense model had right, at most
kl: 0.2                    # nats a token, at most
greedy_prefix: 0.5         # share of a greedy continuation before it parts, at least
loops_increase: 0.1        # share of greedy continuations that loop, pruned less dense, at most
closed_kept: 0.9           # of the brackets and quotations that the dense model closes, at least
copy_kept: 0.9             # of the tokens of repeated text that the dense model copies, at least
arithmetic_kept: 0.8       # of the sums that the dense model gets right, at least
domains:
  contracts:
    perplexity_ratio: 1.05   # instead of the one above

A criterion that could not be measured is not met: a gate that looks at nothing must not open.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from trsp.bench.audit_record import Domain, Outcome, Paired
from trsp.pruner.errors import UserError, first_problem

_MAX_BYTES = 2**20


class Limits(BaseModel):
    """Limits of one domain, or of all; see the module."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    perplexity_ratio: float | None = None
    tail_ratio: float | None = None
    worst_increase: float | None = None
    rare_increase: float | None = None
    top1_agreement: float | None = None
    top1_lost: float | None = None
    kl: float | None = None
    greedy_prefix: float | None = None
    loops_increase: float | None = None
    closed_kept: float | None = None
    copy_kept: float | None = None
    arithmetic_kept: float | None = None

    def given(self) -> dict[str, float]:
        """The limits that are set, by criterion."""
        return {name: getattr(self, name) for name in VALUES if getattr(self, name) is not None}


class Criteria(Limits):
    """The whole file. `domains`: limits that replace those for all."""

    domains: dict[str, Limits] = {}


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"{twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


_NO_PROMPTS = "nothing was generated: --prompts is 0"


def _tail_ratio(domain: Domain) -> float | str:
    if domain.losses.tail_dense <= 0:
        return "the dense model loses nothing on its costliest tokens"
    return domain.losses.tail_pruned / domain.losses.tail_dense


def _rare_increase(domain: Domain) -> float | str:
    return domain.bands[0].losses.increase if domain.bands else "the text has no tokens"


def _top1_lost(domain: Domain) -> float | str:
    lost = domain.losses.top1_lost
    return "the dense model is never right" if lost is None else lost


def _loops_increase(domain: Domain) -> float | str:
    if domain.generation is None:
        return _NO_PROMPTS
    free = domain.generation.loops.free
    if not free.comparable:
        return (
            f"the dense model goes on without a loop in {free.dense} of {free.cases}; "
            f"{free.needed} are needed"
        )
    return (free.only_dense - free.only_pruned) / free.cases


def _closed_kept(domain: Domain) -> float | str:
    if domain.generation is None:
        return _NO_PROMPTS
    return _kept([domain.generation.closing.right], "closes")


def _copy_kept(domain: Domain) -> float | str:
    if domain.generation is None:
        return _NO_PROMPTS
    copies = [one.right for one in domain.generation.copies if one.source == "text"]
    return _kept(copies, "copies")


def _arithmetic_kept(domain: Domain) -> float | str:
    if domain.generation is None:
        return _NO_PROMPTS
    return _kept([one.right for one in domain.generation.sums], "adds")


def _kept(parts: Sequence[Paired], does: str) -> float | str:
    """Of what the dense model can do, the share that the pruned one can too."""
    enough = [part for part in parts if part.comparable]
    if not enough:
        told = " and ".join(
            f"{part.dense} of {part.cases} where {part.needed} are needed" for part in parts
        )
        return f"the dense model {does} {told or 'nothing: context or text are too short'}"
    return sum(part.both for part in enough) / sum(part.dense for part in enough)


# By criterion: how it is read from a domain, or why it cannot be, and to which side its limit lies.
VALUES: Mapping[str, tuple[Callable[[Domain], float | str], Literal["at most", "at least"]]] = {
    "perplexity_ratio": (lambda d: d.pruned_perplexity / d.dense_perplexity, "at most"),
    "tail_ratio": (_tail_ratio, "at most"),
    "worst_increase": (lambda d: d.losses.worst_increase, "at most"),
    "rare_increase": (_rare_increase, "at most"),
    "top1_agreement": (lambda d: d.losses.top1_agreement, "at least"),
    "top1_lost": (_top1_lost, "at most"),
    "kl": (lambda d: d.losses.kl, "at most"),
    "greedy_prefix": (lambda d: d.greedy.same_prefix if d.greedy else _NO_PROMPTS, "at least"),
    "loops_increase": (_loops_increase, "at most"),
    "closed_kept": (_closed_kept, "at least"),
    "copy_kept": (_copy_kept, "at least"),
    "arithmetic_kept": (_arithmetic_kept, "at least"),
}


def read_criteria(path: Path, domains: Sequence[str]) -> tuple[Criteria, str]:
    """Read an acceptance file.

    Args:
        domains: the names that it may speak of.
    Returns:
        the criteria and the file's sha256.
    Raises:
        UserError: not readable, not YAML, an unknown criterion or domain, or no limit at all.
    """
    try:
        content = path.read_bytes()[: _MAX_BYTES + 1]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path}: is larger than 1 MiB: no acceptance file")
    try:
        document: Any = yaml.load(content, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected limits by name, such as perplexity_ratio: 1.1")
    try:
        criteria = Criteria.model_validate(document)
    except ValidationError as error:
        raise UserError(
            f"{path}: {first_problem(error)}; the criteria are {', '.join(VALUES)}"
        ) from error
    if unknown := sorted(criteria.domains.keys() - set(domains)):
        raise UserError(
            f"{path}: domain {unknown[0]!r} is not audited; the audited ones are "
            f"{', '.join(domains)}"
        )
    if not criteria.given() and not any(limits.given() for limits in criteria.domains.values()):
        raise UserError(f"{path}: sets no limit; the criteria are {', '.join(VALUES)}")
    return criteria, hashlib.sha256(content).hexdigest()


def judge(criteria: Criteria, domains: Sequence[Domain]) -> list[Outcome]:
    """Every criterion in every domain. What could not be measured is not passed."""
    outcomes = []
    for domain in domains:
        own = criteria.domains.get(domain.name)
        limits = criteria.given() | (own.given() if own else {})
        for criterion, limit in limits.items():
            read, side = VALUES[criterion]
            found = read(domain)
            value, reason = (None, found) if isinstance(found, str) else (found, None)
            passed = value is not None and (value <= limit if side == "at most" else value >= limit)
            outcomes.append(
                Outcome(
                    criterion=criterion,
                    domain=domain.name,
                    limit=limit,
                    value=value,
                    passed=passed,
                    reason=reason,
                )
            )
    return outcomes
