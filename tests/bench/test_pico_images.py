"""Images enter the pico models, and a layer behind which they enter is needed in its place."""

import pytest
import torch

from trsp.bench.pico_checkpoint import make_pico_model
from trsp.bench.pico_families import MULTIMODAL
from trsp.bench.pico_images import image_inputs


@pytest.mark.parametrize("family", sorted(MULTIMODAL))
@torch.no_grad()
def test_the_image_is_read(family: str) -> None:
    model = make_pico_model(family)
    inputs = image_inputs(model.config)
    assert inputs is not None
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    logits, others = (model(**given, use_cache=False).logits for given in (inputs, other))
    behind = int((inputs["input_ids"][0] > 16).nonzero()[-1]) + 1
    assert not torch.allclose(logits[:, behind:], others[:, behind:], atol=1e-4)
    # What stands before the image has not seen it.
    assert torch.equal(logits[:, :6], others[:, :6])


def test_a_model_of_text_has_none() -> None:
    assert image_inputs(make_pico_model("llama").config) is None
