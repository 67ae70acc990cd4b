"""What the report says of an audit: what pruning lost on each text, and whether it was accepted."""

from pathlib import Path

from trsp.bench.audit_record import AuditRecord, Band, Domain, Generation, Outcome, Paired
from trsp.bench.report_chapter import (
    Chapter,
    Part,
    counted,
    listed,
    pairs_table,
    place_of,
    sized,
)
from trsp.bench.report_table import Column, Row, Table, merged, one_group
from trsp.bench.report_words import DASH, TIMES, number
from trsp.bench.statistics import CHANCE

# Of the text before an example.
_LONGEST = 160
_ABOUT = (
    "Increase: the pruned model's loss less the dense one's, nats a token. Worst 1%: its mean over "
    "the hundredth of the tokens that lost most, beside the hundredth that gained most, which is "
    "how far single tokens move by chance. Tail: the loss on each model's own costliest hundredth, "
    "pruned over dense. Top-1: the same most likely token; lost: of those that the dense model had "
    "right."
)


def audit_chapter(place: int, record: AuditRecord, path: Path, sha256: str) -> Chapter:
    """Everything the page shows of one audit."""
    lines = generation_lines(record)
    parts = [
        Part("Acceptance", acceptance_lines(record), _filled(criteria_table(record))),
        Part(
            "What was lost, by text",
            (_ABOUT, *record.overlap_lines()),
            _filled(domains_table(record)),
        ),
        Part("Rare tokens", tables=_filled(bands_table(record))),
        Part("Generation", tuple(lines), _filled(generation_table(record))),
        Part("Tokens that lost most", tables=_filled(examples_table(record))),
        Part("Continuations that part first", tables=_filled(continuations_table(record))),
        Part(
            "How it was measured",
            tables=tuple(pairs_table(domain.name, domain.protocol) for domain in record.domains),
            folded=True,
        ),
        Part("Environment", tables=(pairs_table("Environment", record.environment),), folded=True),
        Part("Hashes", tables=(_hashes(record, path, sha256),), folded=True),
    ]
    return Chapter(
        number=place,
        kind="audit",
        title="What pruning lost",
        stops=stops(record),
        cautions=tuple(record.warnings),
        compared=compared(record),
        findings=tuple(finding(domain) for domain in record.domains),
        parts=tuple(part for part in parts if part.lines or part.tables),
    )


def readme_parts(record: AuditRecord) -> tuple[tuple[str, ...], list[str], list[Table]]:
    """Warnings, sentences and tables for a README."""
    warnings = [f"Warning: {text}." for text in record.warnings]
    sentences = [
        *warnings,
        compared(record),
        *record.overlap_lines(),
        *acceptance_lines(record),
        *map(finding, record.domains),
    ]
    tables = (criteria_table, domains_table, bands_table, generation_table)
    found = [make(record) for make in tables]
    return stops(record), sentences, [table for table in found if table.num_rows]


def stops(record: AuditRecord) -> tuple[str, ...]:
    """That the pruned model was not accepted, where it was not."""
    failed = [outcome for outcome in record.outcomes if not outcome.passed]
    if record.passed is not False:
        return ()
    names = listed([f"{one.criterion} on {one.domain}" for one in failed]) or "not said by which"
    return (f"NOT ACCEPTED: {names}",)


def acceptance_lines(record: AuditRecord) -> tuple[str, ...]:
    """The verdict in one sentence, whichever it is."""
    if record.passed is None:
        return ("No acceptance criteria were given: nothing is accepted or refused.",)
    met = sum(outcome.passed for outcome in record.outcomes)
    verdict = "Accepted" if record.passed else "Not accepted"
    of = counted(len(record.outcomes), "criterion", "criteria")
    return (f"{verdict}: {met} of {of} met.",)


def compared(record: AuditRecord) -> str:
    """One sentence on the two models and the texts."""
    dense, pruned = record.dense, record.pruned
    return (
        f"{pruned.folder} ({pruned.num_hidden_layers} layers) beside {dense.folder} "
        f"({dense.num_hidden_layers} layers), token by token on "
        f"{listed([domain.name for domain in record.domains]) or 'no text'}, on "
        f"{place_of(record.environment)}."
    )


