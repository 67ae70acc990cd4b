"""What the page shows of a record that is no speed experiment: lines and parts, in order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trsp.bench.report_style import Plot
from trsp.bench.report_table import Column, Row, Table, one_group
from trsp.bench.report_words import number
from trsp.bench.statistics import Interval

# Above it a number is written with an exponent: a broken model's perplexity has any size.
_PLAIN_UP_TO = 1e6


@dataclass(frozen=True)
class Part:
    """A heading with lines of text, tables and figures. `folded`: closed until it is opened."""

    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Chapter:
    """One record. The names of its figures' files begin with `kind`.

    Attributes:
        stops, cautions: what to know before any number.
        compared: one sentence on what stands beside what.
        findings: the result, a sentence each.
    """

    number: int
    kind: str
    title: str
    stops: tuple[str, ...]
    cautions: tuple[str, ...]
    compared: str
    findings: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def plots(self) -> list[Plot]:
        """Of all parts."""
        return [plot for part in self.parts for plot in part.plots]


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def sized(value: float) -> str:
    """A perplexity or ratio with four digits, whatever its size."""
    return number(value, 4) if abs(value) < _PLAIN_UP_TO else f"{value:.3g}"


def with_ends(interval: Interval) -> str:
    """An estimate, and the ends of its interval where there is one."""
    if interval.low is None or interval.high is None:
        return sized(interval.estimate)
    return f"{sized(interval.estimate)} ({sized(interval.low)} to {sized(interval.high)})"


def pairs_table(caption: str, document: Mapping[str, Any]) -> Table:
    """A row for each value of a document, by the path of its keys."""
    columns = (Column("what", words=True), Column("value", words=True))
    return Table(caption, columns, one_group(Row(pair) for pair in _pairs(document, "")))


def place_of(environment: Mapping[str, Any]) -> str:
    """The machine that a record was made on."""
    gpu = environment.get("gpu")
    name = gpu.get("name") if isinstance(gpu, dict) else None
    return str(name or environment.get("processor") or "an unnamed machine")


def _pairs(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _pairs(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and value:
        for place, inner in enumerate(value):
            yield from _pairs(inner, f"{name}.{place}")
    else:
        yield name, "none" if value in (None, {}, [], ()) else str(value)
