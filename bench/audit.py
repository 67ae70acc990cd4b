"""`trsp audit`: a pruned model beside the dense one, token by token, on the user's own text.

A mean hides what few inputs lose. So the tokens that lost most are counted, grouped by how rare
they are, and shown; and both models are let to go on from the same prompts.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trsp.bench.acceptance import judge, read_criteria
from trsp.bench.audit_record import (
    AuditedModel,
    AuditRecord,
    Band,
    ContinuedText,
    Domain,
    Example,
    Greedy,
    Losses,
    SharedText,
    Sums,
)
from trsp.bench.audit_texts import (
    audit_warnings,
    calibration_bits,
    overlaps,
    refuse_calibration_text,
    seen_text,
)
from trsp.bench.generation_checks import Models, check_sums, measure_generation
from trsp.bench.greedy_agreement import Continuation, continue_prompts, spread_prompts
from trsp.bench.record import environment
from trsp.bench.token_losses import TokenLosses, compare_tokens
from trsp.pruner.checkpoint import (
    Checkpoint,
    check_tokenizer,
    load_model,
    load_tokenizer,
    open_checkpoint,
    sample_weights,
)
from trsp.pruner.errors import UserError
from trsp.pruner.evaluation import exp_loss
from trsp.pruner.progress import Progress, silent
from trsp.pruner.text_checks import bits_per_byte, bytes_per_token
from trsp.pruner.token_ids import hash_tokenizer
from trsp.pruner.windows import Windows, cut_windows

# Occurrences of a token in the audited text: least and most of each band.
BANDS: tuple[tuple[int, int | None], ...] = ((1, 1), (2, 9), (10, 99), (100, None))
QUANTILES = (50.0, 90.0, 99.0, 99.9)
_TAIL = 0.01
_TEXT_BEFORE = 24
_WORST_CONTINUATIONS = 3
_PROMPT_TOKENS = 64
_NEW_TOKENS = 128


@dataclass(frozen=True)
class AuditOptions:
    """What the user asked for; see the command's help.

    Attributes:
        data: files or folders by the name of their domain.
        prompts: greedy continuations in each domain, and prompts of each check of generation; 0
            leaves them out.
        prompt_tokens: None: 64, or half of what the model's context takes.
        new_tokens: None: 128, or what the context leaves.
    """

    dense: Path
    pruned: Path
    data: Mapping[str, Sequence[Path]]
    accept: Path | None = None
    window: int | None = None
    max_tokens: int | None = None
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "cpu"
    text_field: str = "text"
    prompts: int = 16
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    examples: int = 10
    trust_remote_code: bool = False


def audit(options: AuditOptions, progress: Progress = silent) -> AuditRecord:
    """Measure both models on every domain, and judge by the acceptance file where there is one.

    Raises:
        UserError: a model, text or acceptance file that cannot be used; two tokenizers; text that
            the pruned model was calibrated on.
        RunError: a loss is not finite.
    """
    _check(options)
    criteria = None
    if options.accept is not None:
        criteria, digest = read_criteria(options.accept, list(options.data))
    refuse_calibration_text(options.pruned, options.data)
    known_bits = calibration_bits(options.pruned)
    checkpoints = [
        open_checkpoint(folder, trust_remote_code=options.trust_remote_code)
        for folder in (options.dense, options.pruned)
    ]
    tokenizer = _common_tokenizer(checkpoints, options)
    seen = seen_text(options.pruned, tokenizer, _labelled("calibration", progress))
    dense, pruned = (
        load_model(
            checkpoint,
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
        for checkpoint in checkpoints
    )
    _require_alike(dense, pruned, options)
    texts = {name: _windows(name, dense, tokenizer, options, progress) for name in options.data}
    shared, warnings = overlaps(
        seen, {name: windows.ids for name, windows in texts.items()}, tokenizer
    )
    domains: list[Domain] = []
    # Sums depend on no text: asked once, told in every domain.
    sums: list[Sums] | None = None
    for name, windows in texts.items():
        found = _domain(name, windows, dense, pruned, tokenizer, sums, options, progress)
        overlap = None if name not in shared else SharedText(**asdict(shared[name]))
        domains.append(found.model_copy(update={"overlap": overlap}))
        if domains[-1].generation is not None:
            sums = domains[-1].generation.sums
    outcomes = judge(criteria, domains) if criteria else []
    return AuditRecord(
        dense=_audited(checkpoints[0]),
        pruned=_audited(checkpoints[1]),
        domains=domains,
        criteria=criteria.model_dump(exclude_none=True) if criteria else None,
        criteria_sha256=digest if criteria else None,
        outcomes=outcomes,
        passed=all(outcome.passed for outcome in outcomes) if outcomes else None,
        environment=environment(),
        overlap_unknown=seen.unknown,
        warnings=warnings
        + audit_warnings({one.name: one.bits_per_byte for one in domains}, known_bits),
    )


def summarize(rows: TokenLosses, chosen: NDArray[np.bool_] | None = None) -> Losses:
    """Figures over all tokens, or over the chosen ones [N], of which there is at least one."""
    at: Any = slice(None) if chosen is None else chosen
    dense, pruned, increase = rows.dense[at], rows.pruned[at], rows.increase[at]
    says, right = rows.dense_says[at] == rows.pruned_says[at], rows.dense_says[at] == rows.token[at]
    count = len(dense)
    tail = max(1, math.ceil(_TAIL * count))
    ordered = np.sort(increase)
    return Losses(
        num_tokens=count,
        dense=float(dense.mean()),
        pruned=float(pruned.mean()),
        increase=float(increase.mean()),
        increase_quantiles={
            f"{percent:g}": float(np.percentile(increase, percent)) for percent in QUANTILES
        },
        worst_increase=float(ordered[-tail:].mean()),
        best_decrease=float(ordered[:tail].mean()),
        tail_dense=float(np.sort(dense)[-tail:].mean()),
        tail_pruned=float(np.sort(pruned)[-tail:].mean()),
        top1_agreement=float(says.mean()),
        top1_lost=float((~says[right]).mean()) if right.any() else None,
        kl=max(0.0, float(rows.kl[at].mean())),
    )


def frequency_bands(rows: TokenLosses, counts: Mapping[int, int]) -> list[Band]:
    """Losses by how often a token occurs in the text, the rarest first; no empty band."""
    occurrences = np.array([counts[int(token)] for token in rows.token])
    bands = []
    for least, most in BANDS:
        chosen = (occurrences >= least) & (occurrences <= (math.inf if most is None else most))
        if chosen.any():
            bands.append(Band(least=least, most=most, losses=summarize(rows, chosen)))
    return bands


def _windows(
    name: str,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: AuditOptions,
    progress: Progress,
) -> Windows:
    return cut_windows(
        dense,
        tokenizer,
        [str(path) for path in options.data[name]],
        window=options.window,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        text_field=options.text_field,
        progress=_labelled(name, progress),
    )


def _labelled(name: str, progress: Progress) -> Progress:
    return lambda task, completed, total: progress(f"{name}: {task}", completed, total)


def _domain(
    name: str,
    windows: Windows,
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sums: Sequence[Sums] | None,
    options: AuditOptions,
    progress: Progress,
) -> Domain:
    labelled = _labelled(name, progress)
    rows = compare_tokens(dense, pruned, windows, labelled)
    losses = summarize(rows)
    counts = Counter(windows.ids.tolist())
    greedy = generation = None
    if options.prompts:
        context = windows.protocol.model_context
        models = Models(dense, pruned, tokenizer, bos=windows.bos, context=context)
        length, new_tokens, shortened = _lengths(models, len(windows.ids), options)
        prompts = [
            torch.tensor(models.begun(prompt.tolist()))
            for prompt in spread_prompts(windows.ids, count=options.prompts, length=length)
        ]
        found = continue_prompts(dense, pruned, prompts, new_tokens=new_tokens, progress=labelled)
        greedy = _greedy(found, tokenizer, new_tokens, shortened)
        generation = measure_generation(
            models,
            windows.ids,
            found,
            check_sums(models, options.prompts, progress) if sums is None else sums,
            num_prompts=options.prompts,
            prompt_tokens=length,
            progress=labelled,
        )
    return Domain(
        name=name,
        files=[path.name for path in options.data[name]],
        protocol=asdict(windows.protocol),
        dense_perplexity=exp_loss(losses.dense),
        pruned_perplexity=exp_loss(losses.pruned),
        losses=losses,
        bands=frequency_bands(rows, counts),
        greedy=greedy,
        examples=_examples(rows, windows, tokenizer, options.examples),
        generation=generation,
        bits_per_byte=bits_per_byte(losses.dense, bytes_per_token(tokenizer, windows.ids)),
    )


def _lengths(
    models: Models, text_tokens: int, options: AuditOptions
) -> tuple[int, int, str | None]:
    """Tokens of a prompt and of its continuation, and why it is shorter than the default.

    Only what was not asked for is made to fit.
    """
    begun = len(models.begun([]))
    room = math.inf if models.context is None else models.context - begun
    wanted = options.prompt_tokens
    if wanted is None:
        wanted = int(min(_PROMPT_TOKENS, room // 2))
    length = min(wanted, text_tokens)
    new_tokens, shortened = options.new_tokens, None
    if new_tokens is None:
        new_tokens = int(min(_NEW_TOKENS, max(1, room - length)))
        if new_tokens < _NEW_TOKENS:
            shortened = (
                f"{new_tokens} of {_NEW_TOKENS} tokens: the model's context of {models.context} "
                f"leaves no more after a prompt of {begun + length}"
            )
    if length + new_tokens > room:
        raise UserError(
            f"--prompt-tokens {length} and --new-tokens {new_tokens} need "
            f"{begun + length + new_tokens} positions, the model has {models.context}"
        )
    return length, new_tokens, shortened


def _examples(
    rows: TokenLosses, windows: Windows, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Example]:
    """The tokens with the largest increase, each with the text before it in its window."""

    def text(ids: Any) -> str:
        return str(tokenizer.decode(ids))

    chosen = np.argsort(-rows.increase, kind="stable")[:count]
    found = []
    for row in chosen.tolist():
        begin = int(rows.window[row]) * windows.stride
        # A window's first place is bos where there is one.
        place = begin + int(rows.offset[row]) - (windows.bos is not None)
        before = windows.ids[max(begin, place - _TEXT_BEFORE) : place]
        found.append(
            Example(
                before=text(before.tolist()),
                token=text([int(rows.token[row])]),
                dense_says=text([int(rows.dense_says[row])]),
                pruned_says=text([int(rows.pruned_says[row])]),
                dense=float(rows.dense[row]),
                pruned=float(rows.pruned[row]),
            )
        )
    return found


def _greedy(
    found: Sequence[Continuation],
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int,
    shortened: str | None,
) -> Greedy:
    prefixes = [one.same_prefix for one in found]
    worst = sorted(found, key=lambda one: one.same_prefix)[:_WORST_CONTINUATIONS]
    return Greedy(
        num_prompts=len(found),
        prompt_tokens=len(found[0].prompt),
        new_tokens=new_tokens,
        same_prefix=float(np.mean(prefixes)) / new_tokens,
        same_places=float(np.mean([one.same_places for one in found])),
        identical=float(np.mean([prefix == new_tokens for prefix in prefixes])),
        worst=[
            ContinuedText(
                prompt=str(tokenizer.decode(list(one.prompt))),
                dense=str(tokenizer.decode(list(one.dense))),
                pruned=str(tokenizer.decode(list(one.pruned))),
                same_prefix=one.same_prefix,
            )
            for one in worst
        ],
        shortened=shortened,
    )


def _check(options: AuditOptions) -> None:
    if not options.data:
        raise UserError("nothing to audit on: name your own text with --data NAME=FILE")
    for name, number, least in (
        ("--prompts", options.prompts, 0),
        ("--prompt-tokens", options.prompt_tokens, 1),
        ("--new-tokens", options.new_tokens, 1),
        ("--examples", options.examples, 0),
    ):
        if number is not None and number < least:
            raise UserError(f"{name} {number}: expected at least {least}")


def _require_alike(dense: Any, pruned: Any, options: AuditOptions) -> None:
    """One dtype, so that rounding is not taken for what pruning lost, and one vocabulary."""
    if dense.dtype != pruned.dtype:
        raise UserError(
            f"{options.pruned}: is {pruned.dtype}, the dense model {dense.dtype}; give one --dtype "
            "for both"
        )
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (dense, pruned)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{options.pruned}: has {sizes[1]} rows in its vocabulary, the dense model {sizes[0]}: "
            "it is not that model pruned"
        )


def _common_tokenizer(
    checkpoints: Sequence[Checkpoint], options: AuditOptions
) -> PreTrainedTokenizerBase:
    dense, pruned = (
        load_tokenizer(checkpoint, trust_remote_code=options.trust_remote_code)
        for checkpoint in checkpoints
    )
    if hash_tokenizer(dense) != hash_tokenizer(pruned):
        raise UserError(
            f"{options.pruned}: its tokenizer is not that of {options.dense}: the same text would "
            "be other tokens; copy the dense model's tokenizer files"
        )
    for checkpoint in checkpoints:
        check_tokenizer(checkpoint, dense)
    return dense


def _audited(checkpoint: Checkpoint) -> AuditedModel:
    return AuditedModel(
        folder=checkpoint.path.name,
        num_hidden_layers=checkpoint.num_hidden_layers,
        fingerprint=checkpoint.fingerprint,
        weights_sha256=sample_weights(checkpoint),
    )
