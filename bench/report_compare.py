"""What the report says of a comparison of methods: who was best where, and what each one cost."""

from pathlib import Path

from trsp.bench.compare_methods import REFERENCE
from trsp.bench.compare_record import CompareRecord
from trsp.bench.compare_show import TASKS_EXPLANATION
from trsp.bench.compare_summary import Row as Summary
from trsp.bench.report_chapter import (
    Chapter,
    Part,
    counted,
    listed,
    pairs_table,
    sized,
    with_ends,
)
from trsp.bench.report_compare_findings import (
    Comparison,
    best_sentence,
    compared,
    losing_table,
    stops,
)
from trsp.bench.report_compare_plots import draw_comparison
from trsp.bench.report_compare_tables import (
    beside_reference,
    cost_table,
    readme_tables,
    task_tables,
)
from trsp.bench.report_table import Column, Row, Table, merged, one_group
from trsp.bench.report_words import DASH, TIMES

_ABOUT_QUALITY = (
    f"Perplexity is the geometric mean over the seeds; \u201cbeside dense\u201d ({TIMES} the dense "
    f"model's) and \u201cbeside TRSP\u201d ({TIMES} TRSP's with the same seed) are better the "
    "smaller they are, with 95% intervals over the seeds in brackets. KL (nats a token) and top-1 "
    "(share of tokens with the same most likely token) are against the dense model."
)
_ABOUT_COST = (
    "TFLOP (matrix products and attention, as they ran), seconds and peak memory are of choosing "
    "and training, not of evaluation, means over the seeds. Jump: the loss after the layers went "
    "less before, on calibration text, the largest of the seeds. Sets: how many different sets of "
    "layers the seeds took."
)


def compare_chapter(number: int, record: CompareRecord, path: Path, sha256: str) -> Chapter:
    """Everything the page shows of one comparison.   UserError: see `Comparison`."""
    found = Comparison(record, str(path))
    plots, not_drawn = draw_comparison(record, found.rows)
    loses, lines = losing_table(found)
    depths = [
        Part(
            found.depth(count),
            tables=(
                *(quality_table(found, count, text) for text in record.protocols),
                *task_tables(found, count),
                cost_table(found, count),
            ),
        )
        for count in record.num_removed
    ]
    explained = f"{_ABOUT_QUALITY} {_ABOUT_COST}"
    if record.dense.tasks:
        explained += f" {TASKS_EXPLANATION}"
    parts = [
        Part("Figures", plots=tuple(plots)),
        Part("Where TRSP loses", lines, (loses,)),
        Part("Every method", (explained,)),
        *depths,
        Part("What was not measured", (*not_drawn, *_not_measured(found))),
        Part("Layers that went", tables=(_layers_table(record),), folded=True),
        Part("How perplexity was measured", tables=_protocols(record), folded=True),
        Part("Recipe and calibration text", tables=_recipe(record), folded=True),
        Part("Environment", tables=(pairs_table("Environment", record.environment),), folded=True),
        Part("Hashes", tables=(_hashes(record, path, sha256),), folded=True),
    ]
    return Chapter(
        number=number,
        kind="compare",
        title="Methods compared",
        stops=stops(record),
        cautions=_cautions(found),
        compared=compared(record),
        findings=tuple(
            best_sentence(found, count, text)
            for count in record.num_removed
            for text in record.protocols
        ),
        parts=tuple(part for part in parts if part.lines or part.tables or part.plots),
    )


def readme_parts(
    record: CompareRecord, path: Path
) -> tuple[tuple[str, ...], list[str], list[Table]]:
    """Warnings, sentences and tables for a README.   UserError: see `Comparison`."""
    found = Comparison(record, str(path))
    best = [
        best_sentence(found, count, text)
        for count in record.num_removed
        for text in record.protocols
    ]
    warnings = [f"Warning: {text}." for text in record.warnings]
    sentences = [*warnings, compared(record), *best, *losing_table(found)[1]]
    return stops(record), sentences, readme_tables(found)


def quality_table(found: Comparison, count: int, text: str) -> Table:
    """The dense model, then every method at one depth on one text."""
    dense = found.record.dense.quality[text]
    rows = [Row(("dense", sized(dense.perplexity), "1", *([DASH] * 3), ""), "dense")]
    for row in found.at(count):
        if row.texts is None:
            cells = (row.label, *([DASH] * 5), _seeds(found, row))
        else:
            of = row.texts[text]
            cells = (
                row.label,
                sized(of.perplexity),
                with_ends(of.to_dense),
                beside_reference(row, of),
                f"{of.kl:.3f}",
                f"{of.top1_agreement:.1%}",
                _seeds(found, row),
            )
        rows.append(Row(cells))
    titles = ("perplexity", "beside dense", "beside TRSP", "KL", "top-1", "seeds")
    columns = (Column("method", words=True), *map(Column, titles))
    share = count / found.record.dense.num_hidden_layers
    return Table(f"{found.depth(count)} ({share:.1%}), {text}", columns, one_group(rows))


def _seeds(found: Comparison, row: Summary) -> str:
    return f"{row.num_seeds} of {len(found.record.seeds)}"


def _cautions(found: Comparison) -> tuple[str, ...]:
    record, lines = found.record, list(found.record.warnings)
    if len(record.seeds) == 1:
        lines.append("One seed: there are no intervals, and a difference may be chance")
    if REFERENCE not in record.methods:
        lines.append(f"TRSP itself ({REFERENCE}) was not compared: no method stands beside it")
    bare = sum(cell.quality is None for cell in record.cells)
    if bare:
        lines.append(
            f"{counted(bare, 'cell')} without quality; why is said under \u201cWhat was not "
            "measured\u201d"
        )
    return tuple(lines)


def _not_measured(found: Comparison) -> list[str]:
    record = found.record
    lines = [
        f"{cell.label}, {found.depth(cell.num_removed)}, seed {cell.seed}: "
        f"{cell.note or 'no quality, and not said why'}"
        for cell in record.cells
        if cell.note or cell.quality is None
    ]
    done = {(cell.method, cell.num_removed, cell.seed) for cell in record.cells}
    for count in record.num_removed:
        for method in record.methods:
            missing = [seed for seed in record.seeds if (method, count, seed) not in done]
            if missing:
                seeds = "seed " if len(missing) == 1 else "seeds "
                seeds += listed([str(seed) for seed in missing])
                lines.append(f"{method}, {found.depth(count)}: {seeds} not done")
    return lines


def _layers_table(record: CompareRecord) -> Table:
    rows = [
        Row(
            (
                f"{cell.label}, {cell.num_removed} gone",
                str(cell.seed),
                ", ".join(map(str, cell.removal_order)),
            )
        )
        for cell in record.cells
    ]
    columns = (
        Column("method", words=True),
        Column("seed"),
        Column("layers that went, as they were taken", words=True),
    )
    return Table("Layers that went", columns, one_group(merged(rows)))


def _protocols(record: CompareRecord) -> tuple[Table, ...]:
    return tuple(pairs_table(name, protocol) for name, protocol in record.protocols.items())


def _recipe(record: CompareRecord) -> tuple[Table, ...]:
    calibrations = {f"seed {seed}": about for seed, about in record.calibrations.items()}
    return (pairs_table("Calibration text", calibrations), pairs_table("Recipe", record.recipe))


def _hashes(record: CompareRecord, path: Path, sha256: str) -> Table:
    dense = record.dense
    return pairs_table(
        "Hashes, sha256",
        {
            f"record {path.name}": sha256,
            f"weights of {dense.folder}": dense.weights_sha256,
            f"fingerprint of {dense.folder}": dense.fingerprint,
        },
    )
