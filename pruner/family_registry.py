"""The model types whose layers can be deleted, and what their config classes derive from depth.

One file a family, family_data/NAME.toml:

    model_types         config.json's model_type, of language models
    refused             why models of these types cannot be pruned; nothing else then
    sparse_step         experts by decoder_sparse_step and mlp_only_layers (Qwen MoE)
    also_intervals      fields that only feed a derived list, beside the rules' own
    default_num_layers  by model type, the number of layers that the class fills in; for those whose
                        text_config on the Hub leaves it out
    thresholds          fields under whose number layers are of one kind, with the number that the
                        class fills in where config.json names none
    [lists.FIELD]       a per-layer list that the class derives: `rule` and its parameters
                        (layer_rules.py), in the order in which they depend on each other
    [indices.FIELD]     a list of layer numbers, derived from the field named `step`
    period_in_vllm      each so-many-th layer has no window in vLLM, whatever layer_types says
    multimodal          model types that hold such a language model in text_config, each with the
                        text model's type where text_config names none ("": it must)
    feeds_first_layers  the multimodal config's field (dotted) with one entry for each of the first
                        layers behind which image features enter: these layers must stay

A type that is in no file has not been checked and is refused.
"""

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from trsp.pruner.layer_rules import RULES, Rule

_FIELDS: Mapping[str, type] = {
    "model_types": list, "refused": str, "sparse_step": bool, "also_intervals": list,
    "default_num_layers": dict, "thresholds": dict, "lists": dict, "indices": dict,
    "multimodal": dict, "feeds_first_layers": str, "period_in_vllm": int,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What depends on the layers in a model type's config.

    Attributes:
        lists: rules of derived per-layer lists by field, in order.
        intervals: fields read only for those lists; removed where they no longer tell the truth.
        default_num_layers: the depth of a text_config that names none, by model type.
        thresholds: what the class has in a threshold that config.json does not name.
        steps: by the field of a list of layer numbers, the interval that it is derived from.
        sparse_step: decoder_sparse_step and mlp_only_layers say which layers have experts.
        period_in_vllm: each so-many-th layer has no window in vLLM; None: it reads layer_types.
        refused: why its models cannot be pruned; None where they can.
    """

    lists: Mapping[str, Rule] = field(default_factory=dict)
    intervals: tuple[str, ...] = ()
    default_num_layers: Mapping[str, int] = field(default_factory=dict)
    thresholds: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, str] = field(default_factory=dict)
    sparse_step: bool = False
    period_in_vllm: int | None = None
    refused: str | None = None

    def own_fields(self) -> set[str]:
        """Fields that the family's entry carries over, by a rule of its own."""
        sparse = {"decoder_sparse_step", "mlp_only_layers"} if self.sparse_step else set()
        return {*self.intervals, *self.steps, *self.steps.values(), *sparse}


@dataclass(frozen=True)
class Multimodal:
    """A model type that holds a language model in text_config.

    Attributes:
        text_model_type: of the text model, where text_config names none; "": it must name one.
        feeds_first_layers: a field (dotted), one entry for each first layer that must stay.
    """

    text_model_type: str
    feeds_first_layers: str | None = None


@dataclass(frozen=True)
class Registry:
    """Every family, by model type."""

    families: Mapping[str, Family]
    multimodal: Mapping[str, Multimodal]

    def supported(self) -> list[str]:
        """The model types of language models that can be pruned, sorted."""
        return sorted(name for name, one in self.families.items() if one.refused is None)


@functools.cache
def registry() -> Registry:
    """The families of family_data/, read once."""
    texts = {
        file.name: file.read_text("utf-8")
        for file in sorted((files("trsp.pruner") / "family_data").iterdir(), key=lambda f: f.name)
        if file.name.endswith(".toml")
    }
    return parse_registry(texts)


def parse_registry(texts: Mapping[str, str]) -> Registry:
    """Read families from TOML by file name.   ValueError: an entry that is not as it must be."""
    families: dict[str, Family] = {}
    multimodal: dict[str, Multimodal] = {}
    for name, text in texts.items():
        try:
            document = tomllib.loads(text)
            family = _family(document)
            for model_type in document["model_types"]:
                if model_type in families:
                    raise ValueError(f"{model_type} is in two files")
                families[model_type] = family
            for model_type, text_model_type in document.get("multimodal", {}).items():
                feeds = document.get("feeds_first_layers")
                multimodal[model_type] = Multimodal(text_model_type, feeds)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{name}: {error}") from error
    for model_type, one in multimodal.items():
        if one.text_model_type and one.text_model_type not in families:
            raise ValueError(f"{model_type}: {one.text_model_type} is in no file")
    return Registry(families, multimodal)


def _family(document: dict[str, Any]) -> Family:
    if unknown := sorted(set(document) - _FIELDS.keys()):
        raise ValueError(f"the field {unknown[0]!r} is unknown")
    for name, value in document.items():
        if not isinstance(value, _FIELDS[name]):
            raise ValueError(f"{name} is {value!r}, expected {_FIELDS[name].__name__}")
    if "feeds_first_layers" in document and "multimodal" not in document:
        raise ValueError("feeds_first_layers is for multimodal types, and there are none")
    if "refused" in document:
        if set(document) != {"model_types", "refused"}:
            raise ValueError("a refused family has model_types and the reason, nothing else")
        return Family(refused=document["refused"])
    lists: dict[str, Rule] = {}
    intervals: list[str] = list(document.get("also_intervals", ()))
    for name, parameters in document.get("lists", {}).items():
        words = dict(parameters)
        rule = words.pop("rule")
        if rule not in RULES:
            raise ValueError(f"the rule {rule!r} is unknown")
        lists[name] = RULES[rule](**words)
        intervals += [words["field"]] if "field" in words else []
    thresholds = document.get("thresholds", {})
    depths = document.get("default_num_layers", {})
    for name, value in [*thresholds.items(), *depths.items()]:
        if type(value) is not int:
            raise ValueError(f"the number of {name!r} is no whole number")
    if unknown := sorted(set(depths) - set(document["model_types"])):
        raise ValueError(f"{unknown[0]!r} is none of model_types")
    return Family(
        lists=lists,
        intervals=tuple(intervals),
        default_num_layers=depths,
        thresholds=thresholds,
        steps={name: entry["step"] for name, entry in document.get("indices", {}).items()},
        sparse_step=document.get("sparse_step", False),
        period_in_vllm=document.get("period_in_vllm"),
    )
