"""A comparison's tables for a README: one curve over the depths, then three for each depth."""

from trsp.bench.compare_methods import REFERENCE
from trsp.bench.compare_show import task_columns, task_rows
from trsp.bench.compare_summary import Row as Summary
from trsp.bench.compare_summary import TextSummary
from trsp.bench.report_chapter import sized, with_ends
from trsp.bench.report_compare_findings import Comparison
from trsp.bench.report_table import Column, Row, Table, one_group
from trsp.bench.report_words import DASH, number

BETWEEN_TEXTS = " / "


def readme_tables(found: Comparison) -> list[Table]:
    """The curve where there are several depths; quality, zero-shot accuracy and cost of each."""
    counts = found.record.num_removed
    tables = [curve_table(found)] if len(counts) > 1 else []
    for count in counts:
        tables += [
            depth_table(found, count),
            *task_tables(found, count),
            cost_table(found, count),
        ]
    return [table for table in tables if table.num_rows]


def curve_table(found: Comparison) -> Table:
    """Perplexity of every method by depth, all texts in a cell; operations at the deepest."""
    record = found.record
    counts = record.num_removed
    deepest = max(counts)
    rows = [Row(("dense", *[_dense(found)] * len(counts), ""), "dense")]
    for method in record.methods:
        by_depth = {row.num_removed: row for row in found.rows if row.method == method}
        if not by_depth:
            continue
        label = next(iter(by_depth.values())).label
        cells = [_perplexities(by_depth.get(count), found) for count in counts]
        spent = _tflop(by_depth[deepest].flops) if deepest in by_depth else DASH
        rows.append(Row((label, *cells, spent)))
    titles = (*(_of(found, count) for count in counts), f"TFLOP at {deepest}")
    texts = BETWEEN_TEXTS.join(record.protocols)
    columns = (Column("layers gone", words=True), *map(Column, titles))
    return Table(f"Perplexity by depth, {texts}", columns, one_group(rows))


def depth_table(found: Comparison, count: int) -> Table:
    """Every method at one depth: on each text perplexity, and its ratio to TRSP's; its cost."""
    record = found.record
    dense = [cell for text in record.protocols for cell in (_dense(found, text), "")]
    rows = [Row(("dense", *dense, "", "", ""), "dense")]
    for row in found.at(count):
        cells: list[str] = []
        for text in record.protocols:
            if row.texts is None:
                cells += [DASH, DASH]
                continue
            of = row.texts[text]
            cells += [sized(of.perplexity), beside_reference(row, of)]
        shift = (
            DASH
            if row.texts is None
            else BETWEEN_TEXTS.join(f"{row.texts[text].kl:.3f}" for text in record.protocols)
        )
        steps = number(round(row.steps)) if row.steps else DASH
        rows.append(Row((row.label, *cells, shift, _tflop(row.flops), steps)))
    titles = [title for text in record.protocols for title in (text, "beside TRSP")]
    columns = (
        Column("method", words=True),
        *map(Column, (*titles, f"KL, {BETWEEN_TEXTS.join(record.protocols)}", "TFLOP", "steps")),
    )
    share = count / record.dense.num_hidden_layers
    return Table(f"{found.depth(count)} ({share:.1%})", columns, one_group(rows))


def task_tables(found: Comparison, count: int) -> tuple[Table, ...]:
    """Zero-shot accuracies of the dense model and every method at one depth, where there are."""
    titles = task_columns(found.record)
    if not titles:
        return ()
    dense, *rows = task_rows(found.record, count)
    columns = (Column("method", words=True), *map(Column, titles))
    shown = [Row(tuple(dense), "dense"), *(Row(tuple(row)) for row in rows)]
    return (Table(f"{found.depth(count)}, zero-shot", columns, one_group(shown)),)


def cost_table(found: Comparison, count: int) -> Table:
    """What every method at one depth spent."""
    rows = []
    for row in found.at(count):
        key = (row.method, row.num_removed)
        cells = [c for c in found.record.cells if (c.method, c.num_removed) == key]
        jumps = [cell.jump for cell in cells if cell.jump is not None]
        tokens = sum((cell.training or cell.selection).tokens for cell in cells) / len(cells)
        cost = (
            number(round(row.steps)) if row.steps else DASH,
            number(round(tokens)) if tokens else DASH,
            number(row.flops / 1e12),
            number(row.seconds),
            DASH if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB",
            f"{max(jumps, key=abs):+.4f}" if jumps else DASH,
            str(row.num_choices),
        )
        rows.append(Row((row.label, *cost)))
    titles = ("steps", "tokens", "TFLOP", "seconds", "peak memory", "jump, nats", "sets")
    columns = (Column("method", words=True), *map(Column, titles))
    return Table(f"{found.depth(count)}, cost", columns, one_group(rows))


def beside_reference(row: Summary, of: TextSummary) -> str:
    """The perplexity over TRSP's with the same seed, and its interval."""
    if row.method == REFERENCE:
        return "1"
    return DASH if of.to_reference is None else with_ends(of.to_reference)


def _perplexities(row: Summary | None, found: Comparison) -> str:
    if row is None or row.texts is None:
        return DASH
    return BETWEEN_TEXTS.join(sized(row.texts[text].perplexity) for text in found.record.protocols)


def _dense(found: Comparison, text: str | None = None) -> str:
    quality = found.record.dense.quality
    texts = found.record.protocols if text is None else [text]
    return BETWEEN_TEXTS.join(sized(quality[name].perplexity) for name in texts)


def _tflop(flops: float) -> str:
    # Counting what a random choice of layers costs gives a few million operations.
    return number(flops / 1e12) if flops >= 1e9 else "0.00"


def _of(found: Comparison, count: int) -> str:
    return f"{count} of {found.record.dense.num_hidden_layers}"
