"""Per-layer lists that a config class derives where config.json does not name them.

A family's file (family_data/) names a rule and its parameters; a rule is a function of the config
and its number of layers, as transformers 5.19 has it in the class.

L layers.
"""

from collections.abc import Callable, Mapping
from reprlib import repr as brief
from typing import Any

from trsp.pruner.errors import UserError

Config = Mapping[str, Any]
# The list for a config of L layers; it may read lists that come before it in the family's file.
Rule = Callable[[Config, int], list[Any]]

SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
LINEAR = "linear_attention"


def integer_field(config: Config, name: str, default: int, *, at_least: int) -> int:
    """A field that must be a whole number.   UserError: it is none, or too small."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UserError(f"config.json: {name} is {brief(value)}, expected at least {at_least}")
    return value


def periodic(period: int, field: str | None = None, otherwise: str = SLIDING) -> Rule:
    """Every `period`-th layer attends to everything; `field` of the config may say another one."""

    def rule(config: Config, num_layers: int) -> list[Any]:
        every = period if field is None else integer_field(config, field, period, at_least=1)
        return [otherwise if (layer + 1) % every else FULL for layer in range(num_layers)]

    return rule


def rope(period: int, field: str) -> Rule:
    """1 for a layer with rope, 0 for every `period`-th."""

    def rule(config: Config, num_layers: int) -> list[Any]:
        every = integer_field(config, field, period, at_least=1)
        return [int((layer + 1) % every != 0) for layer in range(num_layers)]

    return rule


def chunked_where_rope() -> Rule:
    """Llama 4: layers with rope attend within chunks."""
    return lambda config, num_layers: [
        CHUNKED if has_rope else FULL for has_rope in config["no_rope_layers"]
    ]


def window_where_no_rope() -> Rule:
    """SmolLM3: layers without rope have a window, if windows are used."""

    def rule(config: Config, num_layers: int) -> list[Any]:
        windows = _uses_windows(config) and config.get("sliding_window") is not None
        return [SLIDING if windows and not rope else FULL for rope in config["no_rope_layers"]]

    return rule


def from_threshold_on(default: int) -> Rule:
    """Qwen2, Qwen3: layers from max_window_layers on have a window, if windows are used."""

    def rule(config: Config, num_layers: int) -> list[Any]:
        windows = _uses_windows(config) and config.get("sliding_window", 4096) is not None
        first = integer_field(config, "max_window_layers", default, at_least=0)
        return [SLIDING if windows and layer >= first else FULL for layer in range(num_layers)]

    return rule


def alternate_below_threshold() -> Rule:
    """Qwen2 MoE: every other layer below max_window_layers has a window, if windows are used."""

    def rule(config: Config, num_layers: int) -> list[Any]:
        windows = _uses_windows(config)
        first = integer_field(config, "max_window_layers", 28, at_least=0)
        return [
            SLIDING if windows and layer < first and layer % 2 == 0 else FULL
            for layer in range(num_layers)
        ]

    return rule


RULES: Mapping[str, Callable[..., Rule]] = {
    rule.__name__: rule
    for rule in (
        periodic, rope, chunked_where_rope, window_where_no_rope, from_threshold_on,
        alternate_below_threshold,
    )
}  # fmt: skip


def _uses_windows(config: Config) -> bool:
    return bool(config.get("use_sliding_window", False))
