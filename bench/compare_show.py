"""A comparison as tables for the terminal."""

from rich.console import Console
from rich.table import Table

from trsp.bench.compare_record import CompareRecord
from trsp.bench.compare_summary import Row, TaskSummary, summarize, summarize_tasks
from trsp.bench.statistics import Interval

EXPLANATION = (
    "perplexity: geometric mean over the seeds. to dense: its ratio to the dense model's; beside "
    "TRSP: the same seed's ratio to TRSP's, over 1 is worse; 95 % intervals over the seeds. KL "
    "(nats a token) and top-1 (the same most likely token) are against the dense model. TFLOP "
    "(matrix products and attention, as they ran), seconds and GiB count choosing and training, "
    "not evaluation."
)
QUALITY_COLUMNS = ("perplexity", "to dense", "beside TRSP", "KL", "top-1")
TASKS_EXPLANATION = (
    "zero-shot: accuracy by the length of the choice (acc_norm) where the task has it, means over "
    "the seeds; ± is one standard error over the task's items, in points."
)
COST_COLUMNS = ("steps", "TFLOP", "seconds", "GiB", "sets")


def quality_rows(record: CompareRecord, count: int, text: str) -> list[list[str]]:
    """The dense model, then each method at this depth on one text; see QUALITY_COLUMNS."""
    dense = ["dense", f"{record.dense.quality[text].perplexity:.4g}", "1", "", "", ""]
    return [dense, *([row.label, *_quality(row, text)] for row in _rows(record, count))]


def cost_rows(record: CompareRecord, count: int) -> list[list[str]]:
    """What each method at this depth spent, means over the seeds; see COST_COLUMNS.

    The last is how many different sets of layers the seeds took.
    """
    return [[row.label, *_cost(row)] for row in _rows(record, count)]


def task_columns(record: CompareRecord) -> tuple[str, ...]:
    """Each task with its metric, then their mean; empty without tasks."""
    dense = summarize_tasks([record.dense.tasks])
    names = tuple(f"{name}, {found.metric}" for name, found in dense.items())
    return (*names, "mean") if names else ()


def task_rows(record: CompareRecord, count: int) -> list[list[str]]:
    """The dense model, then each method's accuracies at this depth; see task_columns."""
    dense = summarize_tasks([record.dense.tasks])
    rows = [("dense", dense), *((row.label, row.tasks) for row in _rows(record, count))]
    return [[label, *_accuracies(found, tuple(dense))] for label, found in rows]


def show_compare(record: CompareRecord) -> None:
    """Print a table a depth, what its figures mean, and what the perplexities hold for."""
    console = Console()
    num_layers = record.dense.num_hidden_layers
    for count in record.num_removed:
        gone = f"{count} of {num_layers} layers gone ({count / num_layers:.1%})"
        for text in record.protocols:
            rows = quality_rows(record, count, text)
            _print_table(console, f"{gone}, {text}", QUALITY_COLUMNS, rows)
        if columns := task_columns(record):
            _print_table(console, f"{gone}, zero-shot", columns, task_rows(record, count))
        _print_table(console, f"{gone}, cost", COST_COLUMNS, cost_rows(record, count))
    console.print(EXPLANATION, markup=False)
    if record.dense.tasks:
        console.print(TASKS_EXPLANATION, markup=False)
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


def _print_table(
    console: Console, title: str, columns: tuple[str, ...], rows: list[list[str]]
) -> None:
    table = Table(title=title)
    table.add_column("method", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _rows(record: CompareRecord, count: int) -> list[Row]:
    return [row for row in summarize(record) if row.num_removed == count]


def _quality(row: Row, text: str) -> list[str]:
    if row.texts is None:
        return ["-"] * len(QUALITY_COLUMNS)
    found = row.texts[text]
    return [
        f"{found.perplexity:.4g}",
        _interval(found.to_dense),
        "" if found.to_reference is None else _interval(found.to_reference),
        f"{found.kl:.3f}",
        f"{found.top1_agreement:.1%}",
    ]


def _accuracies(found: dict[str, TaskSummary], names: tuple[str, ...]) -> list[str]:
    if not all(name in found for name in names):
        return ["-"] * (len(names) + 1)
    cells = []
    for name in names:
        error = found[name].stderr
        cells.append(
            f"{found[name].value:.1%}" + ("" if error is None else f" ± {100 * error:.1f}")
        )
    return [*cells, f"{sum(found[name].value for name in names) / len(names):.1%}"]


def _cost(row: Row) -> list[str]:
    return [
        f"{row.steps:.0f}" if row.steps else "",
        f"{row.flops / 1e12:.2f}",
        f"{row.seconds:.0f}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
        f"{row.num_choices}",
    ]


def _interval(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.estimate:.3f}"
    return f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"
