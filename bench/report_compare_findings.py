"""A comparison of methods in words: who has the lowest perplexity where, and where TRSP loses."""

import math

from trsp.bench.compare_methods import REFERENCE
from trsp.bench.compare_record import CompareRecord
from trsp.bench.compare_summary import Row as Summary
from trsp.bench.compare_summary import TextSummary, summarize
from trsp.bench.report_chapter import counted, listed, place_of, sized, with_ends
from trsp.bench.report_table import Column, Row, Table, merged, one_group
from trsp.bench.report_words import TIMES, billions, number
from trsp.pruner.errors import UserError

# Means of one set of layers taken twice differ by rounding alone.
_SAME = 1e-9
_NO_INTERVAL = "one seed, no interval"


class Comparison:
    """A record with its rows, made once: their intervals take time.

    Raises:
        UserError: figures that no comparison measures.
    """

    def __init__(self, record: CompareRecord, source: str) -> None:
        self.record = record
        _refuse_absurd(record, source)
        try:
            self.rows = summarize(record)
        except OverflowError as error:
            raise UserError(f"{source}: an interval of a perplexity overflows; damaged?") from error

    def at(self, count: int) -> list[Summary]:
        """The rows of one depth."""
        return [row for row in self.rows if row.num_removed == count]

    def on(self, count: int, text: str) -> list[tuple[Summary, TextSummary]]:
        """The rows of one depth that have a quality on one text."""
        return [(row, row.texts[text]) for row in self.at(count) if row.texts is not None]

    def depth(self, count: int) -> str:
        """`4 of 16 layers gone`."""
        return f"{count} of {self.record.dense.num_hidden_layers} layers gone"


def stops(record: CompareRecord) -> tuple[str, ...]:
    """That cells are missing, where they are."""
    wanted = len(record.methods) * len(record.num_removed) * len(record.seeds)
    if record.complete and len(record.cells) == wanted:
        return ()
    return (
        f"INCOMPLETE: {len(record.cells)} of {wanted} cells are there; the rest of a row's seeds "
        "may change its mean, and a method that is missing may be better than those shown",
    )


def compared(record: CompareRecord) -> str:
    """One sentence on what was compared, on what and how often."""
    dense = record.dense
    gone = listed([str(count) for count in record.num_removed])
    return (
        f"{counted(len(record.methods), 'method')} on {dense.folder} ({dense.num_hidden_layers} "
        f"layers, {billions(dense.num_parameters)} parameters), {gone} layers gone, "
        f"{counted(len(record.seeds), 'seed')}, on {place_of(record.environment)}; perplexity on "
        f"{listed(list(record.protocols)) or 'no text'}."
    )


def best_sentence(found: Comparison, count: int, text: str) -> str:
    """Which method has the lowest perplexity, and how TRSP stands to it, whoever that is."""
    start = f"{found.depth(count)}, {text}:"
    ranked = sorted(found.on(count, text), key=lambda pair: pair[1].to_dense.estimate)
    if not ranked:
        return f"{start} no method has a perplexity."
    lowest = ranked[0][1]
    limit = lowest.to_dense.estimate * (1 + _SAME)
    winners = [pair for pair in ranked if pair[1].to_dense.estimate <= limit]
    rest = ranked[len(winners) :]
    names = listed([_named(found, row) for row, _ in winners])
    alike = ", alike" if len(winners) > 1 else ""
    head = f"{start} lowest perplexity by {names}{alike}, at {_beside_dense(lowest)}"
    reference = next((pair for pair in ranked if pair[0].method == REFERENCE), None)
    if reference is None:
        return f"{head}; {_why_no_reference(found, count)}."
    if reference in winners:
        return f"{head}; {_beside_next(reference[1], rest)}."
    ours = reference[1]
    told = f"{_named(found, reference[0])} is at {_ratio(ours)}"
    if ours.to_dense.low is None:
        return f"{head}; {told}, higher ({_NO_INTERVAL}){_seed_by_seed(*winners[0])}."
    inside = ours.to_dense.low <= lowest.to_dense.estimate
    word = "includes" if inside else "does not include"
    paired = _seed_by_seed(*winners[0])
    if not paired:
        paired = ": no difference shown" if inside else ": TRSP loses"
    return f"{head}; {told}, and its interval {word} the lowest{paired}."


