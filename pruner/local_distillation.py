"""Local distillation: the layer before each run of chosen layers learns to do the run's work too.

Layers a..b go and layer a - 1 stays. With x what enters layer a - 1 in the dense model, and x_b+1
what the dense model's stream holds behind the run, layer a - 1, alone, learns

    min  E ||f(x) - x_b+1||^2  /  E ||x_b+1 - x||^2

All runs learn on the same forward passes of the dense model, each from its own input and without
the output head, so a step costs about what a forward pass costs. The layers' weights are swapped in
at the end: all targets are the dense model's.

Related: LLM-Streamline (arXiv 2403.19135) trains one layer so, for one contiguous block; its rate,
2e-4 at a width of 4096, is this one's by width. Puzzle (arXiv 2411.19146) calls it blockwise local
distillation.

N sequences of T tokens, D hidden size.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trsp.pruner.families import first_tensor
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import require_finite
from trsp.pruner.progress import Progress, silent
from trsp.pruner.refit import Refit, runs_of
from trsp.pruner.sampling import batch_indices

# A layer that did not come closer tries again at this part of the rate.
RETRY_FACTOR = 0.25
# Forward passes at the end whose mean error is what was reached.
_LAST_PASSES = 8


def local_distillation(
    gated: GatedModel,
    input_ids: Tensor,
    dropped: tuple[int, ...],
    *,
    steps: int,
    batch_size: int,
    micro_batch_size: int,
    rate: Callable[[int], float],
    weight_decay: float,
    seed: int,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    progress: Progress = silent,
) -> tuple[Refit, ...]:
    """Change, in place, the layer before each run of the layers `dropped`.

    Memory, beside the model: 16 bytes for each parameter of the layers that learn, and the
    activations of one layer.

    Args:
        gated: entered, with the dense model in it.
        input_ids: calibration tokens [N, T].
        rate: learning rate of AdamW by step.
        seed: which sequences each step sees.
        autocast: a context for every forward pass.
    Returns:
        One entry a run, from the first layer up; `explained` is measured on the last forward
        passes. A run that begins at layer 0 is left without and says so, and so is one whose
        layer does not come closer to it, at a quarter of the rate neither: it keeps its weights.
    Raises:
        RunError: a loss that is not finite; no weight has been changed then.
    """
    found: dict[int, Refit] = {}
    students: list[_Student] = []
    learned: list[_Student] = []
    for first, last in runs_of(dropped):
        if first == 0:
            found[first] = Refit(first, last, None, "no layer stands before it")
        else:
            students.append(_Student(first, last, gated.layers[first - 1]))
    for factor in (1.0, RETRY_FACTOR):
        if not students:
            break
        parameters = [value for student in students for value in student.weights.values()]
        optimizer = torch.optim.AdamW(
            parameters, lr=1.0, betas=(0.9, 0.95), weight_decay=weight_decay
        )
        for step in range(steps):
            optimizer.zero_grad(set_to_none=True)
            sequences = batch_indices(
                step, num_sequences=len(input_ids), batch_size=batch_size, seed=seed
            )
            for start in range(0, batch_size, micro_batch_size):
                part = input_ids[sequences[start : start + micro_batch_size]]
                with autocast(), _dense_calls(gated, students, part):
                    for student in students:
                        error = student.error(gated)
                        (error * len(part) / batch_size).backward()
                        what = f"the local loss of layer {student.first - 1}"
                        require_finite(error.item(), what, step, sequences)
            optimizer.param_groups[0]["lr"] = factor * rate(step)
            optimizer.step()
            progress("local distillation", step + 1, steps)
        found |= {student.first: student.judged() for student in students}
        learned += [student for student in students if found[student.first].explained is not None]
        students = [
            _Student(student.first, student.last, student.layer)
            for student in students
            if found[student.first].explained is None
        ]
    # Only now: all of them learn from the model as it came.
    for student in learned:
        student.hand_over()
    return tuple(found[first] for first in sorted(found))


@dataclass
class _Student:
    """The layer before one run, its weights as they are learned (fp32), and the dense calls.

    Attributes:
        args, kwargs: what the layer was called with.   output: what it gave.
        target: what stood behind the run.
        errors: by forward pass, ||f(x) - target||^2 and, of the layer as it came,
            ||output - target||^2, both over ||target - x||^2.
    """

    first: int
    last: int
    layer: nn.Module
    weights: dict[str, Tensor] = field(init=False)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Tensor | None = None
    target: Tensor | None = None
    errors: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = {
            name: parameter.detach().float().clone().requires_grad_(True)
            for name, parameter in self.layer.named_parameters()
        }

    def error(self, gated: GatedModel) -> Tensor:
        """The loss on the last call; `errors` takes it in."""
        assert self.output is not None, "the dense model has run"
        assert self.target is not None, "the dense model has run"
        target = self.target.float()
        update = target - (self.args[0] if self.args else self.kwargs["hidden_states"]).float()
        # Layers that change nothing leave nothing to learn.
        scale = update.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        with gated.masking(()), torch.enable_grad():
            cast = {
                name: self.weights[name].to(parameter.dtype)
                for name, parameter in self.layer.named_parameters()
            }
            output = first_tensor(functional_call(self.layer, cast, self.args, self.kwargs))
            error: Tensor = (output.float() - target).square().mean() / scale
        before = (self.output.float() - target).square().mean() / scale
        self.errors.append((error.item(), before.item()))
        return error

    def judged(self) -> Refit:
        """What was reached, over the last forward passes."""
        after, before = (sum(column) for column in zip(*self.errors[-_LAST_PASSES:], strict=True))
        if before > 0 and not after < before:
            reason = (
                f"layer {self.first - 1} came no closer to them ({after / before:.2f} of the "
                "error before), at a quarter of the rate neither; try a lower "
                "transfer.local_learning_rate"
            )
            return Refit(self.first, self.last, None, reason)
        return Refit(self.first, self.last, 1.0 - after / before if before > 0 else 1.0)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Put the weights into the layer."""
        for name, parameter in self.layer.named_parameters():
            parameter.copy_(self.weights[name])


@contextlib.contextmanager
def _dense_calls(gated: GatedModel, students: list[_Student], batch: Tensor) -> Iterator[None]:
    """Run the dense model over token ids [B, T] as far as it is needed; its calls, in the block."""
    handles = []
    for student in students:

        def before(
            _module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            student: _Student = student,
        ) -> None:
            student.args, student.kwargs = args, dict(kwargs)

        def after(
            _module: nn.Module, _args: object, output: object, student: _Student = student
        ) -> None:
            student.output = first_tensor(output)

        def behind(
            _module: nn.Module, _args: object, output: object, student: _Student = student
        ) -> None:
            student.target = first_tensor(output)

        handles.append(student.layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(student.layer.register_forward_hook(after))
        handles.append(gated.layers[student.last].register_forward_hook(behind))
    deepest = max(student.last for student in students)
    try:
        with torch.no_grad(), gated.masking(range(deepest + 1, gated.num_layers)):
            gated.model.base_model(input_ids=batch.to(gated.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    yield
    for student in students:
        student.args, student.kwargs, student.output, student.target = (), {}, None, None
