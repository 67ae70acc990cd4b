"""`trsp audit`: parse, call one function, show its record, leave by its verdict."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trsp.bench.statistics import CHANCE
from trsp.pruner.errors import UserError

if TYPE_CHECKING:
    from trsp.bench.audit_record import AuditRecord, Band, Domain, Paired


def audit(
    dense: Annotated[Path, typer.Argument(help="checkpoint folder of the dense model")],
    pruned: Annotated[Path, typer.Argument(help="checkpoint folder of the pruned model")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="text of a domain; repeatable, also for one NAME"),
    ] = None,
    accept: Annotated[Path | None, typer.Option(help="acceptance criteria, YAML")] = None,
    out: Annotated[Path | None, typer.Option(help="record to write, JSON")] = None,
    window: Annotated[int | None, typer.Option(help="tokens; min(2048, context)")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="of each domain at most so many")] = None,
    batch_size: Annotated[int, typer.Option(help="windows at a time")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda")] = "auto",
    prompts: Annotated[
        int, typer.Option(help="of a domain, for each check of generation; 0: none")
    ] = 16,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="of each prompt; 64, or half the context")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="of each continuation; 128, or what the context leaves")
    ] = None,
    examples: Annotated[int, typer.Option(help="tokens that lost most, to keep")] = 10,
    text_field: Annotated[str, typer.Option(help="of jsonl and parquet rows")] = "text",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the checkpoint's own code")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """What pruning lost on your own text: tails, rare tokens, greedy answers; a gate for releases.

    With --accept the exit code is 0 where every criterion is met and 1 where one is not.
    """
    from trsp.bench.audit import AuditOptions
    from trsp.bench.audit import audit as run_audit
    from trsp.bench.audit_record import write_audit_record
    from trsp.pruner.console import progress_bars
    from trsp.pruner.run import resolve_device

    options = AuditOptions(
        dense=dense,
        pruned=pruned,
        data=_domains(data or []),
        accept=accept,
        window=window,
        max_tokens=max_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=resolve_device(device),
        text_field=text_field,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        examples=examples,
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        _refuse_foreign(out)
    with progress_bars() as progress:
        record = run_audit(options, progress)
    if out is not None:
        write_audit_record(out, record)
    for warning in record.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        show_audit(record)
    if record.passed is False:
        raise typer.Exit(1)


def _refuse_foreign(out: Path) -> None:
    """An older audit is replaced; nothing else is."""
    from trsp.bench.audit_record import read_audit_record

    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    if out.exists():
        try:
            read_audit_record(out)
        except UserError as error:
            raise UserError(f"--out {out}: is there and is no audit; give another name") from error


def _domains(words: list[str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UserError(f"--data {word!r}: expected NAME=PATH, such as contracts=texts/")
        found.setdefault(name, []).append(Path(path))
    return found


def show_audit(record: "AuditRecord") -> None:
    """Print tables, examples and the verdict."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{record.pruned.folder} beside {record.dense.folder}")
    table.add_column("domain", overflow="fold")
    for column in ("tokens", "dense", "pruned", "ratio", "top-1", "tail", "KL", "greedy"):
        table.add_column(column, justify="right", overflow="fold")
    for domain in record.domains:
        table.add_row(*_row(domain))
    console.print(table)
    console.print(
        "dense, pruned, ratio: perplexity. top-1: same most likely token. tail: loss of the "
        "costliest 1 % of tokens, pruned over dense. KL: nats a token. greedy: share of a "
        "continuation until the first other token.",
        markup=False,
    )
    bands = Table(title="loss by how often a token occurs in the text, nats")
    for column in ("domain", "occurs", "tokens", "dense", "pruned", "increase", "worst 1 %"):
        bands.add_column(column, justify="left" if column == "domain" else "right")
    for domain in record.domains:
        for band in domain.bands:
            of = band.losses
            bands.add_row(
                domain.name,
                _occurs(band),
                f"{of.num_tokens:,}",
                f"{of.dense:.3f}",
                f"{of.pruned:.3f}",
                f"{of.increase:+.3f}",
                f"{of.worst_increase:+.2f}",
            )
    console.print(bands)
    for line in record.overlap_lines():
        console.print(line, markup=False)
    for domain in record.domains:
        for example in domain.examples[:3]:
            console.print(
                f"{domain.name}: ...{example.before[-60:]!r} then {example.token!r}: loss "
                f"{example.dense:.2f} -> {example.pruned:.2f}; dense says {example.dense_says!r}, "
                f"pruned {example.pruned_says!r}",
                markup=False,
            )
    for domain in record.domains:
        for line in generation_lines(domain):
            console.print(line, markup=False)
    for outcome in record.outcomes:
        value = "not measured" if outcome.value is None else f"{outcome.value:.4g}"
        console.print(
            f"{'pass' if outcome.passed else 'FAIL'}  {outcome.domain}: {outcome.criterion} "
            f"{value}, limit {outcome.limit:g}{f'; {outcome.reason}' if outcome.reason else ''}",
            style=None if outcome.passed else "red",
            markup=False,
        )
    if record.passed is not None:
        console.print("accepted" if record.passed else "NOT accepted")


