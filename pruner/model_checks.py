"""What can be proven of a pruned checkpoint by running it, alone and beside its reference.

The reference is the checkpoint that was compacted, with the dropped layers masked. Both are loaded
in fp32, one after the other: equal weights then give equal logits up to rounding. As in
folder_checks, each check returns a Finding or raises CheckFailed or CheckSkipped.
"""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trsp.pruner.checkpoint import Checkpoint, language_config, load_model
from trsp.pruner.families import decoder_layers, text_config
from trsp.pruner.folder_checks import CheckFailed, CheckSkipped, Finding
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.probes import (
    RECURRENT_TOLERANCE,
    Agreement,
    Continuation,
    Probe,
    agreement,
    continuation_logits,
    continue_with_cache,
    difference,
    is_recurrent,
    logits_of,
    make_probes,
    served_agreement,
    tie_tolerance,
)
from trsp.pruner.vllm_process import generate_greedily

# All relative to the logit scale, the largest |logit| of the reference.
LOGIT_TOLERANCE = 1e-5
# With and without a cache the same sums run in other orders; see TIE_TOLERANCE.
CACHE_TOLERANCE = 1e-4
# In a checkpoint's own 16-bit dtype one rounding of the largest logit is allowed.
NATIVE_TOLERANCES = {torch.bfloat16: 2**-8, torch.float16: 2**-11}

MIN_KV_CACHE_BYTES = 256 * 2**20
_LARGEST_CACHE_BLOCK = 128
_LAYER_NUMBERS = ("layer_idx", "layer_index", "layer_id", "layer_number", "block_idx")


