"""A comparison as tables: for the terminal and, in Markdown, for a README."""

from rich.console import Console
from rich.table import Table

from trsp.bench.compare_record import CompareRecord
from trsp.bench.compare_summary import Row, TextSummary, summarize
from trsp.bench.statistics import Interval

EXPLANATION = (
    "perplexity is the geometric mean over the seeds and, in brackets, its ratio to the dense "
    "model with a 95 % interval where there are two seeds or more. beside TRSP: the same seed's "
    "ratio to TRSP's perplexity, over 1 is worse. KL (nats a token) and top-1 (the same most "
    "likely token) are against the dense model. PFLOP (matrix products and attention), seconds "
    "and GiB count choosing and training, not evaluation."
)


def headings(record: CompareRecord) -> list[str]:
    """The columns of `table_rows`."""
    columns = ["method"]
    for name in record.protocols:
        columns += [f"{name}", "beside TRSP", "KL", "top-1"]
    return [*columns, "steps", "PFLOP", "seconds", "GiB"]


def table_rows(record: CompareRecord, count: int) -> list[list[str]]:
    """The dense model, then each method at this depth."""
    dense = ["dense"]
    for name in record.protocols:
        dense += [f"{record.dense.quality[name].perplexity:.4g}", "", "", ""]
    rows = [row for row in summarize(record) if row.num_removed == count]
    return [[*dense, "", "", "", ""], *(_cells(record, row) for row in rows)]


def markdown(record: CompareRecord, count: int) -> str:
    """One depth as a Markdown table."""
    columns = headings(record)
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(record, count)]
    return "\n".join(lines) + "\n"


def show_compare(record: CompareRecord) -> None:
    """Print a table a depth, what its figures mean, and what the perplexities hold for."""
    console = Console()
    for count in record.num_removed:
        num_layers = record.dense.num_hidden_layers
        table = Table(
            title=f"{record.dense.folder}: {count} of {num_layers} layers gone "
            f"({count / num_layers:.1%})"
        )
        for number, column in enumerate(headings(record)):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in table_rows(record, count):
            table.add_row(*row)
        console.print(table)
    console.print(EXPLANATION, markup=False)
    for name, protocol in record.protocols.items():
        console.print(
            f"{name}: windows of {protocol['window']} tokens, stride {protocol['stride']}, bos "
            f"{protocol['add_bos']}, {protocol['dtype']} on {protocol['device']}, "
            f"{protocol['num_tokens']:,} tokens, text {protocol['text_sha256'][:12]}, tokenizer "
            f"{protocol['tokenizer_sha256'][:12]}",
            markup=False,
        )
    for cell in record.cells:
        if cell.note:
            console.print(
                f"{cell.label}, {cell.num_removed} layers, seed {cell.seed}: {cell.note}",
                markup=False,
            )


def _cells(record: CompareRecord, row: Row) -> list[str]:
    cells = [row.label]
    for name in record.protocols:
        cells += [""] * 4 if row.texts is None else _text_cells(row.texts[name])
    memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"
    return [
        *cells,
        f"{row.steps:.0f}" if row.steps else "",
        f"{row.flops / 1e15:.4f}",
        f"{row.seconds:.0f}",
        memory,
    ]


def _text_cells(text: TextSummary) -> list[str]:
    return [
        f"{text.perplexity:.4g} ({_interval(text.to_dense)})",
        "" if text.to_reference is None else _interval(text.to_reference),
        f"{text.kl:.3f}",
        f"{text.top1_agreement:.1%}",
    ]


def _interval(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.estimate:.3f}"
    return f"{interval.estimate:.3f}, {interval.low:.3f} to {interval.high:.3f}"