def generation_lines(domain: "Domain") -> list[str]:
    """What the checks of generation found, in words and numbers; none where they were left out."""
    lines = []
    if domain.greedy is not None and domain.greedy.shortened is not None:
        lines.append(f"greedy continuations have {domain.greedy.shortened}")
    found = domain.generation
    if found is None:
        return [f"{domain.name}: {line}" for line in lines]
    free = _told(found.loops.free, "continuations without a loop at their end")
    if found.loops.distinct_dense is not None and found.loops.distinct_pruned is not None:
        free += (
            f"; different runs of three tokens {found.loops.distinct_dense:.0%} -> "
            f"{found.loops.distinct_pruned:.0%}"
        )
    opened = ", ".join(f"{count} {sign}" for sign, count in found.closing.opened.items())
    lines += [
        free,
        _told(
            found.closing.right,
            f"open brackets and quotations ({opened or 'none'}) closed in "
            f"{found.closing.new_tokens} tokens",
        ),
    ]
    for copy in found.copies:
        of = "the text" if copy.source == "text" else "random tokens"
        lines.append(_told(copy.right, f"tokens copied in spans of {copy.length} of {of}"))
    for one in found.sums:
        lines.append(_told(one.right, f"sums of {one.digits}-digit numbers"))
    lines.append(
        f"{found.num_prompts:,} prompts and {found.num_new_tokens:,} new tokens for each model"
    )
    return [f"{domain.name}: {line}" for line in lines]


def _told(paired: "Paired", what: str) -> str:
    """One sentence; a difference is called one only where prompts can tell it from chance."""
    if not paired.comparable:
        return (
            f"{what}: the dense model cannot do it: {paired.dense} of {paired.cases} right, "
            f"{paired.needed} needed; nothing is compared"
        )
    verdict = "no difference shown"
    if paired.p < CHANCE:
        verdict = "LOST" if paired.lost > paired.gained else "gained"
    return (
        f"{what}: dense {paired.dense}, pruned {paired.pruned} of {paired.cases}; "
        f"{paired.only_dense} lost, {paired.only_pruned} gained; {verdict} (p {paired.p:.2g} over "
        f"{paired.num_prompts} prompts)"
    )


def _occurs(band: "Band") -> str:
    if band.most is None:
        return f"{band.least} or more"
    return f"{band.least}" if band.least == band.most else f"{band.least} to {band.most}"


def _row(domain: "Domain") -> tuple[str, ...]:
    losses = domain.losses
    greedy = "-" if domain.greedy is None else f"{domain.greedy.same_prefix:.0%}"
    return (
        domain.name,
        f"{losses.num_tokens:,}",
        f"{domain.dense_perplexity:.4g}",
        f"{domain.pruned_perplexity:.4g}",
        f"{domain.pruned_perplexity / domain.dense_perplexity:.3f}",
        f"{losses.top1_agreement:.1%}",
        f"{losses.tail_pruned / losses.tail_dense:.3f}" if losses.tail_dense > 0 else "-",
        f"{losses.kl:.3f}",
        greedy,
    )
