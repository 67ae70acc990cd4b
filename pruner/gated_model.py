"""Put the fused op into each decoder layer: the only place where a layer becomes x + s * d.

Both stages, every criterion and the proof's masked model run through the same patched layers. A
layer's own forward is kept: its branch outputs are read as it runs and `gated_branch` forms the
gated output and the difference norm from them; a layer without two plain branches goes through
`gated_difference`. Where norms are fused, the RMSNorm that reads a gated output is computed with
it, and that norm's module, when it is called on that very tensor, returns what is ready.

B batch, T tokens, D hidden size, L layers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trsp.kernels.arguments import GateKind, Norm
from trsp.kernels.gated_branch import gated_branch
from trsp.kernels.gated_branch_rmsnorm import gated_branch_rmsnorm
from trsp.kernels.gated_difference import gated_difference
from trsp.pruner.families import (
    Branches,
    count_side_results,
    decoder_layers,
    find_branches,
    first_tensor,
    with_side_results,
)
from trsp.pruner.losses import language_model_loss
from trsp.pruner.next_norms import NextNorm, find_next_norms
from trsp.pruner.recipe import FuseNorms

# Gated output, ||y - x||, ||x||.
LayerResult = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class LayerDifference:
    """How far one layer moved each token: ||y - x|| and ||x||, both [B, T] fp32."""

    difference: Tensor
    reference: Tensor

    def relative_per_token(self) -> Tensor:
        """||y - x|| / ||x||, [B, T]; no gradient through ||x||; finite where x is 0."""
        floor = torch.finfo(self.reference.dtype).tiny
        return self.difference / self.reference.clamp_min(floor)

    def relative(self) -> Tensor:
        """Mean over tokens of ||y - x|| / ||x||, a scalar."""
        return self.relative_per_token().mean()

    def absolute(self) -> Tensor:
        """Mean over tokens of ||y - x||, in activation units, a scalar."""
        return self.difference.mean()


class GatedModel:
    """A model whose layers can be skipped, scaled and measured; a context manager.

    Outside `with` the model is untouched: parameters, names and hooks are the model's own.

    Attributes set between forward passes:
        skipped: layers that pass their input on unchanged (deleted, as far as anyone can tell).
        gates: fp32 [L] or None; layer i in `gated` computes x + gates[i] * (y - x).
        gated: the layers whose gate is applied.
        measured: the layers whose difference norm is recorded in `differences`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        gate_kind: GateKind = "residual",
        norm: Norm = "l2",
        checkpoint_activations: bool = False,
        fuse_norms: FuseNorms = "auto",
    ) -> None:
        """Find the layers, their branches and the norms that follow them.

        Args:
            fuse_norms: compute the RMSNorm behind a gated layer in the gate's own pass. auto: on
                CUDA, where that is one kernel, and not with activation checkpointing, which calls
                the norm again without the gate.
        Raises:
            UserError: the architecture is not supported. ValueError: fuse_norms is "on" with
                checkpoint_activations.
        """
        if fuse_norms == "on" and checkpoint_activations:
            raise ValueError(
                "fuse_norms='on' with checkpoint_activations: a recomputed layer calls its norm "
                "without the gate before it; choose 'auto' or 'off'"
            )
        fuses = fuse_norms == "on" or (
            fuse_norms == "auto" and model.device.type == "cuda" and not checkpoint_activations
        )
        self.model = model
        self.layers = decoder_layers(model)
        self._side_results = count_side_results(model)
        self.branches: tuple[Branches | None, ...] = find_branches(model)
        self.next_norms: tuple[NextNorm | None, ...] = (
            find_next_norms(model) if fuses else (None,) * (len(self.layers) + 1)
        )
        self.gate_kind: GateKind = gate_kind
        self.norm: Norm = norm
        self.checkpoint_activations = checkpoint_activations
        self.skipped: frozenset[int] = frozenset()
        self.gates: Tensor | None = None
        self.gated: frozenset[int] = frozenset()
        self.measured: frozenset[int] = frozenset()
        self.differences: dict[int, LayerDifference] = {}
        self._captured: dict[tuple[int, str], Tensor] = {}
        # A gated output and its norm, until the norm's own module is called on it.
        self._normed_ahead: tuple[Tensor, Tensor] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._own_forwards: list[tuple[nn.Module, Callable[..., Tensor] | None]] = []
        self._was_training = model.training

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def __enter__(self) -> Self:
        # Dropout off in both stages: 128 sequences are a calibration set, and the dense model's
        # function is the target.
        self._was_training = self.model.training
        self.model.eval()
        for index, layer in enumerate(self.layers):
            self._capture_branches(index, layer)
            self._replace_forward(layer, self._gated_forward(index, layer.forward))
        for norm in self.next_norms:
            if norm is not None:
                self._replace_forward(norm.module, self._norm_forward(norm.module.forward))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captured.clear()
        self._normed_ahead = None
        # A module that two layers share was replaced twice: the first replaced is its own.
        for module, forward in reversed(self._own_forwards):
            if forward is None:
                del module.forward
            else:  # somebody else's patch of this instance, such as accelerate's
                module.forward = forward
        self._own_forwards.clear()
        self.model.train(self._was_training)

    @contextmanager
    def masking(self, layers: Iterable[int]) -> Iterator[None]:
        """Skip these layers, and only these, inside the block; gates and norms are off."""
        before = (self.skipped, self.gated, self.measured)
        self.skipped, self.gated, self.measured = frozenset(layers), frozenset(), frozenset()
        try:
            yield
        finally:
            self.skipped, self.gated, self.measured = before

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V] of token ids [B, T]; the KV cache is off (masked layers leave holes)."""
        self.differences.clear()
        self._normed_ahead = None
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    @torch.no_grad()
    def masked_loss(self, input_ids: Tensor, removed: Iterable[int], batch_size: int) -> float:
        """Language-model loss in nats on tokens [N, T] with the layers `removed` skipped."""
        total = 0.0
        with self.masking(removed):
            for start in range(0, len(input_ids), batch_size):
                batch = input_ids[start : start + batch_size].to(self.model.device)
                total += float(language_model_loss(self.logits(batch), batch)) * len(batch)
        return total / len(input_ids)

    def _replace_forward(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._own_forwards.append((module, vars(module).get("forward")))
        module.forward = forward

    def _capture_branches(self, index: int, layer: nn.Module) -> None:
        branches = self.branches[index]
        if branches is None:
            return
        for name in (branches.attention, branches.mlp):

            def keep(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                if index in self.gated or index in self.measured:
                    self._captured[index, name] = first_tensor(output)

            self._handles.append(layer.get_submodule(name).register_forward_hook(keep))

    def _gated_forward(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        num_side_results = self._side_results[index]

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index in self.skipped:
                return with_side_results(hidden_states, num_side_results)
            if self.checkpoint_activations and torch.is_grad_enabled():
                # The reentrant kind drops the penalty's gradient without a word.
                result: LayerResult = checkpoint(
                    self._call_layer,
                    index,
                    original,
                    hidden_states,
                    *args,
                    use_reentrant=False,
                    **kwargs,
                )
            else:
                result = self._call_layer(index, original, hidden_states, *args, **kwargs)
            z, n, r = result
            if n is not None and r is not None:
                self.differences[index] = LayerDifference(n, r)
            return with_side_results(z, num_side_results)

        return forward

    def _norm_forward(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            ahead, self._normed_ahead = self._normed_ahead, None
            if ahead is not None and ahead[0] is hidden_states and not (args or kwargs):
                return ahead[1]
            return original(hidden_states, *args, **kwargs)

        return forward

    def _next_norm(self, index: int, x: Tensor) -> NextNorm | None:
        """The norm that will read layer `index`'s output in x's dtype, past skipped layers."""
        reader = next(
            (later for later in range(index + 1, self.num_layers) if later not in self.skipped),
            self.num_layers,
        )
        norm = self.next_norms[reader]
        return norm if norm is not None and norm.weight.dtype == x.dtype else None

    def _call_layer(
        self,
        index: int,
        original: Callable[..., Any],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> LayerResult:
        y: Tensor = first_tensor(original(x, *args, **kwargs))
        measured = index in self.measured
        if index not in self.gated and not measured:
            return y, None, None
        gate = self._gate(index, x)
        options: dict[str, Any] = {
            "gate_kind": self.gate_kind,
            "norm": self.norm if measured else None,
            "ref_norm": measured,
        }
        branches = self.branches[index]
        if branches is None:
            z, n, r = gated_difference(x, y, gate, **options)
        else:
            attention = self._captured.pop((index, branches.attention)).reshape(x.shape)
            mlp = self._captured.pop((index, branches.mlp)).reshape(x.shape)
            following = self._next_norm(index, x)
            if following is None:
                z, n, r = gated_branch(x, attention, mlp, gate, **options)
            else:
                z, normed, n, r = gated_branch_rmsnorm(
                    x,
                    attention,
                    mlp,
                    gate,
                    following.weight,
                    eps=following.eps,
                    convention=following.convention,
                    **options,
                )
                self._normed_ahead = (z, normed)
        return z, n, r

    def _gate(self, index: int, x: Tensor) -> Tensor:
        if index in self.gated and self.gates is not None:
            return self.gates[index : index + 1]
        return torch.ones(1, dtype=torch.float32, device=x.device)
