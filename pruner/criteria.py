"""Scores of a layer's importance that need no training: the lowest goes first.

L layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from trsp.pruner.families import decoder_layers, first_tensor
from trsp.pruner.progress import Progress, silent


@torch.no_grad()
def block_influence(
    model: PreTrainedModel, input_ids: Tensor, *, batch_size: int = 4, progress: Progress = silent
) -> list[float]:
    """1 - mean cosine between a layer's input and output, per layer.

    Args:
        input_ids: calibration tokens [N, T].
    Returns:
        L scores in [0, 2].
    Source: ShortGPT, arXiv 2403.03853.
    """
    layers = decoder_layers(model)
    totals = [0.0] * len(layers)
    handles = []
    for index, layer in enumerate(layers):

        def accumulate(
            _module: object, args: tuple[Tensor, ...], output: object, i: int = index
        ) -> None:
            y: Tensor = first_tensor(output)
            cosine = F.cosine_similarity(args[0].float(), y.float(), dim=-1)
            totals[i] += float((1 - cosine).double().sum())

        handles.append(layer.register_forward_hook(accumulate))
    try:
        for start in range(0, len(input_ids), batch_size):
            batch = input_ids[start : start + batch_size].to(model.device)
            model(input_ids=batch, use_cache=False)
            progress("block influence", min(start + batch_size, len(input_ids)), len(input_ids))
    finally:
        for handle in handles:
            handle.remove()
    return [total / input_ids.numel() for total in totals]
