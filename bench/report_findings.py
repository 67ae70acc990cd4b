"""What a record comes to in words: what was compared, each arm's result, and what to beware of."""

from dataclasses import dataclass

from trsp.bench.report_speedups import bounded_by_arrivals
from trsp.bench.report_values import (
    Place,
    Values,
    excludes_one,
    is_negative,
    is_unexplained,
    told_memory,
)
from trsp.bench.report_words import (
    MEMORY_TITLES,
    TIMES,
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
    return (
        f"{pruned or 'No pruned model'} beside {base}, in {record.engine} on {place}: "
        f"{workload.input_len:,} tokens in and {workload.output_len:,} out, {workload.dtype}, "
        f"{record.num_blocks} {'block' if record.num_blocks == 1 else 'blocks'} of measurements."
    )


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
    if record.num_blocks < MIN_BLOCKS:
        found.append(
            f"{record.num_blocks} {'block' if record.num_blocks == 1 else 'blocks'}, fewer than "
            f"{MIN_BLOCKS}: the intervals rest on few values."
        )
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


def _finding(values: Values, arm: Arm) -> Finding:
    """Figures and sentence of one arm at the loads that tell most."""
    memory = told_memory(values)
    metric = values.main_metric()
    found = [
        (load, ratio)
        for load in values.main_loads()
        if (ratio := values.ratio(Place(memory, arm.name, load.name), metric)) is not None
        and not bounded_by_arrivals(values, ratio)
    ]
    percent = f"{values.record.confidence:.0%}"
    figures = [
        Figure(
            times(ratio.estimate, 2),
            ("" if is_rate(metric) else "speed-up in ")
            + f"{metric_title(metric)}, {load_title(load)}",
            _in_short(ratio, percent),
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
    sentence = f"{arm.name}: {_speed_sentence(found, metric, percent, arm)}"
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


def _speed_sentence(found: list[tuple[Load, Ratio]], metric: str, percent: str, arm: Arm) -> str:
    """The speed-ups at the told loads as one sentence."""
    if not found:
        return "no speed-up was measured."
    parts = []
    for place, (load, ratio) in enumerate(found):
        if ratio.low is None or ratio.high is None:
            span = "one block, no interval"
        else:
            lead = f"{percent} interval " if place == 0 else ""
            span = f"{lead}{ratio.low:.3f} to {ratio.high:.3f}"
        bound = "" if ratio.bound is None else f"; bound {ratio.bound:.3f}"
        verdict = ""
        if arm.role == "pruned" and is_negative(ratio):
            verdict = ", no gain shown" if not is_unexplained(ratio) else ", unexplained"
        parts.append(f"{times(ratio.estimate)} {load_phrase(load)} ({span}{bound}){verdict}")
    return f"speed-up in {metric_title(metric)} " + " and ".join(parts) + "."


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
    text = (
        "Fewer layers leave more memory for the KV cache, so at equal GPU memory more requests "
        "can run at once. That gain belongs to memory. It is measured apart, at "
        f"{MEMORY_TITLES['equal-memory']}, and is never part of the speed-up of layers or kernels, "
        f"which is told at {MEMORY_TITLES['equal-kv']}."
    )
    if "equal-memory" not in values.memories:
        return f"{text} It was not measured here."
    return text


def _in_short(ratio: Ratio, percent: str) -> str:
    decimals = 3 if abs(ratio.estimate - 1) < 0.05 else 2
    if ratio.low is None or ratio.high is None:
        span = "one block, no interval"
    else:
        span = f"{percent}: {ratio.low:.{decimals}f} to {ratio.high:.{decimals}f}"
    return span + ("" if ratio.bound is None else f"; bound {ratio.bound:.2f}")


def _listed(names: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
