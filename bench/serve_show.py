"""The record of a speed experiment at a terminal."""

from trsp.bench.serve_record import Ratio, ServeRecord

# What a load is judged by, in the order shown; the report has everything.
METRICS = (
    "output_throughput", "request_goodput", "median_ttft_ms", "median_tpot_ms", "p90_itl_ms",
    "median_e2el_ms", "avg_latency_ms", "requests_per_second", "tokens_per_second",
    "prompt_latency_s", "generation_latency_s",
)  # fmt: skip


def show_serve(record: ServeRecord, *, as_json: bool) -> None:
    """Print the record: as JSON, or as a table of speed-ups and what stands beside it."""
    if as_json:
        print(record.model_dump_json(indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if record.label:
        console.print(f"[bold]{record.label}[/bold]")
    shown = [ratio for ratio in record.ratios if ratio.metric in METRICS]
    for memory in record.memories:
        for load in record.loads:
            here = [r for r in shown if (r.memory, r.load) == (memory, load.name)]
            if not here:
                continue
            table = Table(title=f"{load.name}, {memory}: speed-up over the dense model")
            # A narrow terminal folds a name and does not cut it.
            table.add_column("metric", overflow="fold")
            table.add_column("arm", overflow="fold")
            for column in ("dense", "arm's", "speed-up", "bound"):
                table.add_column(column, justify="right")
            table.add_column("verdict")
            for ratio in sorted(here, key=lambda ratio: _place(record, ratio)):
                table.add_row(*_row(ratio))
            console.print(table)
    for line in record.invalid:
        console.print(f"INVALID: {line}", style="red", markup=False)
    for cell in record.cells:
        for problem in cell.invalid:
            where = f"block {cell.block + 1}, {cell.arm}, {cell.load}, {cell.memory}"
            console.print(f"not counted: {where}: {problem}", markup=False)
    for line in record.not_measured:
        console.print(f"not measured: {line}", markup=False)
    if record.partial:
        console.print("PARTIAL: the experiment ended before its plan did", style="red")


def _row(ratio: Ratio) -> tuple[str, ...]:
    interval = "" if ratio.low is None else f" ({ratio.low:.2f} - {ratio.high:.2f})"
    return (
        ratio.metric,
        ratio.arm,
        f"{ratio.dense:.4g}",
        f"{ratio.pruned:.4g}",
        f"{ratio.estimate:.2f} x{interval}",
        "-" if ratio.bound is None else f"{ratio.bound:.2f}",
        ratio.verdict,
    )


def _place(record: ServeRecord, ratio: Ratio) -> tuple[int, int]:
    """Metrics in order, and for each the arms in theirs."""
    return METRICS.index(ratio.metric), [arm.name for arm in record.arms].index(ratio.arm)
