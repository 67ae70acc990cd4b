"""The config class that vLLM's DeciLM needs to start: block_configs with attributes.

Imported by `trsp.serving.plugin.register` alone, which makes it known under a model type of ours.
"""

from typing import Any

from transformers import AutoConfig, LlamaConfig

from trsp.pruner.errors import UserError
from trsp.pruner.sublayer_checkpoint import SUBLAYER_MODEL_TYPE

_BRANCHES = ("attention", "ffn")


class Block(dict[str, Any]):
    """A JSON object whose fields can be read as attributes; it still copies and saves as JSON."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class SublayerConfig(LlamaConfig):
    """config.json as `export_sublayers` writes it: Llama's, and what each layer lacks."""

    model_type = SUBLAYER_MODEL_TYPE

    def __post_init__(self, **others: Any) -> None:
        blocks = others.pop("block_configs", None)
        super().__post_init__(**others)  # type: ignore[no-untyped-call]
        # transformers makes one without arguments, to compare with.
        if blocks is not None:
            self.block_configs = _read_blocks(blocks, self.num_hidden_layers)


def register_sublayer_config() -> None:
    """Let transformers, and so vLLM, read configs of this model type."""
    AutoConfig.register(SUBLAYER_MODEL_TYPE, SublayerConfig, exist_ok=True)


def _read_blocks(blocks: Any, num_layers: int) -> list[Block]:
    """UserError where it is not one block for each layer, with both branches' no_op."""
    if not isinstance(blocks, list) or len(blocks) != num_layers:
        raise UserError(
            f"block_configs is not a list of {num_layers} blocks, one for each layer; "
            "export the model again"
        )
    read = []
    for layer, block in enumerate(blocks):
        for branch in _BRANCHES:
            fields = block.get(branch) if isinstance(block, dict) else None
            if not isinstance(fields, dict) or not isinstance(fields.get("no_op"), bool):
                raise UserError(
                    f"block_configs[{layer}].{branch}.no_op is not true or false; "
                    "export the model again"
                )
        read.append(Block({branch: Block(block[branch]) for branch in _BRANCHES}))
    return read
