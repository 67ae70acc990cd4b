"""Stage 2: move the chosen layers' knowledge into the kept ones, before anything is deleted.

    loss = label_weight * L_LM + distill_weight * KL(dense || model)
         + hidden_weight * H + lambda2 * sum_i n_i

n_i is the mean over tokens of ||y - x|| / ||x|| of chosen layer i (or of ||y - x||: absolute
units), so lambda2 does not depend on batch, length or, in relative units, on the scale of the
residual stream. The paper's form (arXiv 2505.18232, stage 2) is label_weight 1, distill_weight 0.
One Frobenius norm over B x T tokens, as in its authors' release, is lambda2 * sqrt(B * T) here.
H is the relative squared distance of the last hidden states from the dense model's.

How the chosen layers close. `local`: they are skipped from the first step on, and before it the
layers before them learn, each alone, to do their work too (local_distillation.py). `refit`: the
same in closed form, by the last projections of those layers (refit.py). `at_once`: skipped, and
nothing else: that is pruning, then training, said by its name. `linear`:
their gates fall from 1 to exactly 0 over the first `closing_fraction` of the steps; `progressive`:
one after the other over that part, in the order of removal. Whatever is left of them then, deletion
changes nothing, and a step costs what a step of the shallower model costs. `never`: the penalty
alone makes them small, as in the paper, and deletion takes away what is left.

L layers, N sequences, T tokens.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp.pruner.distillation import Teacher, record_teacher
from trsp.pruner.errors import RunError
from trsp.pruner.families import text_config
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.local_distillation import local_distillation
from trsp.pruner.losses import (
    distillation_loss,
    hidden_state_loss,
    language_model_loss,
    require_finite,
)
from trsp.pruner.progress import Progress, silent
from trsp.pruner.recipe import LoraRecipe, TransferRecipe
from trsp.pruner.refit import Refit, default_relaxation, refit
from trsp.pruner.sampling import batch_indices

# At most this many calibration sequences measure the jump at deletion.
NUM_MEASURED_SEQUENCES = 16


@dataclass(frozen=True)
class TransferResult:
    """What stage 2 did.

    Attributes:
        steps: one record an optimizer step: losses, penalty, gate, learning rate, gradient norm.
        residual_difference: mean ||y - x|| / ||x|| of each chosen layer at the end, at the gate
            it ended with: what deletion takes away. 0 where the gate is 0.
        branch_difference: the same at gate 1: what is left inside the layer.
        loss_dense, loss_before_deletion, loss_after_deletion: language-model loss on calibration
            text, nats: of the model as it came, as transfer left it, and without the layers. With
            closed layers the last two are the same by construction.
        refits: what the layers before them took over before the first step; empty where nothing
            was done then.
    """

    steps: tuple[dict[str, float], ...]
    residual_difference: dict[int, float]
    branch_difference: dict[int, float]
    loss_dense: float
    loss_before_deletion: float
    loss_after_deletion: float
    refits: tuple[Refit, ...] = ()

    def to_document(self) -> dict[str, Any]:
        document = asdict(self)
        document["jump_at_deletion"] = self.loss_after_deletion - self.loss_before_deletion
        return document


@dataclass
class TransferState:
    """A resumable position: `tensors` by parameter name, the optimizer's state, finished steps."""

    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    steps: list[dict[str, float]]