class ModelChecks:
    """The checks, in the order in which they must pass, and our model's answers between them.

    At most one model is in memory: ours from `load` to `free`, the reference inside
    `masked_reference`.
    """

    _model: PreTrainedModel
    # Our answers, in the order of the probes.
    _probes: tuple[Probe, ...]
    _attributes: list[dict[str, Any]]
    _logits: list[Tensor]
    _continuations: list[Continuation]
    _uncached: list[Tensor]
    _kv_bytes_per_token: int

    def __init__(self, checkpoint: Checkpoint, *, trust_remote_code: bool, device: str) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.trust_remote_code = trust_remote_code

    def load(self) -> Finding:
        """Load our model in fp32: no key missing, unexpected or of another shape."""
        if self.checkpoint.quantization is not None:
            raise CheckSkipped(
                f"the weights are quantized ({self.checkpoint.quantization}): they were moved, and "
                "are not computed with here"
            )
        self._model = self._load(self.checkpoint, torch.float32)
        self._attributes = [_attributes(layer) for layer in decoder_layers(self._model)]
        language = text_config(self._model)
        num_heads = language.num_attention_heads
        num_kv_heads = getattr(language, "num_key_value_heads", None) or num_heads
        head_dim = getattr(language, "head_dim", None) or language.hidden_size // num_heads
        self._kv_bytes_per_token = 2 * 4 * language.num_hidden_layers * num_kv_heads * head_dim
        return Finding(f"{type(self._model).__name__}: no key missing, unexpected or mismatched")

    def layer_indices(self) -> Finding:
        """Each module that knows its layer's number knows the new one; the cache goes by it."""
        count = 0
        for layer, module in enumerate(decoder_layers(self._model)):
            for name, child in module.named_modules(prefix=f"layer {layer}"):
                for attribute in _LAYER_NUMBERS:
                    number = getattr(child, attribute, layer)
                    if number != layer:
                        raise CheckFailed(f"{name}.{attribute} is {number}, expected {layer}")
                    count += hasattr(child, attribute)
        return Finding(f"{count} modules know their layer's number, all the right one")

    def forward(self, tokenizer: PreTrainedTokenizerBase | None) -> Finding:
        """Answer every probe with finite logits."""
        self._probes = make_probes(self._model.config, tokenizer)
        self._logits = self._logits_of_probes()
        scale = max(float(logits.abs().max()) for logits in self._logits)
        if not all(bool(logits.isfinite().all()) for logits in self._logits):
            raise CheckFailed("logits are not finite in fp32", {"logit_scale": scale})
        asked = ", ".join(
            f"{' x '.join(map(str, probe.input_ids.shape))} {probe.kind}" for probe in self._probes
        )
        return Finding(f"{asked} tokens: logits up to {scale:.3g}", {"logit_scale": scale})

    def kv_cache(self) -> Finding:
        """Generate the same greedy tokens with the KV cache on and off."""
        self._continuations = [continue_with_cache(self._model, probe) for probe in self._probes]
        self._uncached = self._logits_of_continuations()
        found = difference([given.logits for given in self._continuations], self._uncached)
        config = text_config(self._model)
        ties = tie_tolerance(config)
        same = agreement(self._probes, self._tokens(), self._uncached, ties)
        measured = {**found.measured(), **same.measured()}
        if same.first_mismatch:
            raise CheckFailed(f"cache on and off: {same.first_mismatch}", measured, ties)
        detail = f"{same.in_words()} with the cache on and off; logits within {found.in_words()}"
        tolerance = RECURRENT_TOLERANCE if is_recurrent(config) else CACHE_TOLERANCE
        if not found.relative <= tolerance:
            raise CheckFailed(detail, measured, tolerance)
        return Finding(detail, measured, tolerance)

    def free(self) -> None:
        """Let go of the model in memory; the next one needs the room."""
        model = self.__dict__.pop("_model", None)
        if model is None:
            return
        still_there = weakref.ref(model)
        del model
        # A model is let go at once unless it is part of a cycle; a collection takes 0.2 s.
        if still_there() is not None:
            gc.collect()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def masked_reference(
        self, base: Checkpoint, dropped: Sequence[int], dtype: "torch.dtype | str" = torch.float32
    ) -> Iterator[None]:
        """Have the reference in memory, with the dropped layers masked, inside the block.

        Raises:
            UserError: it cannot be loaded, or its layers cannot be masked.
        """
        self.free()
        self._model = self._load(base, dtype)
        try:
            with _masking(self._model, dropped):
                yield
        finally:
            self.free()

    def layer_attributes(self, kept: Sequence[int]) -> Finding:
        """Each layer is set up as its source layer: window, kind of attention, scales."""
        reference = [_attributes(layer) for layer in decoder_layers(self._model)]
        for layer, source_layer in enumerate(kept):
            ours, theirs = self._attributes[layer], reference[source_layer]
            for name in sorted(ours.keys() | theirs.keys()):
                if ours.get(name) != theirs.get(name):
                    raise CheckFailed(
                        f"layer {layer}: {name} is {ours.get(name)!r}, and {theirs.get(name)!r} in "
                        f"source layer {source_layer}"
                    )
        count = sum(len(attributes) for attributes in self._attributes)
        return Finding(f"{count} settings of modules in layers are those of the source layers")

    def logits(self) -> Finding:
        """Our logits are the masked reference's."""
        return _equal_logits(self._logits, self._logits_of_probes(), LOGIT_TOLERANCE, "fp32")

    def greedy(self) -> Finding:
        """Our greedy tokens, generated with a cache, are the masked reference's without one."""
        ties = tie_tolerance(text_config(self._model))
        same = agreement(self._probes, self._tokens(), self._logits_of_continuations(), ties)
        return _equal_choices(same, f"{same.in_words()} as the masked reference without a cache")

    def logits_native(self, base: Checkpoint, dropped: Sequence[int]) -> Finding:
        """Our logits are the masked reference's in the checkpoint's own dtype too.

        Loads both models once more. Not needed where `is_fp32`.
        """
        self._model = self._load(self.checkpoint, "auto")
        dtype = self._model.dtype
        ours = self._logits_of_probes()
        with self.masked_reference(base, dropped, "auto"):
            theirs = self._logits_of_probes()
        tolerance = NATIVE_TOLERANCES.get(dtype, LOGIT_TOLERANCE)
        return _equal_logits(ours, theirs, tolerance, str(dtype).removeprefix("torch."))

    def served(self, *, load_tokenizer: bool, waiting: Callable[[], None]) -> Finding:
        """vLLM's greedy tokens are ours, both in fp32.

        Raises:
            RunError: vLLM cannot serve the folder.
        """
        prompts = [row for probe in self._probes for row in probe.prompts.tolist()]
        max_new_tokens = self._continuations[0].tokens.shape[1]
        num_blocks = sum(
            -(-(len(prompt) + max_new_tokens) // _LARGEST_CACHE_BLOCK) for prompt in prompts
        )
        num_bytes = num_blocks * _LARGEST_CACHE_BLOCK * self._kv_bytes_per_token
        served = generate_greedily(
            self.checkpoint.path,
            prompts,
            max_new_tokens=max_new_tokens,
            load_tokenizer=load_tokenizer,
            kv_cache_memory_bytes=max(MIN_KV_CACHE_BYTES, num_bytes),
            trust_remote_code=self.trust_remote_code,
            waiting=waiting,
        )
        same, largest = served_agreement(self._probes, self._tokens(), self._uncached, served)
        detail = (
            f"{served.engine}: {same.in_words()} as transformers; log-probabilities within "
            f"{largest:.1e}"
        )
        return _equal_choices(same, detail, {"max_logprob_difference": largest})

    def _tokens(self) -> list[Tensor]:
        return [continuation.tokens for continuation in self._continuations]

    def _logits_of_probes(self) -> list[Tensor]:
        return [logits_of(self._model, probe.input_ids) for probe in self._probes]

    def _logits_of_continuations(self) -> list[Tensor]:
        return [
            continuation_logits(self._model, probe, tokens)
            for probe, tokens in zip(self._probes, self._tokens(), strict=True)
        ]

    def _load(self, checkpoint: Checkpoint, dtype: "torch.dtype | str") -> PreTrainedModel:
        return load_model(
            checkpoint, dtype=dtype, device=self.device, trust_remote_code=self.trust_remote_code
        )


def is_fp32(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's own dtype is fp32: stored and, where config.json says, loaded."""
    stated = {
        part.get(name)
        for part in (checkpoint.config, language_config(checkpoint.config))
        for name in ("dtype", "torch_dtype")
    }
    stored = {entry.dtype for entry in checkpoint.tensors.values()}
    return stored == {"F32"} and stated <= {None, "auto", "float32"}


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """Compute fp32 products in fp32: TF32 is off by 1e-3, the tolerances count on 1e-7."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _masking(model: PreTrainedModel, dropped: Sequence[int]) -> Iterator[None]:
    """Apart from its caller, which could not free the model while its frame holds `gated`."""
    with GatedModel(model) as gated, gated.masking(dropped):
        yield


def _equal_logits(
    ours: list[Tensor], theirs: list[Tensor], tolerance: float, dtype: str
) -> Finding:
    found = difference(ours, theirs)
    detail = f"{dtype}: differ from the masked reference's by {found.in_words()}"
    # Not `>`: NaN fails.
    if not found.relative <= tolerance:
        raise CheckFailed(detail, found.measured(), tolerance)
    return Finding(detail, found.measured(), tolerance)


def _equal_choices(
    same: Agreement, detail: str, measured: dict[str, float] | None = None
) -> Finding:
    numbers = {**same.measured(), **(measured or {})}
    if same.first_mismatch:
        raise CheckFailed(same.first_mismatch, numbers, same.tie_tolerance)
    return Finding(detail, numbers, same.tie_tolerance)


def _attributes(layer: nn.Module) -> dict[str, Any]:
    """The plain settings of a layer and all modules in it, by dotted name, but for its number."""
    return {
        f"{name}.{attribute}".lstrip("."): value
        for name, module in layer.named_modules()
        for attribute, value in vars(module).items()
        if not attribute.startswith("_")
        and attribute not in _LAYER_NUMBERS
        and isinstance(value, bool | int | float | str | None)
    }
