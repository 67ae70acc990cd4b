"""What a record comes to in words: what was compared, each arm's result, and what to beware of."""

from dataclasses import dataclass

from trsp.bench.report_speedups import bounded_by_arrivals
from trsp.bench.report_values import (
    Place,
    Values,
    blocks_of,
    excludes_one,
    has_interval,
    is_negative,
    is_unexplained,
    told_memory,
)
from trsp.bench.report_words import (
    MEMORY_TITLES,
    NO_INTERVAL,
    TIMES,
    interval,
    is_rate,
    load_phrase,
    load_title,
    metric_title,
    number,
    times,
)
from trsp.bench.serve_record import Arm, Load, Ratio

# Intervals over fewer blocks say little, however narrow they are.
MIN_BLOCKS = 5
# What room in the KV cache gains is told in this.
_GAIN = "output_throughput"


@dataclass(frozen=True)
class Figure:
    """One large number of a result, with what stands under it; `bad` where it shows no gain."""

    value: str
    about: str
    detail: str
    bad: bool = False


@dataclass(frozen=True)
class Finding:
    """An arm's result: a sentence, and its numbers. `kind`: pruned or control."""

    arm: str
    about: str
    kind: str
    figures: tuple[Figure, ...]
    sentence: str


def find_results(values: Values) -> list[Finding]:
    """One finding for each pruned arm, then the noise floor."""
    arms = [*values.pruned, *(arm for arm in values.arms if arm.role == "control")]
    return [_finding(values, arm) for arm in arms]


def compared(values: Values) -> str:
    """One sentence on what was measured, on what and how often."""
    record, workload = values.record, values.record.workload
    dense = values.dense
    base = f"{dense.name} ({dense.num_hidden_layers} layers)" if dense else "no dense model"
    pruned = _listed([f"{arm.name} ({arm.num_hidden_layers} layers)" for arm in values.pruned])
    gpu = record.environment.get("gpu")
    place = gpu.get("name") if isinstance(gpu, dict) else None
    place = place or record.environment.get("processor") or "an unnamed machine"
    tokens = f"{workload.input_len:,} tokens in and {workload.output_len:,} out"
    return (
        f"{pruned or 'No pruned model'} beside {base}, in {record.engine} on {place}: {tokens}"
        f"{_lone_prompts(values)}, {workload.dtype}, "
        f"{record.num_blocks} {'block' if record.num_blocks == 1 else 'blocks'} of measurements."
    )


def _lone_prompts(values: Values) -> str:
    """The prompts that transformers reads without an answer, which no workload tells of."""
    lengths = {
        cell.total_input_tokens // cell.completed
        for cell in values.record.cells
        if cell.completed and not cell.total_output_tokens
    }
    told = " or ".join(f"{length:,}" for length in sorted(lengths))
    return f" for generation, prompts of {told} tokens" if lengths else ""


def stops(values: Values) -> list[str]:
    """Why the numbers must not be used as they are; shown in red."""
    record = values.record
    found = [f"INVALID: {reason}" for reason in record.invalid]
    if record.partial:
        found.append(
            "PARTIAL: the experiment ended before all that was planned was measured; what is "
            "missing is under \u201cWhat was not measured\u201d"
        )
    if values.dense is None:
        found.append("NO DENSE MODEL: there is nothing to compare with")
    return found


def cautions(values: Values) -> list[str]:
    """What a reader must know before quoting a number."""
    record = values.record
    found = []
    dummy = [arm.name for arm in values.arms if arm.weights == "dummy"]
    if dummy:
        found.append(
            f"Random (dummy) weights in {_listed(dummy)}: the speed counts, the text does not, and "
            "no quality is shown."
        )
    num_invalid = sum(bool(cell.invalid) for cell in record.cells)
    if num_invalid:
        found.append(
            f"{num_invalid} of {len(record.cells)} measurements do not count and are left out; "
            "the reasons are under \u201cWhat does not count\u201d."
        )
    found += _few_blocks(values)
    control = [ratio for ratio in values.ratios if ratio.arm in values.controls]
    missed = sum(excludes_one(ratio) for ratio in control)
    if missed:
        found.append(
            f"Noise floor: for {missed} of {len(control)} figures the interval of the dense model "
            "against itself does not contain 1; by chance about "
            f"{(1 - record.confidence) * len(control):.0f} would not."
        )
    if not values.controls:
        found.append("No control arm: the noise floor is unknown.")
    return found


def _few_blocks(values: Values) -> list[str]:
    """Speed-ups whose intervals rest on few blocks, or have none, and blocks that differ."""
    record = values.record
    found = []
    if record.num_blocks < MIN_BLOCKS:
        blocks = "block" if record.num_blocks == 1 else "blocks"
        told = "there are no intervals" if record.num_blocks == 1 else (
            "the intervals rest on few values"
        )  # fmt: skip
        found.append(f"{record.num_blocks} {blocks}, fewer than {MIN_BLOCKS}: {told}.")
    else:
        few = [ratio for ratio in values.ratios if len(ratio.blocks) < MIN_BLOCKS]
        if few:
            least = min(len(ratio.blocks) for ratio in few)
            found.append(
                f"{len(few)} of {len(values.ratios)} speed-ups rest on fewer than {MIN_BLOCKS} "
                f"blocks, the least on {least}: cells that do not count took blocks away."
            )
    lone = [ratio for ratio in values.ratios if not has_interval(ratio)]
    if lone:
        found.append(
            f"{len(lone)} of {len(values.ratios)} speed-ups: {NO_INTERVAL}; nothing is claimed of "
            "them."
        )
    places: dict[tuple[str, str], set[frozenset[int]]] = {}
    for ratio in values.ratios:
        numbers = frozenset(blocks_of(ratio))
        places.setdefault((ratio.memory, ratio.load), set()).add(numbers)
    uneven = [load for (_, load), numbers in places.items() if len(numbers) > 1]
    if uneven:
        loads = _listed([values.load_title(load) for load in dict.fromkeys(uneven)])
        found.append(
            f"Not every arm counts in the same blocks ({loads}): compare arms by their speed-ups, "
            "each of which has dense figures from its own blocks."
        )
    return found