def transfer(
    model: PreTrainedModel,
    input_ids: Tensor,
    recipe: TransferRecipe,
    *,
    dropped: tuple[int, ...],
    seed: int,
    teacher: Teacher | None = None,
    state: TransferState | None = None,
    on_step: Callable[[int, Callable[[], TransferState]], None] = lambda step, snapshot: None,
    on_failure: Callable[[Callable[[], TransferState]], None] = lambda snapshot: None,
    progress: Progress = silent,
) -> TransferResult:
    """Train `model` in place until the layers `dropped` can be deleted.

    Args:
        model: the dense model; its parameters' dtype is what the optimizer works in, so load it
            in fp32 for full-parameter transfer.
        input_ids: calibration tokens [N, T].
        dropped: the layers that will be deleted, in order of removal.
        teacher: the dense model's, where `model` is no longer it; recorded here where None.
        state: where an interrupted transfer stopped; `model` must be the dense model again.
        on_step: called after every step with the number of finished steps and a function that
            captures the state; it may raise to stop the run.
        on_failure: called when a step fails, with a function that captures the last good state.
    Raises:
        RunError: a loss or gradient that is not finite, with its step and batch.
    """
    if teacher is None:
        teacher = teacher_of(model, input_ids, recipe, progress)
    loss_dense, refits = _start(model, input_ids, recipe, dropped, seed, progress)
    with (
        _trainable(model, recipe.lora) as parameters,
        GatedModel(
            model,
            norm=recipe.norm,
            checkpoint_activations=recipe.checkpoint_activations,
            fuse_norms=recipe.fuse_norms,
        ) as gated,
    ):
        sample = input_ids[:NUM_MEASURED_SEQUENCES]
        loop = TransferLoop(gated, parameters, input_ids, recipe, dropped, teacher, seed)
        records = loop.restore(state) if state is not None else []
        for step in range(len(records), recipe.steps):
            try:
                records.append(loop.step(step))
            except RunError:
                on_failure(lambda: loop.snapshot(records))
                raise
            on_step(step + 1, lambda: loop.snapshot(records))
            progress("transfer", step + 1, recipe.steps)
        result = _measure_end(gated, sample, recipe, dropped, records, loss_dense)
        return replace(result, refits=refits)


def teacher_of(
    model: PreTrainedModel, input_ids: Tensor, recipe: TransferRecipe, progress: Progress = silent
) -> Teacher | None:
    """The model as a teacher on tokens [N, T]; None where the recipe asks none."""
    if not recipe.steps or not (recipe.distill_weight > 0 or recipe.hidden_weight > 0):
        return None
    micro = recipe.micro_batch_size or recipe.batch_size
    with autocast(model, recipe):
        return record_teacher(model, input_ids, batch_size=micro, progress=progress)


def _start(
    model: PreTrainedModel,
    input_ids: Tensor,
    recipe: TransferRecipe,
    dropped: tuple[int, ...],
    seed: int,
    progress: Progress,
) -> tuple[float, tuple[Refit, ...]]:
    """The dense model's loss; then what is moved before the first step, in place.

    A resumed transfer does it again: the teacher and what is moved here are of the dense model.
    """
    micro = recipe.micro_batch_size or recipe.batch_size
    refits: tuple[Refit, ...] = ()
    with GatedModel(model, fuse_norms="off") as gated:
        with autocast(model, recipe):
            loss_dense = gated.masked_loss(input_ids[:NUM_MEASURED_SEQUENCES], (), micro)
        if recipe.closing == "local":
            refits = local_distillation(
                gated,
                input_ids,
                dropped,
                steps=recipe.num_local_steps,
                batch_size=recipe.batch_size,
                micro_batch_size=micro,
                rate=lambda step: local_learning_rate(recipe, text_config(model).hidden_size, step),
                weight_decay=recipe.weight_decay,
                seed=seed,
                autocast=lambda: autocast(model, recipe),
                progress=progress,
            )
        elif recipe.closing == "refit":
            relaxation = recipe.relaxation
            if relaxation is None:
                relaxation = default_relaxation(recipe.steps)
            with autocast(model, recipe):
                # One sequence at a time: the sums must not depend on how a resumed run lays out
                # its steps.
                refits = refit(
                    gated,
                    input_ids,
                    dropped,
                    ridge=recipe.ridge,
                    relaxation=relaxation,
                    batch_size=1,
                    progress=progress,
                )
    return loss_dense, refits


def closing_gates(recipe: TransferRecipe, step: int, dropped: tuple[int, ...]) -> dict[int, float]:
    """The chosen layers' gates at `step`: from 1 to exactly 0 where they close in training.

    All of them over the first `closing_fraction` of the steps (linear), or each over its own part
    of that (progressive), `dropped` being in order of removal.
    """
    if recipe.closing in ("local", "refit", "at_once", "never"):
        return dict.fromkeys(dropped, 1.0 if recipe.closing == "never" else 0.0)
    last = max(1, math.ceil(recipe.closing_fraction * recipe.steps) - 1)
    parts = len(dropped) if recipe.closing == "progressive" else 1
    gates = {}
    for place, layer in enumerate(dropped):
        done = step / last * parts - (place if parts > 1 else 0)
        gates[layer] = 0.0 if step >= last else min(1.0, max(0.0, 1.0 - done))
    return gates


