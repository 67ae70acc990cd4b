"""The weights of the dense checkpoint as those of the pruned one: dropped, renumbered, in a stream.

Names are those in the checkpoint, before vLLM maps them to its modules, so whatever is right for
the folder that `trsp compact` writes is right here: both give vLLM the same names.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trsp.pruner.checkpoint import Checkpoint, contained_file
from trsp.pruner.config_surgery import num_draft_layers
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import LayerMap

Tensor = TypeVar("Tensor")

# As a checkpoint is opened: "01" would be a second name for layer 1.
_LAYER_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class LayerRenumbering:
    """Which tensors of the layer stack stay, and under which name.

    Attributes:
        prefix: what stands before a layer's number, as in "model.layers.".
        kept: source layers, ascending; the position of one is its new number.
        num_source_layers: layers of the dense model.
        num_drafts: layers for drafting that stand behind them, and stay behind the kept ones.
    """

    prefix: str
    kept: tuple[int, ...]
    num_source_layers: int
    num_drafts: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer_map: LayerMap) -> "LayerRenumbering":
        return cls(
            checkpoint.layer_prefix,
            layer_map.kept,
            checkpoint.num_hidden_layers,
            num_draft_layers(checkpoint.config),
        )

    def rename(self, name: str) -> str | None:
        """The tensor's name in the pruned model; None where its layer is dropped.

        A name that does not begin with the prefix is outside the stack and passes as it is.
        Raises:
            UserError: inside the stack, and its number is no source layer.
        """
        if not name.startswith(self.prefix):
            return name
        number, dot, rest = name.removeprefix(self.prefix).partition(".")
        source_layer = int(number) if _LAYER_NUMBER.fullmatch(number) else None
        num_all = self.num_source_layers + self.num_drafts
        if not dot or source_layer is None or source_layer >= num_all:
            raise UserError(
                f"tensor {name!r} is in the layer stack {self.prefix}*, and {number!r} is none of "
                f"its layers 0 to {num_all - 1}; the layer map says nothing of it"
            )
        if source_layer >= self.num_source_layers:
            return f"{self.prefix}{source_layer - self.num_source_layers + len(self.kept)}.{rest}"
        if source_layer not in self.kept:
            return None
        return f"{self.prefix}{self.kept.index(source_layer)}.{rest}"

    def apply(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The (name, tensor) pairs that stay, renamed, in the order they come.

        Raises:
            UserError: as `rename`.
        """
        for name, tensor in stream:
            new_name = self.rename(name)
            if new_name is not None:
                yield new_name, tensor


def needed_files(checkpoint: Checkpoint, renumbering: LayerRenumbering) -> Sequence[Path]:
    """The shards that hold anything that stays, sorted by name.

    Raises:
        UserError: a shard is gone or a link out of the folder; or as `rename`.
    """
    names = {
        entry.shard
        for entry in checkpoint.tensors.values()
        if renumbering.rename(entry.name) is not None
    }
    return [contained_file(checkpoint.path, name) for name in sorted(names)]
