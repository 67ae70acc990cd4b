"""config.json for the layers that stay: every field that depends on the layers made right.

Surviving layers keep what they were: a list with one entry for each layer is sliced, never built
anew. A field that depends on the layers and cannot be carried over is refused by name. So is a
model type nobody has checked (family_registry.py): in some the number or count of layers enters
the arithmetic without any field that says so.

L layers, numbered as `source_layer` before and `layer` after.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from reprlib import repr as brief
from typing import Any

from trsp.pruner.errors import UserError
from trsp.pruner.family_registry import Family, Multimodal, registry
from trsp.pruner.layer_map import ConfigChange
from trsp.pruner.layer_rules import FULL, LINEAR, SLIDING, integer_field

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
    "per_layer_config": (),
    "pruned_heads": (),
    "scale_attn_by_inverse_layer_idx": (),
    "scale_depth": (),
    "sliding_window_pattern": (1,),
}
# Layers for drafting further tokens stand behind the decoder layers and are counted apart.
_DRAFT_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")
# Lists and numbered dicts that are as long as the model is deep by chance only.
_NOT_PER_LAYER = {
    "architectures", "begin_suppress_tokens", "bos_token_id", "eos_token_id", "id2label",
    "label2id", "long_factor", "mrope_section", "pad_token_id", "short_factor", "suppress_tokens",
    "vision_feature_layer",
}  # fmt: skip
# What quantization says of layers is rewritten where the modules are known (quantization.py).
_SUB_CONFIGS = {
    "audio_config", "compression_config", "quantization_config", "text_config", "vision_config",
}  # fmt: skip
_SPEAKS_OF_LAYERS = re.compile(
    r"layer|block|depth|mtp|nextn|idx|index|indices|_ids$|every|interval|period|pattern"
)
# Phrases that speak of nothing of the kind where the value is a single one; the rest of the name
# may still do.
_HARMLESS = re.compile(
    r"layer_?norms?|layer_?drop(out)?|dropout_layers?|_token_(id|index|ids)$|"
    r"^(block_size|ignore_index|use_parallel_block)$"
)
_NAMES_A_LAYER = re.compile(r"(^|\.)(layers?|h|blocks?)\.\d+(\.|$)")


def rewrite_config(
    config: dict[str, Any], kept: Sequence[int]
) -> tuple[dict[str, Any], tuple[ConfigChange, ...]]:
    """The config for a model that keeps these source layers, and each field that changed.

    The layers may be those of a `text_config`; vision and audio towers stay untouched. With every
    layer kept nothing changes and nothing is refused. `config` is not modified.

    - the layer count, under each name it has;
    - lists with one entry for each layer: sliced. Where a config class would derive a list from
      an interval or a default, and would derive another one for fewer layers, the list is written;
    - `max_window_layers`, `first_k_dense_replace`: the number of kept layers below it, also where
      it is left to the class;
    - lists of layer numbers (`mlp_only_layers` of Qwen MoE, `moe_layers` of Llama 4): renumbered,
      with the layers that an interval put there;
    - draft layers (`num_nextn_predict_layers`) stay, with their entries behind the layers' own.

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
    known, refusals = registry(), list[str]()
    section, model_type, multimodal = _language_part(config)
    prefix, supported = "", known.supported()
    if section is not config:
        prefix = "text_config."
        for name, value in config.items():
            refusals += _dependences(name, value, num_layers)
        if multimodal is None:
            supported = sorted(known.multimodal)
        else:
            refusals += _fed_layers_that_go(config, multimodal, kept)
    family = known.families.get(model_type, Family())
    if family.refused is not None:
        raise UserError(f"config.json: model_type {model_type} cannot be pruned: {family.refused}")
    new_section = _carry_over(section, kept, num_layers, family, prefix, refusals)
    if refusals:
        raise UserError(
            f"config.json cannot be carried over to {len(kept)} of {num_layers} layers, it has "
            f"fields that depend on them: {'; '.join(refusals)}"
        )
    if model_type not in supported:
        raise UserError(
            f"config.json: model_type is {brief(model_type)}, and nobody has checked whether its "
            f"layers depend on their number; supported: {', '.join(supported)}; for another one "
            "add a file to pruner/family_data, as pruner/family_registry.py says"
        )
    _write_lists(section, new_section, kept, num_layers, family)
    kinds = _layer_kinds(section, family, num_layers)
    if (
        LINEAR in kinds
        and FULL in kinds
        and FULL not in _layer_kinds(new_section, family, len(kept))
    ):
        raise UserError(
            "none of the kept layers has full attention, and a hybrid model needs one: keep one of "
            f"{', '.join(str(n) for n, kind in enumerate(kinds) if kind == FULL)}"
        )
    changes = tuple(
        ConfigChange(prefix + name, section.get(name), new_section.get(name))
        for name in dict.fromkeys((*section, *new_section))
        if section.get(name) != new_section.get(name)
    )
    if prefix:
        new_config["text_config"] = new_section
        return new_config, changes
    return new_section, changes


