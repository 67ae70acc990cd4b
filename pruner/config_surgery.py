"""config.json for the layers that stay: every field that depends on the layers made right.

Surviving layers keep what they were: a list with one entry for each layer is sliced, never built
anew. A field that depends on the layers and cannot be carried over is refused by name. So is a
model type nobody has checked: in some the number or count of layers enters the arithmetic without
any field that says so (DiffLlama's lambda_init, MiniMax' slopes, MiniCPM's residual scale).

L layers, numbered as `source_layer` before and `layer` after.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from reprlib import repr as brief
from typing import Any

from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import ConfigChange

Lists = dict[str, list[Any]]

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# One entry for each layer, where the value is a list.
_PER_LAYER = {
    "activation_sparsity_pattern", "layer_types", "layers_block_type", "mlp_layer_types",
    "moe_layer_freq", "no_rope_layers",
}  # fmt: skip
# Layers below the value are of one kind, the others of another: slicing keeps that order.
_THRESHOLDS = {"first_k_dense_replace", "max_window_layers"}
# Known to depend on the layers and not carried over, with the numbers under which nothing does.
_REFUSED: dict[str, tuple[int, ...]] = {
    "_sliding_window_pattern": (1,),
    "activation_sparsity_pattern": (0,),
    "attention_layers": (),
    "attention_types": (),
    "attn_layer_indices": (),
    "attn_layer_offset": (0,),
    "attn_layer_period": (1,),
    "block_configs": (),
    "block_types": (),
    "cla_share_factor": (1,),
    "cross_attention_layers": (),
    "decoder_sparse_step": (1,),
    "expert_layer_offset": (0,),
    "expert_layer_period": (1,),
    "full_attention_interval": (1,),
    "full_attn_idxs": (),
    "global_attn_every_n_layers": (1,),
    "hidden_size_per_layer_input": (0,),
    "hybrid_layer_ids": (),
    "hybrid_override_pattern": (),
    "interleave_moe_layer_step": (1,),
    "is_encoder_decoder": (),
    "layer_rope_theta": (),
    "mlp_only_layers": (),
    "moe_layer_end_index": (-1,),
    "moe_layer_freq": (1,),
    "moe_layer_interval": (1,),
    "moe_layer_start_index": (0,),
    "moe_layers": (),
    "no_rope_layer_interval": (1,),
    "num_dense_layers": (0,),
    "num_kv_shared_layers": (0,),
    "num_mtp_layers": (0,),
    "num_nextn_predict_layers": (0,),
    "per_layer_config": (),
    "pruned_heads": (),
    "quantization_config": (),
    "scale_attn_by_inverse_layer_idx": (),
    "scale_depth": (),
    "sliding_window_pattern": (1,),
}
# Lists and numbered dicts that are as long as the model is deep by chance only.
_NOT_PER_LAYER = {
    "architectures", "begin_suppress_tokens", "bos_token_id", "eos_token_id", "id2label",
    "label2id", "long_factor", "mrope_section", "pad_token_id", "short_factor", "suppress_tokens",
    "vision_feature_layer",
}  # fmt: skip
_SUB_CONFIGS = {"audio_config", "text_config", "vision_config"}
_SPEAKS_OF_LAYERS = re.compile(
    r"layer|block|depth|mtp|nextn|idx|index|indices|_ids$|every|interval|period|pattern"
)
# Speaks of layer norm, layer drop and the like: harmless as a single value.
_HARMLESS = re.compile(r"norm|dropout|layer_?drop|_token_(id|index|ids)$|^block_size$")
_SPARSE_STEP = ("decoder_sparse_step", "mlp_only_layers")
_NAMES_A_LAYER = re.compile(r"(^|\.)(layers?|h|blocks?)\.\d+(\.|$)")


@dataclass(frozen=True)
class _Family:
    """What the config class of a model type fills in, and from what.

    `implied(config, L)`: the per-layer lists it derives, as transformers 5.19 does. `intervals`:
    fields read only for that; they are removed where they no longer tell the truth.
    """

    implied: Callable[[Mapping[str, Any], int], Lists] = lambda config, num_layers: {}
    intervals: tuple[str, ...] = ()
    sparse_step: bool = False


def rewrite_config(
    config: dict[str, Any], kept: Sequence[int]
) -> tuple[dict[str, Any], tuple[ConfigChange, ...]]:
    """The config for a model that keeps these source layers, and each field that changed.

    The layers may be those of a `text_config`; vision and audio towers stay untouched. With every
    layer kept nothing changes and nothing is refused. `config` is not modified.

    - the layer count, under each name it has;
    - lists with one entry for each layer: sliced. Where a config class would derive a list from
      an interval or a default, and would derive another one for fewer layers, the list is written;
    - `max_window_layers`, `first_k_dense_replace`: the number of kept layers below it;
    - `mlp_only_layers` of Qwen MoE: renumbered, layers that `decoder_sparse_step` made dense added.

    Args:
        kept: source layers, ascending.
    Raises:
        UserError: no one layer count; `kept` is not what it must be; a field that depends on the
            layers and cannot be carried over, each one named; a model type not checked.
    """
    num_layers = num_hidden_layers(config)
    _check_kept(kept, num_layers)
    new_config = copy.deepcopy(config)
    if len(kept) == num_layers:
        return new_config, ()
    model_type, section, prefix = str(config.get("model_type")), config, ""
    supported, refusals = FAMILIES.keys(), list[str]()
    if config.get("text_config") is not None:
        section, prefix = config["text_config"], "text_config."
        for name, value in config.items():
            refusals += _dependences(name, value, num_layers)
        if model_type in MULTIMODAL_MODEL_TYPES:
            model_type = str(section.get("model_type", MULTIMODAL_MODEL_TYPES[model_type]))
        else:
            supported = MULTIMODAL_MODEL_TYPES.keys()
    family = FAMILIES.get(model_type, _Family())
    new_section = _carry_over(section, kept, num_layers, family, prefix, refusals)
    if refusals:
        raise UserError(
            f"config.json cannot be carried over to {len(kept)} of {num_layers} layers, it has "
            f"fields that depend on them: {'; '.join(refusals)}"
        )
    if model_type not in supported:
        raise UserError(
            f"config.json: model_type is {brief(model_type)}, and nobody has checked whether its "
            f"layers depend on their number; supported: {', '.join(sorted(supported))}"
        )
    _write_lists(section, new_section, kept, num_layers, family)
    changes = tuple(
        ConfigChange(prefix + name, section.get(name), new_section.get(name))
        for name in dict.fromkeys((*section, *new_section))
        if section.get(name) != new_section.get(name)
    )
    if prefix:
        new_config["text_config"] = new_section
        return new_config, changes
    return new_section, changes


def num_hidden_layers(config: Mapping[str, Any]) -> int:
    """The number of decoder layers a config names, in its `text_config` where it has one.

    Raises:
        UserError: it names none, names that disagree, or no positive integer.
    """
    section = config if config.get("text_config") is None else config["text_config"]
    if not isinstance(section, Mapping):
        raise UserError(f"config.json: text_config is {brief(section)}, expected an object")
    named = {name: section[name] for name in _COUNTS if section.get(name) is not None}
    if not named:
        where = "" if section is config else " in text_config"
        raise UserError(f"config.json names no num_hidden_layers{where}; write it there")
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"config.json: {name} is {brief(value)}, expected a positive integer")
    if len(set(named.values())) > 1:
        pairs = ", ".join(f"{name} is {value}" for name, value in named.items())
        raise UserError(f"config.json: {pairs}; expected one number of layers")
    return int(next(iter(named.values())))


def _check_kept(kept: Sequence[int], num_layers: int) -> None:
    if not kept:
        raise UserError("no layer is kept, at least one must be")
    for layer in kept:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise UserError(f"kept names {brief(layer)}, expected layers 0 to {num_layers - 1}")
    for before, after in pairwise(kept):
        if after <= before:
            raise UserError(f"kept must ascend: layer {after} follows layer {before}")


def _carry_over(
    section: Mapping[str, Any],
    kept: Sequence[int],
    num_layers: int,
    family: _Family,
    prefix: str,
    refusals: list[str],
) -> dict[str, Any]:
    """Each field for the kept layers; what cannot be is added to `refusals`."""
    own_fields = {*family.intervals, *(_SPARSE_STEP if family.sparse_step else ())}
    new: dict[str, Any] = {}
    for name, value in section.items():
        new[name] = copy.deepcopy(value)
        if name in _COUNTS and value is not None:
            new[name] = len(kept)
        elif name in _PER_LAYER and isinstance(value, list | tuple) and value:
            if len(value) == num_layers:
                new[name] = [new[name][layer] for layer in kept]
            else:
                refusals.append(f"{prefix}{name} has {len(value)} entries, not {num_layers}")
        elif name in _THRESHOLDS and type(value) is int:
            # Beyond every layer it means none, at any depth; vLLM takes a threshold at the depth
            # for something else, and would then serve mixed windows as none.
            new[name] = value if value > num_layers else sum(layer < value for layer in kept)
        elif name not in own_fields:
            refusals += _dependences(prefix + name, value, num_layers)
    return new


def _write_lists(
    section: Mapping[str, Any],
    new: dict[str, Any],
    kept: Sequence[int],
    num_layers: int,
    family: _Family,
) -> None:
    """Write each list that the config class would not derive as the layers are."""
    before = family.implied(section, num_layers)
    wanted = {
        name: [(section.get(name) or derived)[layer] for layer in kept]
        for name, derived in before.items()
    }
    bare = {name: value for name, value in new.items() if name not in wanted}
    if family.implied(bare, len(kept)) != wanted:
        new.update(wanted)
        for name in family.intervals:
            new.pop(name, None)
    if family.sparse_step:
        step = _integer(section, "decoder_sparse_step", 1, at_least=1)
        listed = section.get("mlp_only_layers") or []
        if not isinstance(listed, list | tuple):
            raise UserError(f"config.json: mlp_only_layers is {brief(listed)}, expected a list")
        dense = [layer for layer, old in enumerate(kept) if old in listed or (old + 1) % step]
        if listed or step != 1:
            new.update(mlp_only_layers=dense, decoder_sparse_step=1)


def _dependences(name: str, value: Any, num_layers: int) -> Iterator[str]:
    """How a field that is not carried over depends on the layers, or may; nothing: it does not."""
    leaf = re.sub(r"\[\d+\]$", "", name.rpartition(".")[2])
    single = not isinstance(value, list | tuple | dict)
    if leaf in _NOT_PER_LAYER or leaf in _SUB_CONFIGS:
        return
    if value is None or value is False or value in ("", [], (), {}):
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        count_of_none = (0,) if leaf.startswith(("num_", "n_")) else ()
        if value in _REFUSED.get(leaf, count_of_none):
            return
    if leaf in _REFUSED:
        yield f"{name} is {brief(value)}"
    elif _SPEAKS_OF_LAYERS.search(leaf) and not (single and _HARMLESS.search(leaf)):
        yield f"{name} is {brief(value)} (unknown, its name speaks of layers)"
    elif isinstance(value, list | tuple) and len(value) == num_layers:
        yield f"{name} has {num_layers} entries (unknown, as many as layers)"
    elif isinstance(value, dict) and all(str(key).isdecimal() for key in value):
        yield f"{name} is {brief(value)} (unknown, keyed by numbers)"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _dependences(f"{name}.{key}", item, num_layers)
    elif isinstance(value, list | tuple):
        for n, item in enumerate(value):
            if not isinstance(item, str):
                yield from _dependences(f"{name}[{n}]", item, num_layers)
            elif _NAMES_A_LAYER.search(item):
                yield f"{name} names a layer in {brief(item)}"


def _integer(config: Mapping[str, Any], name: str, default: int, *, at_least: int) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UserError(f"config.json: {name} is {brief(value)}, expected at least {at_least}")
    return value


def _types(sliding: Sequence[bool]) -> Lists:
    return {"layer_types": ["sliding_attention" if s else "full_attention" for s in sliding]}


def _periodic(period: int, field: str | None = None) -> Callable[[Mapping[str, Any], int], Lists]:
    """Every `period`-th layer attends to everything, the others have a window."""

    def implied(config: Mapping[str, Any], num_layers: int) -> Lists:
        every = period if field is None else _integer(config, field, period, at_least=1)
        return _types([(layer + 1) % every != 0 for layer in range(num_layers)])

    return implied


def _above_threshold(config: Mapping[str, Any], num_layers: int) -> Lists:
    """Qwen2, Qwen3: layers from max_window_layers on have a window, if windows are used."""
    windows = _uses_windows(config) and config.get("sliding_window", 4096) is not None
    first = _integer(config, "max_window_layers", 28, at_least=0)
    return _types([windows and layer >= first for layer in range(num_layers)])


def _alternate_below_threshold(config: Mapping[str, Any], num_layers: int) -> Lists:
    """Qwen2 MoE: every other layer below max_window_layers has a window, if windows are used."""
    windows, layers = _uses_windows(config), range(num_layers)
    first = _integer(config, "max_window_layers", 28, at_least=0)
    return _types([windows and layer < first and layer % 2 == 0 for layer in layers])


def _rope_and_window(config: Mapping[str, Any], num_layers: int) -> Lists:
    """SmolLM3: every fourth layer has no rope and, if windows are used, a window."""
    every = _integer(config, "no_rope_layer_interval", 4, at_least=1)
    derived = [int((layer + 1) % every != 0) for layer in range(num_layers)]
    rope = config.get("no_rope_layers") or derived
    windows = _uses_windows(config) and config.get("sliding_window") is not None
    return {"no_rope_layers": rope, **_types([windows and not has_rope for has_rope in rope])}


def _uses_windows(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_sliding_window", False))


# Model types whose config class derives nothing from the layers.
_UNIFORM = (
    "apertus", "arcee", "bloom", "codegen", "cohere", "deepseek_v2", "deepseek_v3", "ernie4_5",
    "falcon", "gemma", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite",
    "granitemoe", "helium", "llama", "ministral", "ministral3", "mistral", "mixtral", "mpt",
    "nemotron", "olmo", "olmo2", "olmoe", "opt", "persimmon", "phi", "phi3", "seed_oss", "stablelm",
    "starcoder2",
)  # fmt: skip
# The model types checked, each in the tests against a model whose dropped layers are skipped.
FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys(_UNIFORM, _Family()),
    "cohere2": _Family(_periodic(4, "sliding_window_pattern"), ("sliding_window_pattern",)),
    "gemma2": _Family(_periodic(2)),
    "gemma3_text": _Family(
        _periodic(6, "sliding_window_pattern"),
        ("sliding_window_pattern", "_sliding_window_pattern"),
    ),
    "gpt_oss": _Family(_periodic(2)),
    "olmo3": _Family(_periodic(4)),
    "qwen2": _Family(_above_threshold),
    "qwen2_moe": _Family(_alternate_below_threshold, sparse_step=True),
    "qwen3": _Family(_above_threshold),
    "qwen3_moe": _Family(sparse_step=True),
    "smollm3": _Family(_rope_and_window, ("no_rope_layer_interval",)),
}
# Their text_config holds the layers; the model type it has when it names none.
MULTIMODAL_MODEL_TYPES: Mapping[str, str | None] = {
    "gemma3": "gemma3_text",
    "llava": None,
    "mistral3": None,
}