def losing_table(found: Comparison) -> tuple[Table, tuple[str, ...]]:
    """Every row whose perplexity is below TRSP's, and how the rest stand beside TRSP."""
    rows, counts = [], {"above": 0, "below": 0, "open": 0}
    for count in found.record.num_removed:
        ours = next((row for row in found.at(count) if row.method == REFERENCE), None)
        for text in found.record.protocols if ours else ():
            for row, of in found.on(count, text):
                beside = of.to_reference
                if row.method == REFERENCE or beside is None or ours is None:
                    continue
                shown = _verdict(beside.low, beside.high)
                counts[shown] += 1
                if beside.estimate < 1 - _SAME:
                    told = {
                        "below": "better than TRSP",
                        "open": _NO_INTERVAL if beside.low is None else "no difference shown",
                    }[shown]
                    spent = (number(row.flops / 1e12), number(ours.flops / 1e12))
                    place = (f"{found.depth(count)}, {text}", row.label, with_ends(beside))
                    kind = "negative" if shown == "below" else ""
                    rows.append(Row((*place, told, *spent), kind))
    columns = (
        Column("where", words=True),
        Column("method", words=True),
        Column("beside TRSP"),
        Column("shown", words=True),
        Column("TFLOP"),
        Column("TRSP's"),
    )
    table = Table("Perplexities below TRSP's, seed by seed", columns, one_group(merged(rows)))
    total = sum(counts.values())
    if not total:
        return table, ("Nothing stands beside TRSP: see what was not measured.",)
    line = (
        f"Of {counted(total, 'figure')} beside TRSP's (each method, depth and text), "
        f"{counts['above']} are worse and {counts['below']} better by an interval that leaves out "
        f"1; for {counts['open']} nothing is shown"
    )
    line += f" ({_NO_INTERVAL})." if len(found.record.seeds) == 1 else "."
    return table, (line, *(() if rows else ("No mean is below TRSP's.",)))


def _verdict(low: float | None, high: float | None) -> str:
    """Where an interval lies beside 1: above, below, or open."""
    if low is not None and low > 1:
        return "above"
    return "below" if high is not None and high < 1 else "open"


def _named(found: Comparison, row: Summary) -> str:
    seeds = len(found.record.seeds)
    few = "" if row.num_seeds == seeds else f" ({row.num_seeds} of {seeds} seeds)"
    return f"{row.label}{few}"


def _ratio(of: TextSummary) -> str:
    """`1.050x`, with the ends of its interval."""
    ratio = of.to_dense
    if ratio.low is None or ratio.high is None:
        return f"{sized(ratio.estimate)}{TIMES}"
    return f"{sized(ratio.estimate)}{TIMES} ({sized(ratio.low)} to {sized(ratio.high)})"


def _beside_dense(of: TextSummary) -> str:
    return f"{sized(of.to_dense.estimate)}{TIMES} the dense model's{_ends(of)}"


def _ends(of: TextSummary) -> str:
    low, high = of.to_dense.low, of.to_dense.high
    return "" if low is None or high is None else f" ({sized(low)} to {sized(high)})"


def _beside_next(ours: TextSummary, rest: list[tuple[Summary, TextSummary]]) -> str:
    """How the next method stands to TRSP, which is the lowest."""
    if not rest:
        return "nothing is beside it"
    row, of = rest[0]
    high = ours.to_dense.high
    if high is None:
        return f"the next is {row.label} at {_ratio(of)} ({_NO_INTERVAL}){_seed_by_seed(row, of)}"
    word = "includes" if of.to_dense.estimate <= high else "does not include"
    return f"TRSP's interval {word} the next, {row.label} at {_ratio(of)}{_seed_by_seed(row, of)}"


def _seed_by_seed(row: Summary, of: TextSummary) -> str:
    """The paired ratio, which tells more than two intervals side by side, and its verdict."""
    beside = of.to_reference
    if beside is None:
        return ""
    told = {"above": "TRSP wins", "below": "TRSP loses", "open": "no difference shown"}
    verdict = "" if beside.low is None else f": {told[_verdict(beside.low, beside.high)]}"
    start = "" if beside.low is None else "seed by seed "
    return f"; {start}{row.label} is {with_ends(beside)} of TRSP's{verdict}"


def _why_no_reference(found: Comparison, count: int) -> str:
    if REFERENCE not in found.record.methods:
        return "TRSP was not compared"
    row = next((row for row in found.at(count) if row.method == REFERENCE), None)
    if row is None:
        return "TRSP is not done at this depth"
    return f"TRSP has no perplexity here: {row.note or 'not said why'}"


def _refuse_absurd(record: CompareRecord, source: str) -> None:
    """UserError for a record whose parts do not fit, or a figure that nothing measures."""
    texts, depth = set(record.protocols), record.dense.num_hidden_layers
    wrong = [str(n) for n in record.num_removed if not 0 < n < depth]
    if wrong:
        raise UserError(f"{source}: {', '.join(wrong)} of {depth} layers gone; damaged?")
    if len({(c.method, c.num_removed, c.seed) for c in record.cells}) != len(record.cells):
        raise UserError(f"{source}: a cell (method, layers, seed) stands twice; damaged?")
    qualities = [("dense", record.dense.quality)]
    qualities += [(cell.label, cell.quality) for cell in record.cells if cell.quality is not None]
    for name, quality in qualities:
        if set(quality) != texts:
            raise UserError(
                f"{source}: {name} has quality on {sorted(quality)}, expected {sorted(texts)}; "
                "damaged?"
            )
        for text, of in quality.items():
            numbers = (of.loss, of.kl, of.top1_agreement, of.perplexity)
            if not all(map(math.isfinite, numbers)) or of.perplexity <= 0:
                raise UserError(f"{source}: {name} on {text}: {of}; expected finite numbers")