def layers_that_must_stay(config: Mapping[str, Any]) -> dict[int, str]:
    """Layers that a choice must leave in place, each with the reason.

    - those behind which image features enter (Qwen3-VL);
    - of a hybrid model, the last layer with full attention. Another one would do, but one must
      stay: transformers reads the cache's length from it.

    Raises:
        UserError: see `num_hidden_layers`.
    """
    num_layers, reasons = num_hidden_layers(config), dict[int, str]()
    section, model_type, multimodal = _language_part(config)
    if multimodal is not None:
        fed = range(_num_fed_layers(config, multimodal))
        reasons |= dict.fromkeys(fed, "image features enter behind it")
    kinds = _layer_kinds(section, registry().families.get(model_type, Family()), num_layers)
    if LINEAR in kinds and FULL in kinds:
        last = max(layer for layer, kind in enumerate(kinds) if kind == FULL)
        reasons[last] = "a hybrid model needs a layer with full attention"
    return reasons


def read_otherwise(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a known engine would make of these layers that transformers does not, one line each.

    vLLM 0.32 takes gpt-oss's windows from the parity of a layer's number and not from layer_types
    (model_executor/models/gpt_oss.py): it would serve other windows without a word.
    """
    section, model_type, _ = _language_part(config)
    family = registry().families.get(model_type, Family())
    period, num_layers = family.period_in_vllm, num_hidden_layers(config)
    if period is None:
        return ()
    kinds = _layer_kinds(section, family, num_layers)
    assumed = [FULL if (layer + 1) % period == 0 else SLIDING for layer in range(num_layers)]
    if kinds == assumed:
        return ()
    return (
        f"vLLM gives every layer of {model_type} a window but each {period}th, whatever "
        "layer_types says: it would serve this model with other windows than it has; keep layers "
        "in pairs, or serve it with transformers",
    )


def num_hidden_layers(config: Mapping[str, Any]) -> int:
    """The number of decoder layers a config names, in its `text_config` where it has one.

    Older transformers left out of a text_config what its class fills in (Llava-1.5's 32 layers).

    Raises:
        UserError: it names none, names that disagree, or no positive integer.
    """
    section = config if config.get("text_config") is None else config["text_config"]
    if not isinstance(section, Mapping):
        raise UserError(f"config.json: text_config is {brief(section)}, expected an object")
    named = {name: section[name] for name in _COUNTS if section.get(name) is not None}
    if not named and section is not config:
        model_type = str(section.get("model_type"))
        family = registry().families.get(model_type, Family())
        if model_type in family.default_num_layers:
            return family.default_num_layers[model_type]
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


def num_draft_layers(config: Mapping[str, Any]) -> int:
    """How many layers for drafting further tokens the config names, behind the decoder layers."""
    section = config if config.get("text_config") is None else config["text_config"]
    counts = [section.get(name) for name in _DRAFT_COUNTS]
    return max((count for count in counts if type(count) is int and count > 0), default=0)


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
    family: Family,
    prefix: str,
    refusals: list[str],
) -> dict[str, Any]:
    """Each field for the kept layers; what cannot be is added to `refusals`."""
    own_fields = family.own_fields()
    num_drafts = num_draft_layers(section)
    new: dict[str, Any] = {}
    for name, value in section.items():
        new[name] = copy.deepcopy(value)
        if name in _COUNTS and value is not None:
            new[name] = len(kept)
        elif name in _PER_LAYER and isinstance(value, list | tuple) and value:
            if len(value) in (num_layers, num_layers + num_drafts):
                new[name] = [*(new[name][layer] for layer in kept), *new[name][num_layers:]]
            else:
                refusals.append(f"{prefix}{name} has {len(value)} entries, not {num_layers}")
        elif name in _THRESHOLDS and value is not None:
            if type(value) is int:
                new[name] = _threshold(value, kept, num_layers)
            else:
                refusals.append(f"{prefix}{name} is {brief(value)}, not a whole number")
        elif name not in own_fields:
            refusals += _dependences(prefix + name, value, num_layers)
    if all(section.get(name) is None for name in _COUNTS):
        new["num_hidden_layers"] = len(kept)
    for name, value in family.thresholds.items():
        if name not in section and (threshold := _threshold(value, kept, num_layers)) != value:
            new[name] = threshold
    return new


def _threshold(value: int, kept: Sequence[int], num_layers: int) -> int:
    """The number of kept layers below a threshold.

    Beyond every layer it means none, at any depth; vLLM takes a threshold at the depth for
    something else, and would then serve mixed windows as none.
    """
    return value if value > num_layers else sum(layer < value for layer in kept)


def _write_lists(
    section: Mapping[str, Any],
    new: dict[str, Any],
    kept: Sequence[int],
    num_layers: int,
    family: Family,
) -> None:
    """Write each list that the config class would not derive as the layers are."""
    wanted = {
        name: [values[layer] for layer in kept]
        for name, values in _lists(family, section, num_layers).items()
    }
    bare = {name: value for name, value in new.items() if name not in wanted}
    if _lists(family, bare, len(kept)) != wanted:
        for name, values in wanted.items():
            drafts = (new.get(name) or ())[len(kept) :]
            new[name] = [*values, *drafts]
        for name in family.intervals:
            new.pop(name, None)
    for name, step_field in family.steps.items():
        _write_indices(name, step_field, section, new, kept, num_layers)
    if family.sparse_step:
        step = integer_field(section, "decoder_sparse_step", 1, at_least=1)
        listed = _index_list(section, "mlp_only_layers") or []
        dense = [layer for layer, old in enumerate(kept) if old in listed or (old + 1) % step]
        if listed or step != 1:
            new.update(mlp_only_layers=dense, decoder_sparse_step=1)


def _lists(family: Family, config: Mapping[str, Any], num_layers: int) -> dict[str, list[Any]]:
    """The per-layer lists that a config class has in the end: named, or else derived."""
    found: dict[str, list[Any]] = {}
    for name, rule in family.lists.items():
        named = config.get(name)
        if named and not isinstance(named, list | tuple):
            raise UserError(f"config.json: {name} is {brief(named)}, expected a list")
        found[name] = list(named) if named else rule({**config, **found}, num_layers)
    return found


def _write_indices(
    name: str,
    step_field: str,
    section: Mapping[str, Any],
    new: dict[str, Any],
    kept: Sequence[int],
    num_layers: int,
) -> None:
    """Renumber a list of layers; its step stays or changes where one says the same, or it goes."""
    step = integer_field(section, step_field, 1, at_least=1)
    listed = _index_list(section, name)
    chosen = range(step - 1, num_layers, step) if listed is None else listed
    wanted = [layer for layer, old in enumerate(kept) if old in chosen]
    # A step beyond the last layer says that none is chosen.
    steps = range(1, len(kept) + 2)
    fitting = (s for s in steps if list(range(s - 1, len(kept), s)) == wanted)
    new_step = next(fitting, None)
    if listed is not None or new_step != step:
        new[name] = wanted
    if new_step is None:
        new.pop(step_field, None)
    elif new_step != step:
        new[step_field] = new_step


def _index_list(section: Mapping[str, Any], name: str) -> list[int] | None:
    listed = section.get(name)
    if listed is not None and not isinstance(listed, list | tuple):
        raise UserError(f"config.json: {name} is {brief(listed)}, expected a list")
    return None if listed is None else list(listed)


def _fed_layers_that_go(
    config: Mapping[str, Any], multimodal: Multimodal, kept: Sequence[int]
) -> Iterator[str]:
    """Layers behind which image features enter, and which are not kept in their places."""
    fed = range(_num_fed_layers(config, multimodal))
    if list(kept[: len(fed)]) != list(fed):
        yield (
            f"{multimodal.feeds_first_layers} has {len(fed)} entries: image features enter "
            f"behind layers 0 to {len(fed) - 1}, which must stay"
        )


def _num_fed_layers(config: Mapping[str, Any], multimodal: Multimodal) -> int:
    """How many of the first layers have image features added behind them."""
    if multimodal.feeds_first_layers is None:
        return 0
    value: Any = config
    for name in multimodal.feeds_first_layers.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, list | tuple):
        raise UserError(
            f"config.json: {multimodal.feeds_first_layers} is {brief(value)}, expected a list"
        )
    return len(value)


def _language_part(
    config: Mapping[str, Any],
) -> tuple[Mapping[str, Any], str, Multimodal | None]:
    """The language model's section, its model type, and the multimodal entry that holds it.

    In a multimodal model that is in no family's file, the type is that of the whole model.
    """
    model_type = str(config.get("model_type"))
    if config.get("text_config") is None:
        return config, model_type, None
    section, multimodal = config["text_config"], registry().multimodal.get(model_type)
    if multimodal is None:
        return section, model_type, None
    text_model_type = section.get("model_type") or multimodal.text_model_type
    if not text_model_type:
        raise UserError("config.json: text_config names no model_type; write it there")
    return section, str(text_model_type), multimodal


def _layer_kinds(section: Mapping[str, Any], family: Family, num_layers: int) -> list[Any]:
    """layer_types as named or derived, one for each decoder layer; empty where there are none."""
    kinds = section.get("layer_types") or _lists(family, section, num_layers).get("layer_types")
    return list(kinds[:num_layers]) if isinstance(kinds, list | tuple) else []


def _dependences(name: str, value: Any, num_layers: int) -> Iterator[str]:
    """How a field that is not carried over depends on the layers, or may; nothing: it does not."""
    leaf = re.sub(r"\[\d+\]$", "", name.rpartition(".")[2])
    if leaf in _NOT_PER_LAYER or leaf in _SUB_CONFIGS:
        return
    if value is None or value is False or value in ("", [], (), {}):
        return
    if leaf in _DRAFT_COUNTS and type(value) is int:
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        count_of_none = (0,) if leaf.startswith(("num_", "n_")) else ()
        if value in _REFUSED.get(leaf, count_of_none):
            return
    if leaf in _REFUSED:
        yield f"{name} is {brief(value)}"
    elif _speaks_of_layers(leaf, value):
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


def _speaks_of_layers(name: str, value: Any) -> bool:
    """Whether a field's name says that it may depend on the layers."""
    if not isinstance(value, list | tuple | dict):
        name = _HARMLESS.sub("", name)
    return _SPEAKS_OF_LAYERS.search(name) is not None
