"""`python -m trsp.bench.train_base`: a base model from text files, to prune and measure.

Tokenizer, model and record come out as one plain checkpoint folder.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer

from trsp.bench.base_model import (
    Precision,
    TrainingStep,
    base_config,
    encode_documents,
    train_base_model,
    train_tokenizer,
)
from trsp.bench.record import write_record
from trsp.pruner.console import ErrorsAsExitCodes, progress_bars
from trsp.pruner.durable import publish_folder, refuse_existing
from trsp.pruner.progress import Progress, silent
from trsp.pruner.text_files import hash_text_file, read_texts

DEFAULT_MINUTES = 15.0

app = typer.Typer(cls=ErrorsAsExitCodes, add_completion=False, pretty_exceptions_enable=False)


def train_checkpoint(
    text_files: list[Path],
    out: Path,
    *,
    num_hidden_layers: int,
    hidden_size: int,
    vocab_size: int,
    context: int,
    num_steps: int | None,
    minutes: float | None,
    batch_size: int,
    sequence_length: int,
    learning_rate: float,
    seed: int,
    precision: Precision,
    compile_layers: bool,
    device: str = "cpu",
    overwrite: bool = False,
    log_every: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a tokenizer and a model on text files; publish both at `out` with train_record.json.

    Args:
        log_every: print a line on stderr after every so many steps; 0 prints none.

    Returns:
        the record: text files and their sha256, shape, tokens, steps, the loss curve in about 200
        points, seconds of wall and processor time.
    Raises:
        UserError: a file cannot be read, `out` exists, or the arguments cannot be trained with.
        RunError: the loss is not finite, or the disk is full.
    """
    refuse_existing(out, overwrite=overwrite)
    # Before the training: a file may be another one when that has ended.
    hashes = [hash_text_file(path) for path in text_files]
    documents = list(read_texts(text_files, progress=progress))
    progress("tokenizer", 0, 2)
    tokenizer = train_tokenizer(documents, vocab_size)
    progress("tokenizer", 1, 2)
    token_ids = encode_documents(tokenizer, documents)
    progress("tokenizer", 2, 2)
    config = base_config(
        tokenizer,
        num_hidden_layers=num_hidden_layers,
        hidden_size=hidden_size,
        max_position_embeddings=context,
    )
    steps: list[TrainingStep] = []

    def log(step: TrainingStep) -> None:
        steps.append(step)
        if log_every and step.step % log_every == 0:
            recent = [taken.loss for taken in steps[-log_every:]]
            print(
                f"step {step.step}  loss {sum(recent) / len(recent):.3f}"
                f"  {step.num_tokens / 1e6:.2f}M tokens  {step.elapsed_s:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    cpu_start_s = time.process_time()
    model = train_base_model(
        token_ids,
        config,
        num_steps=num_steps,
        minutes=minutes,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        seed=seed,
        precision=precision,
        compile_layers=compile_layers,
        device=device,
        progress=progress,
        log=log,
    )
    record = {
        "text_files": [path.name for path in text_files],
        "text_sha256": hashes,
        "num_parameters": model.num_parameters(),
        "num_hidden_layers": num_hidden_layers,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "context": context,
        "seed": seed,
        "precision": precision,
        "compiled": compile_layers,
        "device": device,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "learning_rate": learning_rate,
        "num_tokens_in_text": len(token_ids),
        "num_tokens_trained": steps[-1].num_tokens,
        "num_steps": len(steps),
        "final_loss": sum(step.loss for step in steps[-50:]) / len(steps[-50:]),
        "wall_s": steps[-1].elapsed_s,
        "cpu_s": time.process_time() - cpu_start_s,
        "loss_curve": loss_curve(steps),
    }
    with publish_folder(out, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_record(folder / "train_record.json", record)
    return record


def loss_curve(steps: list[TrainingStep], num_points: int = 200) -> list[dict[str, float]]:
    """At most num_points evenly spaced steps, each with the mean loss since the one before it."""
    width = -(-len(steps) // num_points)
    curve = []
    for end in range(len(steps), 0, -width):
        part = steps[max(0, end - width) : end]
        loss = sum(step.loss for step in part) / len(part)
        curve.append(part[-1].as_record() | {"loss": loss})
    return curve[::-1]


# A group's only action rather than a command: groups are what turns errors into exit codes.
@app.callback(invoke_without_command=True)
def main(
    text: Annotated[list[Path], typer.Option(help="text file or folder; repeat for more")],
    out: Annotated[Path, typer.Option(help="checkpoint folder to publish")],
    layers: Annotated[int, typer.Option()] = 12,
    hidden_size: Annotated[int, typer.Option(help="a multiple of 64")] = 192,
    vocab_size: Annotated[int, typer.Option()] = 10_240,
    context: Annotated[int, typer.Option(help="the model's longest context")] = 1024,
    minutes: Annotated[float | None, typer.Option(help="wall time; 15 without --steps")] = None,
    steps: Annotated[int | None, typer.Option(help="steps instead of minutes")] = None,
    batch_size: Annotated[int, typer.Option()] = 8,
    sequence_length: Annotated[int, typer.Option()] = 256,
    learning_rate: Annotated[float, typer.Option()] = 3e-3,
    seed: Annotated[int, typer.Option()] = 0,
    bf16: Annotated[bool, typer.Option(help="matrix products in bf16")] = True,
    compile_layers: Annotated[bool, typer.Option("--compile", help="needs a C++ compiler")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
    log_every: Annotated[int, typer.Option(help="print a line every so many steps")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Train a small Llama-shaped model and its tokenizer on text files."""
    if steps is None and minutes is None:
        minutes = DEFAULT_MINUTES
    transformers.utils.logging.disable_progress_bar()
    with progress_bars() as progress:
        record = train_checkpoint(
            text,
            out,
            num_hidden_layers=layers,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            context=context,
            num_steps=steps,
            minutes=minutes,
            batch_size=batch_size,
            sequence_length=sequence_length,
            learning_rate=learning_rate,
            seed=seed,
            precision="bf16" if bf16 else "fp32",
            compile_layers=compile_layers,
            overwrite=overwrite,
            log_every=log_every,
            progress=progress,
        )
    print(
        f"{record['num_parameters'] / 1e6:.1f}M parameters, {record['num_steps']} steps,"
        f" {record['num_tokens_trained'] / 1e6:.2f}M tokens in {record['wall_s'] / 60:.1f} min"
        f" ({record['cpu_s'] / 60:.1f} processor minutes), loss {record['final_loss']:.3f}: {out}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    app()
