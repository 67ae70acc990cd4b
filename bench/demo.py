"""`trsp demo`: the whole job on a small model trained on the spot. No network, no GPU, no data.

The text is the source of Python's own standard library, so perplexities hold for one version of
Python; the model is a toy. What it shows is that every step works and what each row costs.
"""

import hashlib
import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from rich.console import Console

from trsp.bench.base_model import (
    base_config,
    encode_documents,
    train_base_model,
    train_tokenizer,
)
from trsp.bench.direct_removal import compare, comparison_table, cost_lines, speed_line
from trsp.bench.record import write_record
from trsp.pruner.durable import run_lock
from trsp.pruner.errors import UserError
from trsp.pruner.progress import Progress, silent

NUM_LAYERS = 12
HIDDEN_SIZE = 128
VOCAB_SIZE = 2048
TRAIN_STEPS = 330
TRAIN_BATCH = 8
SEQUENCE_LENGTH = 128
TRAIN_CHARS = 4_000_000
HELD_OUT_CHARS = 120_000
RATIO = 0.25
RECORD_NAME = "demo.json"
MARKER_NAME = "MADE_BY_TRSP_DEMO"
# Fixed, because the number of threads changes the order of sums and so the last digits.
NUM_THREADS = 2

SETTINGS = (
    "calibration.num_sequences=128",
    f"calibration.sequence_length={SEQUENCE_LENGTH}",
)


def run_demo(
    out: Path, *, seed: int = 0, overwrite: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Train, prune, prove, compare and time, in the folder `out`; the record of all of it.

    The quality columns are the same for the same seed, Python version and machine.

    Raises:
        UserError: `out` exists, or this Python has no standard library source.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(NUM_THREADS)
    with run_lock(out):
        _clear(out, overwrite=overwrite)
        train_text, held_out_text = standard_library_text()
        texts = {"train": out / "train.txt", "held-out": out / "held_out.txt"}
        texts["train"].write_text(train_text, "utf-8")
        texts["held-out"].write_text(held_out_text, "utf-8")
        _train_dense(out / "dense", train_text, seed, progress)
        record = compare(
            out / "dense",
            out,
            data=[texts["train"]],
            eval_data={"held-out": texts["held-out"]},
            ratio=RATIO,
            seed=seed,
            settings=SETTINGS,
            device="cpu",
            progress=progress,
        )
        write_record(out / RECORD_NAME, record)
    return {**record, "out": str(out)}


def _clear(out: Path, *, overwrite: bool) -> None:
    """Make `out`; with `overwrite`, in place of an earlier demo, finished or not."""
    if out.exists():
        if not overwrite:
            raise UserError(f"{out} exists; choose another folder or pass --overwrite")
        if out.is_symlink() or not (out / MARKER_NAME).is_file():
            raise UserError(f"{out} is not a folder of the demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER_NAME).write_text("Made by trsp demo; --overwrite replaces this folder.\n")


def standard_library_text() -> tuple[str, str]:
    """Text to train on and text held out: modules of the standard library, split by their names.

    Raises:
        UserError: this Python was installed without the source of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}
    train: list[str] = []
    held_out: list[str] = []
    sizes = {"train": 0, "held-out": 0}
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if skipped.isdisjoint(path.relative_to(root).parts)
    ]
    for path in sorted(files, key=lambda path: _digest(path.relative_to(root).as_posix())):
        text = path.read_bytes().decode("utf-8", errors="ignore")
        held = int(_digest(path.name), 16) % 16 == 0
        part, limit = ("held-out", HELD_OUT_CHARS) if held else ("train", TRAIN_CHARS)
        if sizes[part] < limit:
            (held_out if held else train).append(text[: limit - sizes[part]])
            sizes[part] += len(text)
    if sizes["train"] < TRAIN_CHARS or sizes["held-out"] < HELD_OUT_CHARS:
        raise UserError(
            f"{root} holds too little Python source for the demo ({sizes['train']} characters); "
            "install Python with its standard library's source files"
        )
    return "\n".join(train), "\n".join(held_out)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _train_dense(folder: Path, text: str, seed: int, progress: Progress) -> None:
    progress("training the tokenizer", 0, 1)
    tokenizer = train_tokenizer([text], VOCAB_SIZE)
    progress("training the tokenizer", 1, 1)
    config = base_config(
        tokenizer,
        num_hidden_layers=NUM_LAYERS,
        hidden_size=HIDDEN_SIZE,
        max_position_embeddings=512,
    )
    model = train_base_model(
        encode_documents(tokenizer, [text]),
        config,
        num_steps=TRAIN_STEPS,
        batch_size=TRAIN_BATCH,
        sequence_length=SEQUENCE_LENGTH,
        seed=seed,
        progress=progress,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def show(record: dict[str, Any], *, as_json: bool) -> None:
    """Print the record: one JSON document, or one table and where the files are."""
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    console = Console(soft_wrap=True)
    console.print(comparison_table(record))
    out = record["out"]
    num_checks = sum(check["status"] == "passed" for check in record["trsp"]["proof"]["checks"])
    lines = [
        speed_line(record),
        *cost_lines(record),
        f"proof: {num_checks} checks passed, in {out}/trsp/trsp_report.json",
        f"models: {out}/dense, {out}/trsp, {out}/selection, {out}/block_influence",
        f"record: {out}/{RECORD_NAME}",
    ]
    for line in lines:
        console.print(line, highlight=False)
