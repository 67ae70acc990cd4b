"""A stage 2 training step with the fused ops against the same step without: losses, time, memory.

    python -m trsp.bench.fused_training --out fused-training.json

Three arms train the same random model on the same tokens: `eager`, the gate and its norm as plain
torch under autograd; `gate`, the fused gate op; `gate + norm`, which computes the next RMSNorm
with it. On CPU the ops are the reference in torch, so there the arms compare autograd with the
explicit backward, not kernels. Losses must stay together for all steps; steps are timed in turns;
the peak is that of a process which runs one arm alone.

B batch, T tokens, D hidden size, L layers.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaForCausalLM

from trsp.bench.record import write_record
from trsp.bench.stages import random_llama, saved_bytes
from trsp.pruner import gated_model
from trsp.pruner.cost import StageCost
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.recipe import TransferRecipe
from trsp.pruner.transfer import TransferLoop

Arm = Literal["eager", "gate", "gate + norm"]
ARMS: tuple[Arm, ...] = ("eager", "gate", "gate + norm")
# Largest relative difference of two losses at one step. The arms differ by roundings alone, which
# training then amplifies: in 16 bits more than in 32.
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


def eager_gated_branch(
    x: Tensor,
    attn_out: Tensor,
    mlp_out: Tensor,
    gate: Tensor,
    *,
    gate_kind: str,
    norm: str | None,
    ref_norm: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`gated_branch` of a residual gate with an l2 norm, as one writes it under plain autograd.

    Not an arm of trsp.bench.kernel_arms: those round y, or upcast it, as the op and transformers
    do, which is another arithmetic and keeps other tensors for backward.
    """
    if gate_kind != "residual" or norm not in (None, "l2"):
        raise ValueError(f"no eager form of gate_kind={gate_kind!r}, norm={norm!r}")
    z = (x + gate * (attn_out.float() + mlp_out.float())).to(x.dtype)
    if norm is None:
        return z, None, None
    diff_norm = (attn_out.float() + mlp_out.float()).norm(dim=-1)
    return z, diff_norm, x.detach().float().norm(dim=-1) if ref_norm else None


@contextmanager
def arm_installed(arm: Arm) -> Iterator[None]:
    """Inside, gated models of this process run `arm`."""
    if arm == "eager":
        with mock.patch.object(gated_model, "gated_branch", eager_gated_branch):
            yield
    else:
        yield