def finding(domain: Domain) -> str:
    """What one text says, in one sentence of numbers."""
    of = domain.losses
    ratio = domain.pruned_perplexity / domain.dense_perplexity
    told = (
        f"{domain.name}: perplexity {sized(domain.dense_perplexity)} to "
        f"{sized(domain.pruned_perplexity)}, {sized(ratio)}{TIMES}; the tokens that lost most (1%) "
        f"lost {of.worst_increase:.2f} nats; the most likely token is the same for "
        f"{of.top1_agreement:.1%}"
    )
    if of.top1_lost is not None:
        told += f", and {of.top1_lost:.1%} of what the dense model had right is lost"
    if domain.greedy is not None:
        told += (
            f"; of a greedy continuation, {domain.greedy.same_prefix:.0%} passes before the first "
            "other token"
        )
    return f"{told}."


def criteria_table(record: AuditRecord) -> Table:
    """Every criterion with its value, what failed first."""

    def row(one: Outcome) -> Row:
        value = "not measured" if one.value is None else f"{one.value:.4g}"
        verdict = "pass" if one.passed else "FAIL"
        cells = (one.domain, one.criterion, value, f"{one.limit:g}", verdict, one.reason or "")
        return Row(cells, "" if one.passed else "negative")

    columns = (
        Column("text", words=True),
        Column("criterion", short=True),
        Column("value"),
        Column("limit"),
        Column("verdict", short=True),
        Column("why", words=True),
    )
    ordered = sorted(record.outcomes, key=lambda one: one.passed)
    return Table("Acceptance criteria", columns, one_group(map(row, ordered)))


def domains_table(record: AuditRecord) -> Table:
    """Both models on each text, the tails beside the means."""
    rows = []
    for domain in record.domains:
        of = domain.losses
        tail = f"{of.tail_pruned / of.tail_dense:.3f}{TIMES}" if of.tail_dense > 0 else DASH
        cells = (
            domain.name,
            number(of.num_tokens),
            sized(domain.dense_perplexity),
            sized(domain.pruned_perplexity),
            f"{sized(domain.pruned_perplexity / domain.dense_perplexity)}{TIMES}",
            f"{of.increase:+.3f}",
            *(f"{of.increase_quantiles[p]:+.2f}" if p in of.increase_quantiles else DASH
              for p in ("50", "90", "99")),
            f"{of.worst_increase:+.2f}",
            f"{of.best_decrease:+.2f}",
            tail,
            f"{of.kl:.3f}",
            f"{of.top1_agreement:.1%}",
            DASH if of.top1_lost is None else f"{of.top1_lost:.1%}",
        )  # fmt: skip
        rows.append(Row(cells))
    columns = (
        Column("text", words=True),
        Column("tokens"),
        *(Column(title, group="perplexity") for title in ("dense", "pruned", "ratio")),
        *(
            Column(title, group="increase of the loss, nats")
            for title in ("mean", "median", "p90", "p99", "worst 1%", "best 1%")
        ),
        Column("tail"),
        Column("KL"),
        *(Column(title, group="top-1") for title in ("same", "lost")),
    )
    return Table("Both models on each text", columns, one_group(rows))


def bands_table(record: AuditRecord) -> Table:
    """Losses by how often a token occurs in its text."""
    rows = []
    for domain in record.domains:
        for band in domain.bands:
            of = band.losses
            cells = (
                domain.name,
                _occurs(band),
                number(of.num_tokens),
                f"{of.dense:.3f}",
                f"{of.pruned:.3f}",
                f"{of.increase:+.3f}",
                f"{of.worst_increase:+.2f}",
                f"{of.top1_agreement:.1%}",
            )
            rows.append(Row(cells))
    titles = ("tokens", "dense", "pruned", "increase", "worst 1%", "top-1 same")
    columns = (Column("text", words=True), Column("occurs", short=True), *map(Column, titles))
    caption = "Loss by how often a token occurs in the text, nats"
    return Table(caption, columns, one_group(merged(rows)))


def generation_table(record: AuditRecord) -> Table:
    """Skills of generation, each with what chance has to say of it."""
    rows = []
    for domain in record.domains:
        if domain.generation is not None:
            rows += [_skill(domain.name, *skill) for skill in _skills(domain.generation)]
    titles = ("cases", "dense", "pruned", "lost", "gained", "p")
    columns = (
        Column("text", words=True),
        Column("skill", words=True),
        *map(Column, titles),
        Column("verdict", words=True),
    )
    caption = (
        "Cases that each model gets right; lost and gained are those that only one does, p is of "
        "as uneven a split of the prompts by chance"
    )
    return Table(caption, columns, one_group(merged(rows)))


