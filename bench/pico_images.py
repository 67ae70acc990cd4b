"""What a pico multimodal model reads beside text: one or two random images and their places.

P pixels of a side, T tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

_BEFORE, _BEHIND = list(range(3, 9)), list(range(9, 15))
_GRID = [1, 4, 4]


def image_inputs(config: PreTrainedConfig) -> dict[str, Tensor] | None:
    """Arguments of a forward pass over text with images in it; None for a model of text alone.

    Args:
        config: of a model of pico_families.MULTIMODAL, or of any other.
    Raises:
        KeyError: nobody has said how this multimodal model takes images.
    """
    if not hasattr(config, "vision_config"):
        return None
    return _INPUTS[config.model_type](config)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _tokens(*images: list[int]) -> Tensor:
    return torch.tensor([[*_BEFORE, *(token for image in images for token in image), *_BEHIND]])


def _four_tokens(config: Any) -> dict[str, Tensor]:
    """LLaVA: the patches of one image, 2 by 2."""
    size = config.vision_config.image_size
    return {
        "input_ids": _tokens([config.image_token_id] * 4),
        "pixel_values": _random(1, 3, size, size),
    }


def _attending_both_ways(config: Any) -> dict[str, Tensor]:
    """Gemma 3: tokens of an image see each other."""
    inputs = _four_tokens(config)
    is_image = inputs["input_ids"] == config.image_token_id
    return {**inputs, "token_type_ids": is_image.int()}


def _one_token(config: Any) -> dict[str, Tensor]:
    """Llama 4: 2 by 2 patches shuffled into one token."""
    size = config.vision_config.image_size
    return {
        "input_ids": _tokens([config.image_token_id]),
        "pixel_values": _random(1, 3, size, size),
    }


def _of_any_size(config: Any) -> dict[str, Tensor]:
    """Mistral 3: two images, 2 by 2 patches merged into one token each."""
    size = config.vision_config.image_size
    return {
        "input_ids": _tokens([config.image_token_id] * 2),
        "pixel_values": _random(2, 3, size, size),
        "image_sizes": torch.tensor([[size, size]] * 2),
    }


def _patches(config: Any) -> dict[str, Tensor]:
    """Qwen-VL: patches in a row with the grid they come from, merged into tokens."""
    vision = config.vision_config
    num_patches = _GRID[0] * _GRID[1] * _GRID[2]
    num_tokens = num_patches // vision.spatial_merge_size**2
    image = [config.image_token_id] * num_tokens
    tokens = _tokens([config.vision_start_token_id], image, [config.vision_end_token_id])
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": tokens,
        "pixel_values": _random(num_patches, width),
        "image_grid_thw": torch.tensor([_GRID]),
        "mm_token_type_ids": (tokens == config.image_token_id).int(),
    }


_INPUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "gemma3": _attending_both_ways,
    "llama4": _one_token,
    "llava": _four_tokens,
    "mistral3": _of_any_size,
    "qwen2_5_vl": _patches,
    "qwen3_vl": _patches,
}
