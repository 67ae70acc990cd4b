"""The most that removing layers can gain, from bytes moved and operations done.

Embedding, final norm and head stay whole whatever is removed, so 32 to 24 layers is never 1.33
times as fast. A bound is for an engine at the limit of its GPU: where launching kernels takes the
time instead, the ratio of layer counts is the limit, a little above.

T tokens, B sequences of one batch.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from trsp.bench.statistics import Interval
from trsp.pruner.errors import UserError

if TYPE_CHECKING:
    import torch

WITHIN = "within the bound"
OVERHEAD = "above the bound of bytes, within the layers' ratio: overhead of each layer, not bytes"
BEYOND = "beyond the bound: unexplained"
FAR_BELOW = "far below the bound: unexplained"
# Below this share of the bound's gain, something else than layers took the time.
FAR_BELOW_SHARE = 1 / 3


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer.

    Attributes:
        parameters: all of them; every expert of a sparse layer, which a large batch reads.
        matrix_parameters: those that are multiplied with, two dimensions or more.
        kv_width: numbers cached for each token, keys and values together.
        attention_width: query heads times (their key's + their value's width).
        window: tokens attended to at most; None: all.
    """

    parameters: int
    matrix_parameters: int
    kv_width: int
    attention_width: int
    window: int | None


@dataclass(frozen=True)
class ModelCost:
    """What a model holds, reads and computes; the language model alone, without vision towers.

    Attributes:
        embedding_parameters: tables of which a token reads one row; with tied embeddings the
            shared table is here, and head_parameters counts it again.
        embedding_width: numbers that one token reads from those tables.
        head_parameters: read whole for each step's logits.
        rest_parameters: final norm and the like.
        bytes_per_parameter, bytes_per_kv: of weights and of cached numbers.
    """

    layers: tuple[LayerCost, ...]
    embedding_parameters: int
    embedding_width: int
    head_parameters: int
    rest_parameters: int
    tied: bool
    bytes_per_parameter: float
    bytes_per_kv: float

    @classmethod
    def from_config(
        cls,
        folder: Path,
        *,
        dtype: str = "auto",
        weight_bytes_per_parameter: float | None = None,
        kv_bytes_per_number: float | None = None,
    ) -> Self:
        """Count the parameters of the model that `folder`/config.json describes; no weights needed.

        The model is built by transformers on the meta device: nothing is allocated.

        Args:
            dtype: of weights and KV cache, a torch name; "auto": the config's.
            weight_bytes_per_parameter, kv_bytes_per_number: instead of the dtype's size, for
                quantized weights or an fp8 cache.
        Raises:
            UserError: no readable config.json, a model that transformers does not know, no such
                dtype.
        """
        model = _meta_model(folder)
        config = model.config.get_text_config()
        size = _dtype(dtype, config).itemsize
        layers = _decoder_layers(model, config)
        in_layers = {id(p) for layer in layers for p in layer.parameters()}
        tables = _embedding_tables(model)
        head = model.get_output_embeddings().weight
        embedded = {id(table.weight) for table in tables}
        rest = sum(
            parameter.numel()
            for parameter in model.parameters()
            if id(parameter) not in in_layers | embedded and parameter is not head
        )
        return cls(
            layers=tuple(_layer_cost(layer, config, n) for n, layer in enumerate(layers)),
            embedding_parameters=sum(table.weight.numel() for table in tables),
            embedding_width=sum(table.weight.shape[-1] for table in tables),
            head_parameters=head.numel(),
            rest_parameters=rest,
            tied=id(head) in embedded,
            bytes_per_parameter=weight_bytes_per_parameter or size,
            bytes_per_kv=kv_bytes_per_number or size,
        )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        outside = self.embedding_parameters + self.rest_parameters
        head = 0 if self.tied else self.head_parameters
        return sum(layer.parameters for layer in self.layers) + outside + head

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return round(self.num_parameters * self.bytes_per_parameter)

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache for one more token in all layers, as long as no window is full."""
        return round(sum(layer.kv_width for layer in self.layers) * self.bytes_per_kv)

    def kv_tokens(self, cache_bytes: int) -> int:
        """Tokens that fit into a cache of that size; full windows would leave room for more."""
        return int(cache_bytes // self.kv_bytes_per_token)

    def decode_step_bytes(self, batch: int, context: int) -> int:
        """Bytes one decode step must move: B sequences of `context` tokens, a new token each.

        Layers, head and norms once, a row of the embedding for each sequence, the cached tokens
        each layer attends to, and the new token's. Activations are left out: they are small, and
        as their share goes with the layers, the bound stays within a percent of this.
        """
        _check_counts(batch=batch)
        _check_counts(context=context, at_least=0)
        read = sum(layer.parameters for layer in self.layers)
        read += self.head_parameters + self.rest_parameters + batch * self.embedding_width
        cached = sum(layer.kv_width * (_attended(layer, context) + 1) for layer in self.layers)
        return round(read * self.bytes_per_parameter + batch * cached * self.bytes_per_kv)

    def prefill_flops(self, tokens: int, *, logit_positions: int = 1) -> int:
        """Operations for a prompt of T tokens: two for each multiply-add, causal attention.

        Args:
            logit_positions: tokens that go through the head; a server needs the last one alone.
        """
        _check_counts(tokens=tokens, logit_positions=logit_positions)
        matrices = 2 * tokens * sum(layer.matrix_parameters for layer in self.layers)
        attention = sum(2 * layer.attention_width * _pairs(layer, tokens) for layer in self.layers)
        return matrices + attention + 2 * logit_positions * self.head_parameters


def decode_bound(dense: ModelCost, pruned: ModelCost, *, batch: int, context: int) -> float:
    """The most that decoding can speed up when memory bandwidth is the limit: a ratio of bytes."""
    return dense.decode_step_bytes(batch, context) / pruned.decode_step_bytes(batch, context)


def prefill_bound(
    dense: ModelCost, pruned: ModelCost, *, tokens: int, logit_positions: int = 1
) -> float:
    """The most that prompt processing can speed up when arithmetic is the limit."""
    return dense.prefill_flops(tokens, logit_positions=logit_positions) / pruned.prefill_flops(
        tokens, logit_positions=logit_positions
    )


def achieved_over_bound(ratio: float, bound: float) -> float | None:
    """Share of the possible gain that was reached, (ratio - 1) / (bound - 1); None without one."""
    return (ratio - 1) / (bound - 1) if bound > 1 else None


def verdict(interval: Interval, bound: float | None, layer_ratio: float) -> str:
    """How a measured speed-up lies to the most that is possible.

    Beyond: all of the interval is above the bound. Far below: all of it is under a third of the
    bound's gain, (bound - 1) / 3, which with no gain possible means slower than before. Without an
    interval the estimate stands for it.

    Args:
        bound: of `decode_bound` or `prefill_bound`; None where neither applies, and then the
            layers' ratio takes its place, which no share of work can exceed.
        layer_ratio: dense layers / pruned layers, at least 1.
    Raises:
        ValueError: a bound or ratio below 1.
    """
    ceiling = layer_ratio if bound is None else bound
    if not (ceiling >= 1 and layer_ratio >= 1):
        raise ValueError(
            f"bound is {bound} and the layers' ratio {layer_ratio}, expected at least 1; was the"
            " deeper model taken for the pruned one?"
        )
    low = interval.estimate if interval.low is None else interval.low
    high = interval.estimate if interval.high is None else interval.high
    if low > ceiling:
        return OVERHEAD if low <= layer_ratio else BEYOND
    if high < 1 + (ceiling - 1) * FAR_BELOW_SHARE:
        return FAR_BELOW
    return WITHIN


def _meta_model(folder: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: has no config.json; give the folder of a model")
    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config.get_text_config())
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: transformers cannot build the model: {error}") from error


def _dtype(name: str, config: Any) -> "torch.dtype":
    import torch

    dtype = config.dtype or torch.float32 if name == "auto" else getattr(torch, name, None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype {name!r} does not exist; use auto, float32, bfloat16, float16")
    return dtype


def _decoder_layers(model: Any, config: Any) -> list[Any]:
    """The modules of the decoder layers: the one list that is as long as the config says."""
    from torch import nn

    found = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not found:
        raise UserError(
            f"{type(model).__name__}: has no list of {config.num_hidden_layers} decoder layers"
        )
    # Experts or codebooks may number as many; layers hold them.
    return max(found, key=lambda layers: sum(p.numel() for m in layers for p in m.parameters()))


def _embedding_tables(model: Any) -> list[Any]:
    from torch import nn

    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def _layer_cost(layer: Any, config: Any, index: int) -> LayerCost:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_width, value_width = head_dim, head_dim
    kv_width = 2 * _num_kv_heads(config, heads) * head_dim
    if getattr(config, "kv_lora_rank", None):
        # Multi-head latent attention: engines cache the latent and the shared rotary key.
        kv_width = config.kv_lora_rank + config.qk_rope_head_dim
        key_width = config.qk_nope_head_dim + config.qk_rope_head_dim
        value_width = config.v_head_dim
    parameters = list(layer.parameters())
    return LayerCost(
        parameters=sum(p.numel() for p in parameters),
        matrix_parameters=sum(p.numel() for p in parameters if p.ndim > 1),
        kv_width=kv_width,
        attention_width=heads * (key_width + value_width),
        window=_window(config, index),
    )


def _num_kv_heads(config: Any, heads: int) -> int:
    """Key and value heads under the names that the supported families give them."""
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    nested = getattr(config, "attn_config", None)
    for source, name in (
        (config, "num_key_value_heads"),
        (config, "num_kv_heads"),
        (nested, "kv_n_heads"),
    ):
        if value := getattr(source, name, None):
            return int(value)
    return heads


def _window(config: Any, index: int) -> int | None:
    """Tokens that a layer attends to at most; without types every layer has the window."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] == "full_attention":
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window else None


def _attended(layer: LayerCost, context: int) -> int:
    return context if layer.window is None else min(context, layer.window)


def _pairs(layer: LayerCost, tokens: int) -> int:
    """Pairs of a token and one it attends to, itself included."""
    window = tokens if layer.window is None else min(tokens, layer.window)
    return window * (window + 1) // 2 + (tokens - window) * window


def _check_counts(*, at_least: int = 1, **counts: int) -> None:
    for name, count in counts.items():
        if not (math.isfinite(count) and count >= at_least):
            raise ValueError(f"{name} is {count}, expected at least {at_least}")
