"""`trsp report`: records as one page, as figures, and as README tables.

Records of speed experiments come first, then comparisons of methods, then audits.

The page is made of the records alone, needs neither network nor script, and is the same for the
same records. Everything a record says is text to it, never markup.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trsp.bench.report_chapter import Chapter
from trsp.bench.report_findings import (
    Finding,
    cautions,
    compared,
    equal_memory_sentence,
    find_results,
    stops,
)
from trsp.bench.report_inputs import Input, Inputs, read_inputs
from trsp.bench.report_markdown import tables_to_markdown, to_markdown
from trsp.bench.report_plots import draw_plots
from trsp.bench.report_speedups import (
    blocks_table,
    negative_sentence,
    negative_table,
    speed_table,
)
from trsp.bench.report_style import Plot, plain, to_png, to_svg
from trsp.bench.report_table import Table
from trsp.bench.report_tables import (
    latency_table,
    memory_table,
    offline_tables,
    quality_table,
    throughput_table,
)
from trsp.bench.report_validity import (
    config_table,
    environment_table,
    hashes_table,
    invalid_table,
    models_table,
    protocols_table,
    remarks,
)
from trsp.bench.report_values import Values
from trsp.bench.report_words import BACKEND_TITLES
from trsp.bench.serve_record import ServeRecord
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError

TEMPLATE_NAME = "report.html.j2"
# How a page of ours begins: what else lies where it is to go is not replaced.
PAGE_START = '<!doctype html>\n<html lang="en">\n<!-- trsp report -->'


@dataclass(frozen=True)
class Section:
    """What the page shows of one record, in the order of the page."""

    number: int
    title: str
    file_name: str
    engine: str
    label: str | None
    void: bool
    stops: list[str]
    cautions: list[str]
    compared: str
    findings: list[Finding]
    quality: Table
    speed: Table
    plots: list[tuple[Plot, str]]
    figures: list[Table]
    memory: Table
    memory_sentence: str
    negative: Table
    negative_sentence: str
    has_open_loads: bool
    blocks: Table
    invalid: Table
    remarks: list[str]
    explained: list[str]
    config: Table
    not_measured: list[str]
    commands: list[str]
    start_commands: list[str]
    protocols: Table
    models: Table
    hashes: Table
    environment: Table


def write_report(
    paths: Sequence[Path], *, out: Path | None, png: Path | None
) -> tuple[Inputs, list[Path]]:
    """Write the page to `out` and every figure as PNG into the folder `png`.

    Returns:
        what was read, and the files that were written.
    Raises:
        UserError: nothing to read, or `out` or `png` would replace what is not a report's.
    """
    inputs = read_inputs(paths)
    if out is not None:
        _refuse_foreign(out)
    if png is not None and png.exists() and not png.is_dir():
        raise UserError(f"--png {png}: is not a folder; name one for the figures")
    if out is None and png is None:
        return inputs, []
    _require_extra()
    written = []
    sections = [_Drawn(place, given) for place, given in enumerate(inputs.records, 1)]
    chapters = _chapters(inputs)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        shown = [drawn.section() for drawn in sections]
        atomic_write(out, render_page(shown, inputs.ignored, chapters))
        written.append(out)
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
        named = [(drawn.name, drawn.plots) for drawn in sections]
        named += [(f"{one.number}-{one.kind}", one.plots) for one in chapters]
        for name, plots in named:
            for plot in plots:
                path = png / f"{name}-{plot.name}.png"
                atomic_write(path, to_png(plot))
                written.append(path)
    return inputs, written


def markdown_of(inputs: Inputs) -> str:
    """The README tables of every record."""
    found = [
        to_markdown(Values(given.record), given.path.name, given.sha256) for given in inputs.records
    ]
    for compare in inputs.compares:
        from trsp.bench import report_compare

        found.append(
            tables_to_markdown(
                *report_compare.readme_parts(compare.record, compare.path),
                compare.path.name,
                compare.sha256,
            )
        )
    for audit in inputs.audits:
        from trsp.bench import report_audit

        found.append(
            tables_to_markdown(
                *report_audit.readme_parts(audit.record), audit.path.name, audit.sha256
            )
        )
    return "\n".join(found)


def render_page(
    sections: Sequence[Section], ignored: Sequence[str], chapters: Sequence[Chapter] = ()
) -> str:
    """The page as HTML text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    source = files("trsp.bench").joinpath(TEMPLATE_NAME).read_text("utf-8")
    page = environment.from_string(source).render(
        sections=sections,
        chapters=chapters,
        ignored=ignored,
        svg_of=lambda chapter, plot: to_svg(plot, f"s{chapter.number}-{plot.name}"),
    )
    if not page.startswith(PAGE_START):
        raise RuntimeError(f"{TEMPLATE_NAME} does not begin with {PAGE_START!r}")
    return page