def _finding(values: Values, arm: Arm) -> Finding:
    """Figures and sentence of one arm at the loads that tell most."""
    memory = told_memory(values)
    found = [
        (told.load, ratio)
        for told in values.told()
        if (ratio := values.ratio(Place(memory, arm.name, told.load.name), told.metric)) is not None
        and not bounded_by_arrivals(values, ratio)
    ]
    percent = f"{values.record.confidence:.0%}"
    figures = [
        Figure(
            times(ratio.estimate, 2),
            ("" if is_rate(ratio.metric) else "speed-up in ")
            + f"{metric_title(ratio.metric)}, {load_title(load)}",
            _in_short(ratio, percent, arm),
            bad=arm.role == "pruned" and is_negative(ratio),
        )
        for load, ratio in found
    ]
    dense = values.dense
    layers = f"{arm.num_hidden_layers} layers"
    if arm.role == "control":
        about = "the dense model again: the noise floor"
    elif dense is not None:
        about = f"{arm.num_hidden_layers} of {dense.num_hidden_layers} layers"
    else:
        about = layers
    sentence = f"{arm.name}: {_speed_sentence(found, percent, arm)}"
    if arm.role == "pruned":
        quality = values.quality_ratio(arm)
        if quality is not None:
            figures.append(
                Figure(
                    times(quality[1], 2),
                    f"perplexity on {quality[0].text}",
                    f"{number(quality[0].perplexity, 4)} beside "
                    f"{number(quality[0].perplexity / quality[1], 4)}; lower is better",
                )
            )
        sentence += f" {_quality_sentence(values, arm)}"
    return Finding(arm.name, about, arm.role, tuple(figures), sentence)


def _speed_sentence(found: list[tuple[Load, Ratio]], percent: str, arm: Arm) -> str:
    """The speed-ups at the told loads as one sentence."""
    if not found:
        return "no speed-up was measured."
    parts = []
    for place, (load, ratio) in enumerate(found):
        if ratio.low is None or ratio.high is None:
            span = NO_INTERVAL
        else:
            lead = f"{percent} interval " if place == 0 else ""
            span = f"{lead}{ratio.low:.3f} to {ratio.high:.3f}"
        bound = "" if ratio.bound is None else f"; bound {ratio.bound:.3f}"
        verdict = f", {found_wanting}" if (found_wanting := _wanting(ratio, arm)) else ""
        # The metric is said once where it stays the same.
        same = place > 0 and found[place - 1][1].metric == ratio.metric
        about = "" if same else f"speed-up in {metric_title(ratio.metric)} "
        figure = f"{about}{times(ratio.estimate)}"
        parts.append(f"{figure} {load_phrase(load)} ({span}{bound}){verdict}")
    return " and ".join(parts) + "."


def _wanting(ratio: Ratio, arm: Arm) -> str:
    """What an arm's speed-up fails at, in two words; empty where it does not."""
    if arm.role != "pruned" or not is_negative(ratio):
        return ""
    return "unexplained" if is_unexplained(ratio) else "no gain shown"


def _quality_sentence(values: Values, arm: Arm) -> str:
    """What the arm's text is worth beside the dense one's."""
    if arm.weights == "dummy":
        return "Its weights are random, so it has no quality to report."
    quality = values.quality_ratio(arm)
    if quality is None:
        return "Its quality was not measured as the dense model's was."
    measured, ratio = quality
    return (
        f"Its perplexity on {measured.text} is {ratio:.3f}{TIMES} the dense model's "
        f"({number(measured.perplexity, 4)} beside {number(measured.perplexity / ratio, 4)}; "
        "lower is better)."
    )


def equal_memory_sentence(values: Values) -> str:
    """That room for the KV cache is no speed-up of the layers, with what it gave where measured."""
    if values.record.backend == "transformers":
        return (
            "transformers keeps no KV cache of a set size: there are no blocks, and no room to "
            "compare."
        )
    text = (
        "Fewer layers leave more memory for the KV cache, so at equal GPU memory more requests "
        "can run at once. That gain belongs to memory. It is measured apart, at "
        f"{MEMORY_TITLES['equal-memory']}, and is never part of the speed-up of layers or kernels, "
        f"which is told at {MEMORY_TITLES['equal-kv']}."
    )
    if "equal-memory" not in values.memories:
        return f"{text} It was not measured here."
    for load in values.loads:
        gains = [
            f"{times(ratio.estimate)} ({interval(ratio)}) for {arm.name}"
            for arm in values.pruned
            if (ratio := values.ratio(Place("equal-memory", arm.name, load.name), _GAIN))
        ]
        if gains:
            text += f" At equal GPU memory, {load_phrase(load)}: {metric_title(_GAIN)} "
            text += f"{_listed(gains)}, the gain of the layers included."
    return text


def _in_short(ratio: Ratio, percent: str, arm: Arm) -> str:
    decimals = 3 if abs(ratio.estimate - 1) < 0.05 else 2
    if ratio.low is None or ratio.high is None:
        span = NO_INTERVAL
    else:
        span = f"{percent}: {ratio.low:.{decimals}f} to {ratio.high:.{decimals}f}"
    found_wanting = _wanting(ratio, arm)
    span += "" if ratio.bound is None else f"; bound {ratio.bound:.2f}"
    return f"{span}; {found_wanting}" if found_wanting else span


def _listed(names: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
