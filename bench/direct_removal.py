"""TRSP beside direct removal: one model, one ratio, the same number of layers gone, one table.

    python -m trsp.bench.direct_removal MODEL --out DIR --data TRAIN --eval-data NAME=FILE ...

Rows: the dense model; plain block influence (ShortGPT) without any training; TRSP's selection
alone; all of TRSP. Every row is a checkpoint on disk made by the public API, proven, and evaluated
by the same protocol.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trsp.bench.generation import time_generation
from trsp.bench.record import write_record
from trsp.pruner import api
from trsp.pruner.console import progress_bars
from trsp.pruner.model_card import deletion_words
from trsp.pruner.progress import Progress, silent

ROWS = {
    "dense": "dense",
    "block_influence": "block influence, direct",
    "selection": "TRSP selection, direct",
    "trsp": "TRSP",
}


def compare(
    model: Path,
    out: Path,
    *,
    data: Sequence[Path],
    eval_data: Mapping[str, Path],
    ratio: float,
    seed: int = 0,
    settings: Sequence[str] = (),
    eval_window: int | None = None,
    eval_tokens: int | None = None,
    vllm: Any = "auto",
    device: str = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Prune `model` in the three ways into folders of `out` and measure all of them.

    Args:
        eval_data: held-out text files by the name of their column.
        settings: recipe settings for TRSP; calibration settings hold for block influence too.
    Returns:
        rows by key, each with layers dropped, perplexity by text, tokens per second; the TRSP
        run's report.
    """
    words: dict[str, Any] = {"ratio": ratio, "data": data, "seed": seed, "device": device}
    folders = {"dense": model}
    reports: dict[str, dict[str, Any]] = {}

    def labelled(label: str) -> Progress:
        return lambda task, done, total: progress(f"{label}: {task}", done, total)

    folders["trsp"] = out / "trsp"
    reports["trsp"] = api.prune(
        model, folders["trsp"], settings=settings, vllm=vllm, progress=labelled("trsp"), **words
    )
    folders["selection"] = out / "selection"
    reports["selection"] = api.prune(
        model,
        folders["selection"],
        layer_map=out / "trsp" / "layer_map.json",
        device=device,
        vllm="off",
        progress=labelled("selection"),
    )
    folders["block_influence"] = out / "block_influence"
    baseline = [
        *(setting for setting in settings if setting.startswith("calibration.")),
        "selection.method=block_influence",
        "selection.num_candidates=1",
        "selection.protected=[]",
        "transfer.enabled=false",
    ]
    reports["block_influence"] = api.prune(
        model,
        folders["block_influence"],
        settings=baseline,
        vllm="off",
        progress=labelled("block influence"),
        **words,
    )
    speed = time_generation(
        {"dense": model, "trsp": folders["trsp"]}, device=_device(device), progress=progress
    )
    rows = {}
    for key in ROWS:
        rows[key] = {
            "label": ROWS[key],
            "folder": str(folders[key]),
            "dropped": sorted(reports[key]["dropped"]) if key in reports else [],
            "perplexity": {
                name: api.evaluate(
                    folders[key],
                    [text],
                    window=eval_window,
                    max_tokens=eval_tokens,
                    batch_size=4,
                    device=device,
                    progress=labelled(f"{key}, {name}"),
                )
                for name, text in eval_data.items()
            },
            "tokens_per_second": speed.get(key),
        }
    return {"ratio": ratio, "seed": seed, "rows": rows, "trsp": reports["trsp"]}


def _device(name: str) -> str:
    from trsp.pruner.run import resolve_device

    return resolve_device(name)


def comparison_table(record: dict[str, Any]) -> Table:
    """The comparison as a table: a row a model, a column a text."""
    names = list(record["rows"]["dense"]["perplexity"])
    table = Table(title=f"perplexity with {record['ratio']:.0%} of the layers removed")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("layers dropped")
    for row in record["rows"].values():
        cells = [f"{row['perplexity'][name]['perplexity']:.2f}" for name in names]
        table.add_row(row["label"], *cells, ", ".join(map(str, row["dropped"])) or "none")
    return table


def speed_line(record: dict[str, Any]) -> str:
    """Generation speed dense beside pruned: measured, so it varies from run to run."""
    dense, pruned = (record["rows"][key]["tokens_per_second"] for key in ("dense", "trsp"))
    return (
        f"generation, one sequence: {dense:.0f} tokens/s dense, {pruned:.0f} tokens/s pruned "
        f"({pruned / dense:.2f} x; measured, varies from run to run; not a serving claim)"
    )


def cost_lines(record: dict[str, Any]) -> list[str]:
    """Wall time and peak memory of each stage of the TRSP run, and what deletion cost."""
    lines = []
    for name, cost in record["trsp"]["costs"].items():
        peak = cost["peak_bytes"]
        memory = "" if peak is None else f", peak {peak / 2**30:.2f} GiB"
        lines.append(f"{name}: {cost['seconds']:.1f} s{memory}")
    transfer = record["trsp"]["transfer"]
    lines.append(f"deletion: {deletion_words(transfer)}")
    return lines


def main() -> None:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and record")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="calibration text")
    parser.add_argument("--eval-data", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="settings", nargs="*", default=[])
    parser.add_argument("--eval-window", type=int)
    parser.add_argument("--eval-tokens", type=int)
    parser.add_argument("--vllm", choices=("auto", "off", "required"), default="auto")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    eval_data = {}
    for named in arguments.eval_data:
        name, separator, path = named.partition("=")
        if not separator:
            parser.error(f"--eval-data {named!r}: write it as NAME=FILE")
        eval_data[name] = Path(path)
    with progress_bars() as progress:
        record = compare(
            arguments.model,
            arguments.out,
            data=arguments.data,
            eval_data=eval_data,
            ratio=arguments.ratio,
            seed=arguments.seed,
            settings=arguments.settings,
            eval_window=arguments.eval_window,
            eval_tokens=arguments.eval_tokens,
            vllm=arguments.vllm,
            device=arguments.device,
            progress=progress,
        )
    path = arguments.out / "comparison.json"
    write_record(path, record)
    console = Console(soft_wrap=True)
    console.print(comparison_table(record))
    for line in [speed_line(record), *cost_lines(record), f"record: {path}"]:
        console.print(line, highlight=False)


if __name__ == "__main__":
    main()