class ArmLoop:
    """One arm: a model of its own and the training loop of stage 2 on it."""

    def __init__(
        self, arm: Arm, model: LlamaForCausalLM, tokens: Tensor, recipe: TransferRecipe
    ) -> None:
        self.arm = arm
        num_layers = model.config.num_hidden_layers
        parameters = dict(model.requires_grad_(True).named_parameters())
        gated = GatedModel(
            model, norm=recipe.norm, fuse_norms="on" if arm == "gate + norm" else "off"
        )
        dropped = tuple(range(1, 1 + num_layers // 2))
        self._loop = TransferLoop(gated, parameters, tokens, recipe, dropped, None, seed=0)

    def step(self, step: int) -> float:
        """One optimizer step; its loss in nats."""
        with arm_installed(self.arm), self._loop.gated:
            return self._loop.step(step)["loss"]

    def saved_activation_bytes(self, step: int) -> int:
        """Bytes that autograd keeps during one step."""
        return saved_bytes(self._loop.gated.model, lambda: self.step(step))


@dataclass(frozen=True)
class Shape:
    """What is trained: a random Llama and `num_sequences` sequences to learn by heart."""

    num_layers: int
    hidden_size: int
    num_sequences: int
    sequence_length: int
    batch_size: int
    steps: int
    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16"]

    @property
    def num_gated_layers(self) -> int:
        return self.num_layers // 2


def start_arm(arm: Arm, shape: Shape) -> ArmLoop:
    """The same model, weights and tokens for every arm."""
    model = random_llama(shape.num_layers, shape.hidden_size, shape.device)
    generator = torch.Generator().manual_seed(0)
    start, stride = torch.randint(1, 64, (2, shape.num_sequences, 1), generator=generator)
    # Counting in steps: a rule that a model finds within 50 steps, so that the loss falls.
    tokens = (start + stride * torch.arange(shape.sequence_length)) % 256
    return ArmLoop(arm, model, tokens, training_recipe(shape))


def training_recipe(shape: Shape) -> TransferRecipe:
    """Labels and penalty; the gates fall over all steps, so every step gates every chosen layer."""
    return TransferRecipe(
        steps=shape.steps,
        batch_size=shape.batch_size,
        label_weight=1,
        distill_weight=0,
        closing="linear",
        closing_fraction=1,
        precision=shape.precision,
    )


def compare_arms(shape: Shape) -> dict[str, Any]:
    """Losses, median step seconds and saved bytes of each arm, in one process, in turns."""
    loops = {arm: start_arm(arm, shape) for arm in ARMS}
    losses: dict[Arm, list[float]] = {arm: [] for arm in ARMS}
    seconds: dict[Arm, list[float]] = {arm: [] for arm in ARMS}
    # The last step's gates are exactly 0: its layers are skipped, and nothing is left to compare.
    for step in range(shape.steps - 1):
        for arm in ARMS if step % 2 else reversed(ARMS):
            started = time.perf_counter()
            losses[arm].append(loops[arm].step(step))
            if shape.device == "cuda":
                torch.cuda.synchronize()
            seconds[arm].append(time.perf_counter() - started)
    medians = {arm: statistics.median(values[2:]) for arm, values in seconds.items()}
    return {
        "losses": losses,
        "largest_relative_difference": largest_relative_difference(losses),
        "tolerance": TOLERANCE[shape.precision],
        "step_seconds": medians,
        "step_ratio_to_eager": {arm: medians[arm] / medians["eager"] for arm in ARMS},
        "saved_activation_bytes": {
            arm: loops[arm].saved_activation_bytes(shape.steps // 2) for arm in ARMS
        },
    }


def peak_bytes(arm: Arm, shape: Shape) -> int | None:
    """Highest memory in use during three steps of `arm`: the process's, or the device's."""
    loop = start_arm(arm, shape)
    loop.step(0)
    with StageCost(shape.device) as cost:
        for step in range(1, 4):
            loop.step(step)
    return cost.peak_bytes


def measure_peaks(shape: Shape) -> dict[Arm, int | None]:
    """`peak_bytes` of each arm in a process of its own."""
    peaks: dict[Arm, int | None] = {}
    for arm in ARMS:
        command = [sys.executable, "-m", "trsp.bench.fused_training", "--peak-of", arm]
        for name, value in asdict(shape).items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[arm] = json.loads(done.stdout)
    return peaks


def largest_relative_difference(losses: dict[Arm, list[float]]) -> dict[str, float]:
    """Of each fused arm's losses to the eager arm's, over all steps."""
    return {
        # torch's maximum of a NaN is NaN; Python's may be anything.
        arm: float(
            torch.tensor(
                [
                    abs(one - other) / abs(other)
                    for one, other in zip(losses[arm], losses["eager"], strict=True)
                ]
            ).max()
        )
        for arm in ARMS
        if arm != "eager"
    }


def results_table(record: dict[str, Any]) -> Table:
    """One row an arm."""
    shape = Shape(**record["shape"])
    table = Table(
        title=f"stage 2 step: {shape.num_layers} layers, {shape.num_gated_layers} gated, "
        f"D {shape.hidden_size}, {shape.batch_size * shape.sequence_length} tokens, "
        f"{shape.precision}, {shape.device}; bar for losses {record['tolerance']:.0e}"
    )
    for column in ("arm", "step, ms", "x eager", "saved, MB", "peak, MB", "losses differ by"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in ARMS:
        difference = record["largest_relative_difference"].get(arm)
        peak = record["peak_bytes"][arm]
        table.add_row(
            arm,
            f"{record['step_seconds'][arm] * 1e3:.1f}",
            f"{record['step_ratio_to_eager'][arm]:.2f}",
            f"{record['saved_activation_bytes'][arm] / 1e6:.1f}",
            "unknown" if peak is None else f"{peak / 1e6:.1f}",
            "" if difference is None else f"{difference:.1e}",
        )
    return table


def main() -> int:
    """Entry point; 1 when the losses part."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=51)
    parser.add_argument("--precision", choices=tuple(TOLERANCE), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak-of", choices=ARMS, help="print the peak bytes of one arm, no more")
    arguments = vars(parser.parse_args())
    out, arm = arguments.pop("out"), arguments.pop("peak_of")
    if (out is None) == (arm is None):
        parser.error("give either --out or --peak-of")
    shape = Shape(**arguments)
    if arm is not None:
        print(json.dumps(peak_bytes(arm, shape)))
        return 0
    record = {"shape": asdict(shape), **compare_arms(shape), "peak_bytes": measure_peaks(shape)}
    write_record(out, {"kind": "fused training", **record})
    Console().print(results_table(record))
    differences = record["largest_relative_difference"].values()
    return int(not all(difference <= record["tolerance"] for difference in differences))


if __name__ == "__main__":
    raise SystemExit(main())