def learning_rate(recipe: TransferRecipe, hidden_size: int, step: int) -> float:
    """Warm-up, then a cosine to a tenth.

    The default peak is 0.1 / hidden size: 8e-4 at 128, 2.4e-5 at 4096 (Adam's rate scales with the
    inverse of the width: muP, arXiv 2203.03466); ten times that for LoRA.
    """
    peak = recipe.learning_rate
    if peak is None:
        peak = 0.1 / hidden_size * (10 if recipe.lora is not None else 1)
    return _scheduled(peak, recipe.warmup_fraction, recipe.steps, step)


def local_learning_rate(recipe: TransferRecipe, hidden_size: int, step: int) -> float:
    """Of local distillation, the same schedule; the default peak is 0.8 / hidden size.

    That is LLM-Streamline's 2e-4 at 4096. Measured on the 20-layer model of the README: twice of it
    gave the same, half 1.6 % more perplexity; on the 16-layer one three times of it diverged.
    """
    peak = recipe.local_learning_rate or 0.8 / hidden_size
    return _scheduled(peak, recipe.warmup_fraction, recipe.num_local_steps, step)


def _scheduled(peak: float, warmup_fraction: float, steps: int, step: int) -> float:
    warmup = warmup_fraction * steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * done))


def autocast(
    model: PreTrainedModel, recipe: TransferRecipe
) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast where the recipe says so; `auto` means on CUDA."""
    device = model.device.type
    wanted = recipe.precision == "bf16" or (recipe.precision == "auto" and device == "cuda")
    return torch.autocast(device, dtype=torch.bfloat16) if wanted else contextlib.nullcontext()


class TransferLoop:
    """One optimizer step of stage 2, and what must be saved between two of them."""

    def __init__(
        self,
        gated: GatedModel,
        parameters: dict[str, nn.Parameter],
        input_ids: Tensor,
        recipe: TransferRecipe,
        dropped: tuple[int, ...],
        teacher: Teacher | None,
        seed: int,
    ) -> None:
        self.gated, self.parameters, self.input_ids = gated, parameters, input_ids
        self.recipe, self.dropped, self.teacher, self.seed = recipe, dropped, teacher, seed
        self.optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=1.0,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def step(self, step: int) -> dict[str, float]:
        """Run one optimizer step; its losses (means over micro-batches) in nats."""
        recipe, model = self.recipe, self.gated.model
        gates = closing_gates(recipe, step, self.dropped)
        self._set_gates(gates)
        sequences = batch_indices(
            step, num_sequences=len(self.input_ids), batch_size=recipe.batch_size, seed=self.seed
        )
        micro = recipe.micro_batch_size or recipe.batch_size
        num_micro = recipe.batch_size // micro
        ramp = recipe.ramp_fraction * recipe.steps
        lambda2 = recipe.lambda2 * (min(1.0, (step + 1) / ramp) if ramp else 1.0)
        names = ("loss", "label_loss", "distill_loss", "hidden_loss", "penalty")
        record = dict.fromkeys(names, 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, recipe.batch_size, micro):
            part = sequences[start : start + micro]
            terms = self._forward(part, lambda2)
            (terms["loss"] / num_micro).backward()
            for name, value in terms.items():
                record[name] += float(value.detach()) / num_micro
            require_finite(record["loss"], "the stage 2 loss", step, part)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), recipe.max_grad_norm)
        require_finite(float(norm), "the gradient norm", step, sequences)
        rate = learning_rate(recipe, text_config(model).hidden_size, step)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        gate = sum(gates.values()) / len(gates)
        return {**record, "gate": gate, "learning_rate": rate, "grad_norm": float(norm)}

    def _set_gates(self, gates: dict[int, float]) -> None:
        gated = self.gated
        opened = frozenset(layer for layer, gate in gates.items() if gate != 0.0)
        gated.skipped = frozenset(gates) - opened
        gated.gated = frozenset(layer for layer in opened if gates[layer] != 1.0)
        gated.gates = torch.ones(gated.num_layers, dtype=torch.float32)
        gated.gates[list(gates)] = torch.tensor(list(gates.values()))
        gated.gates = gated.gates.to(gated.model.device)
        gated.measured = opened if self.recipe.lambda2 > 0 else frozenset()

    def _forward(self, sequences: list[int], lambda2: float) -> dict[str, Tensor]:
        recipe, gated = self.recipe, self.gated
        batch = self.input_ids[sequences].to(gated.model.device)
        with autocast(gated.model, recipe), _last_hidden(gated.model, recipe) as hidden:
            logits = gated.logits(batch)
        loss = torch.zeros((), device=logits.device)
        terms = {}
        if recipe.label_weight > 0:
            terms["label_loss"] = language_model_loss(logits, batch)
            loss = loss + recipe.label_weight * terms["label_loss"]
        if self.teacher is not None and recipe.distill_weight > 0:
            with autocast(gated.model, recipe):
                target = self.teacher.logits(sequences)
            terms["distill_loss"] = distillation_loss(
                logits, target, recipe.temperature, by_entropy=recipe.by_entropy
            )
            loss = loss + recipe.distill_weight * terms["distill_loss"]
        if self.teacher is not None and recipe.hidden_weight > 0:
            terms["hidden_loss"] = hidden_state_loss(hidden[0], self.teacher.hidden(sequences))
            loss = loss + recipe.hidden_weight * terms["hidden_loss"]
        if gated.measured:
            penalty = (
                lambda2
                * torch.stack(
                    [
                        d.relative() if recipe.norm_units == "relative" else d.absolute()
                        for d in gated.differences.values()
                    ]
                ).sum()
            )
            assert penalty.requires_grad, "the stage 2 penalty lost its gradient"
            terms["penalty"] = penalty
            loss = loss + penalty
        return {**terms, "loss": loss}

    def snapshot(self, records: list[dict[str, float]]) -> TransferState:
        tensors = {name: value.detach() for name, value in self.parameters.items()}
        return TransferState(tensors, self.optimizer.state_dict(), records)

    def restore(self, state: TransferState) -> list[dict[str, float]]:
        """Load a snapshot into parameters and optimizer; the records of its finished steps."""
        if set(state.tensors) != set(self.parameters):
            raise ValueError("the saved transfer state is of other parameters than this run's")
        with torch.no_grad():
            for name, value in state.tensors.items():
                self.parameters[name].copy_(value)
        self.optimizer.load_state_dict(state.optimizer)
        return list(state.steps)


@contextlib.contextmanager
def _last_hidden(model: PreTrainedModel, recipe: TransferRecipe) -> Iterator[list[Tensor]]:
    """What enters the output head [B, T, D] in the block's forward pass, where it is distilled."""
    seen: list[Tensor] = []
    if recipe.hidden_weight == 0:
        yield seen
        return

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def _trainable(model: PreTrainedModel, lora: LoraRecipe | None) -> Any:
    """The parameters to train, by name: all, or LoRA's, which are merged when the block ends."""
    if lora is None:
        model.requires_grad_(True)
        yield dict(model.named_parameters())
        return
    from peft import LoraConfig, get_peft_model

    # Seeded by the caller through torch.manual_seed: LoRA's A matrices are random.
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear")
    wrapped = get_peft_model(model, config)
    try:
        yield {name: value for name, value in model.named_parameters() if value.requires_grad}
    except BaseException:
        wrapped.unload()
        raise
    wrapped.merge_and_unload()
    model.requires_grad_(True)