def _chapters(inputs: Inputs) -> list[Chapter]:
    """Comparisons, then audits, numbered after the speed records."""
    chapters: list[Chapter] = []
    for compare in inputs.compares:
        # They bring torch, which a page of speed alone does not wait for.
        from trsp.bench.report_compare import compare_chapter

        number = len(inputs.records) + len(chapters) + 1
        chapters.append(compare_chapter(number, compare.record, compare.path, compare.sha256))
    for audit in inputs.audits:
        from trsp.bench.report_audit import audit_chapter

        number = len(inputs.records) + len(chapters) + 1
        chapters.append(audit_chapter(number, audit.record, audit.path, audit.sha256))
    return chapters


class _Drawn:
    """One record with its figures, drawn once for page and PNG."""

    def __init__(self, number: int, given: Input[ServeRecord]) -> None:
        self.number = number
        self.given = given
        self.values = Values(given.record)
        self.plots, self.not_drawn = draw_plots(self.values)
        self.name = f"{number}-{given.record.backend}"

    def section(self) -> Section:
        """Everything the page shows of it."""
        values, record = self.values, self.given.record
        if record.backend == "serve":
            kinds = (latency_table, throughput_table)
            figures = [make(values, memory) for memory in values.memories for make in kinds]
        else:
            figures = [
                table for memory in values.memories for table in offline_tables(values, memory)
            ]
        return Section(
            number=self.number,
            title=BACKEND_TITLES[record.backend],
            file_name=self.given.path.name,
            engine=record.engine,
            label=record.label,
            void=bool(record.invalid),
            stops=stops(values),
            cautions=cautions(values),
            compared=compared(values),
            findings=find_results(values),
            quality=quality_table(values),
            speed=speed_table(values),
            plots=[(plot, to_svg(plot, f"s{self.number}-{plot.name}")) for plot in self.plots],
            figures=[table for table in figures if table.num_rows],
            memory=memory_table(values),
            memory_sentence=equal_memory_sentence(values),
            negative=negative_table(values),
            negative_sentence=negative_sentence(values),
            has_open_loads=bool(values.loads_of("open")),
            blocks=blocks_table(values),
            invalid=invalid_table(values),
            remarks=remarks(values),
            explained=record.explained,
            config=config_table(values),
            not_measured=[*record.not_measured, *self.not_drawn],
            commands=record.commands[:1],
            start_commands=list(
                dict.fromkeys(record.commands[1:] or (start.command for start in record.starts))
            ),
            protocols=protocols_table(values),
            models=models_table(values),
            hashes=hashes_table(values, self.given.path.name, self.given.sha256),
            environment=environment_table(values),
        )


def _printable(value: Any) -> Any:
    """Text without characters that would break or disguise the page; markup of ours as it is."""
    return plain(value) if type(value) is str else value


def _require_extra() -> None:
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed; pip install 'trsp[report]'")


def _refuse_foreign(out: Path) -> None:
    """Replace a page of ours, and nothing else: a record named by mistake stays."""
    if not out.exists():
        return
    start = PAGE_START.encode()
    if out.is_dir() or out.open("rb").read(len(start)) != start:
        raise UserError(
            f"--out {out}: exists and is not a page of trsp report; choose another --out"
        )