def generation_lines(record: AuditRecord) -> list[str]:
    """What the table of skills does not hold: continuations, and checks that were left out."""
    lines = []
    for domain in record.domains:
        greedy = domain.greedy
        if greedy is None:
            lines.append(f"{domain.name}: nothing was generated.")
            continue
        told = (
            f"{domain.name}: {counted(greedy.num_prompts, 'greedy continuation')} of "
            f"{greedy.new_tokens} tokens: {greedy.same_prefix:.0%} passes before the first other "
            f"token, {greedy.same_places:.0%} of the places have the same token, "
            f"{greedy.identical:.0%} are the same to the end"
        )
        lines.append(f"{told}{f'; {greedy.shortened}' if greedy.shortened else ''}.")
        if domain.generation is None:
            lines.append(f"{domain.name}: the record holds no checks of skills.")
    return lines


def examples_table(record: AuditRecord) -> Table:
    """Tokens that the pruned model lost most on."""
    rows = [
        Row(
            (
                domain.name,
                _tail(one.before),
                repr(one.token),
                repr(one.dense_says),
                repr(one.pruned_says),
                f"{one.dense:.2f}",
                f"{one.pruned:.2f}",
            )
        )
        for domain in record.domains
        for one in domain.examples
    ]
    says = [Column(title, short=True) for title in ("token", "dense says", "pruned says")]
    losses = [Column(title, group="loss, nats") for title in ("dense", "pruned")]
    columns = (Column("text", words=True), Column("before it", words=True), *says, *losses)
    return Table("Tokens that the pruned model lost most on", columns, one_group(merged(rows)))


def continuations_table(record: AuditRecord) -> Table:
    """Greedy continuations that part first."""
    rows = [
        Row((domain.name, _tail(one.prompt), one.dense, one.pruned, str(one.same_prefix)))
        for domain in record.domains
        if domain.greedy is not None
        for one in domain.greedy.worst
    ]
    titles = ("text", "prompt", "dense goes on", "pruned goes on")
    columns = (*(Column(title, words=True) for title in titles), Column("same tokens"))
    return Table("Greedy continuations that part first", columns, one_group(merged(rows)))


def _skills(found: Generation) -> list[tuple[str, Paired]]:
    """Each check by name."""
    signs = ", ".join(f"{count} {sign}" for sign, count in found.closing.opened.items())
    return [
        ("continuations without a loop at their end", found.loops.free),
        (
            f"open brackets and quotations ({signs or 'none'}) closed in "
            f"{found.closing.new_tokens} tokens",
            found.closing.right,
        ),
        *(
            (
                f"tokens copied in spans of {copy.length} of "
                f"{'the text' if copy.source == 'text' else 'random tokens'}",
                copy.right,
            )
            for copy in found.copies
        ),
        *((f"sums of {one.digits}-digit numbers", one.right) for one in found.sums),
    ]


def _skill(domain: str, what: str, paired: Paired) -> Row:
    """One check; a difference is called one only where prompts tell it from chance."""
    cases = (domain, what, number(paired.cases), number(paired.dense), number(paired.pruned))
    if not paired.comparable:
        why = f"not compared: the dense model gets {paired.dense} right, {paired.needed} needed"
        return Row((*cases, DASH, DASH, DASH, why), "control")
    verdict, kind = "no difference shown", ""
    if paired.p < CHANCE:
        lost = paired.lost > paired.gained
        verdict, kind = ("LOST", "negative") if lost else ("gained", "")
    split = (number(paired.only_dense), number(paired.only_pruned), f"{paired.p:.2g}")
    return Row((*cases, *split, verdict), kind)


def _occurs(band: Band) -> str:
    if band.most is None:
        return f"{band.least} or more"
    return f"{band.least}" if band.least == band.most else f"{band.least} to {band.most}"


def _tail(text: str) -> str:
    """The end of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"\u2026{text[-_LONGEST:]}"


def _hashes(record: AuditRecord, path: Path, sha256: str) -> Table:
    found = {f"record {path.name}": sha256}
    for name, model in (("dense", record.dense), ("pruned", record.pruned)):
        found[f"{name}: weights of {model.folder}"] = model.weights_sha256
        found[f"{name}: fingerprint"] = model.fingerprint
    if record.criteria_sha256 is not None:
        found["acceptance criteria"] = record.criteria_sha256
    return pairs_table("Hashes, sha256", found)


def _filled(table: Table) -> tuple[Table, ...]:
    return (table,) if table.num_rows else ()