@torch.no_grad()
def _measure_end(
    gated: GatedModel,
    sample: Tensor,
    recipe: TransferRecipe,
    dropped: tuple[int, ...],
    records: list[dict[str, float]],
    loss_dense: float,
) -> TransferResult:
    """The residual difference and the jump in loss at deletion, on calibration text."""
    micro = recipe.micro_batch_size or recipe.batch_size
    final_gate = closing_gates(recipe, recipe.steps - 1, dropped)
    gated.skipped, gated.gated, gated.measured = frozenset(), frozenset(), frozenset(dropped)
    branch = dict.fromkeys(sorted(dropped), 0.0)
    before = 0.0
    with autocast(gated.model, recipe):
        for start in range(0, len(sample), micro):
            batch = sample[start : start + micro].to(gated.model.device)
            loss = language_model_loss(gated.logits(batch), batch)
            before += float(loss) * len(batch) / len(sample)
            for layer, difference in gated.differences.items():
                moved = difference.relative_per_token()
                norm = moved.sqrt() if gated.norm == "l2_squared" else moved
                branch[layer] += float(norm.mean()) * len(batch) / len(sample)
        after = gated.masked_loss(sample, dropped, micro)
    require_finite(after, "the loss after deletion", recipe.steps, list(range(len(sample))))
    return TransferResult(
        steps=tuple(records),
        residual_difference={layer: final_gate[layer] * branch[layer] for layer in branch},
        branch_difference=branch,
        loss_dense=loss_dense,
        loss_before_deletion=before if any(final_gate.values()) else after,
        loss_after_deletion=after,
    )
