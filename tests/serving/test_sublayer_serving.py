"""vLLM serves a model without some single branches as the masked model computes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# fp32 in both, in another order of summation: 4e-6 was the most seen.
LOGPROB_TOLERANCE = 1e-4
REMOVALS = [5, (2, "mlp"), (3, "attention"), (6, "attention"), (7, "mlp")]


@pytest.fixture(scope="module", params=["untied", "tied"])
def exported(
    request: pytest.FixtureRequest, pico: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The dense checkpoint and its export."""
    from trsp.pruner.checkpoint import open_checkpoint
    from trsp.pruner.layer_map import BaseModel, LayerMap
    from trsp.pruner.sublayer_checkpoint import export_sublayers

    folder = tmp_path_factory.mktemp("sublayers")
    dense = pico("llama").dense
    if request.param == "tied":
        dense = tie(dense, folder / "dense")
    checkpoint = open_checkpoint(dense)
    base = BaseModel("llama", 8, checkpoint.fingerprint)
    chosen = LayerMap.from_removals(base, REMOVALS)
    return dense, export_sublayers(checkpoint, chosen, folder / "exported")


def tie(dense: Path, folder: Path) -> Path:
    """The same layers with a tied head, the rope of Llama 3 and biases, in one file."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = json.loads((dense / "config.json").read_text())
    config.update(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    config["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
            elif "embed_tokens" in name:
                parameter.mul_(0.2)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def masked_greedy(dense: Path, removals: list[Any], prompts: list[list[int]], count: int) -> Any:
    """Greedy tokens and their log-probabilities of the dense model with these removals masked."""
    from transformers import AutoModelForCausalLM

    from trsp.pruner.gated_model import GatedModel
    from trsp.pruner.sublayers import find_sublayers, masking_sublayers

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    parts = [removal for removal in removals if isinstance(removal, tuple)]
    whole = [removal for removal in removals if isinstance(removal, int)]
    tokens: list[list[int]] = []
    logprobs: list[list[float]] = []
    sublayers = find_sublayers(model)
    with GatedModel(model) as gated, masking_sublayers(model, sublayers, parts):
        for prompt in prompts:
            ids, chosen = list(prompt), []
            for _ in range(count):
                with gated.masking(whole):
                    scores = gated.logits(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
                ids.append(int(scores.argmax()))
                chosen.append(scores[ids[-1]].item())
            tokens.append(ids[len(prompt) :])
            logprobs.append(chosen)
    return tokens, logprobs


def test_vllm_computes_the_masked_model(
    exported: tuple[Path, Path], serve: Any, prompts: list[list[int]]
) -> None:
    dense, folder = exported
    served = serve(folder)
    tokens, logprobs = masked_greedy(dense, REMOVALS, prompts, len(served.tokens[0]))
    assert served.num_layers == 7
    assert served.largest_difference(type(served)(tokens, logprobs, 7)) < LOGPROB_TOLERANCE
    # The comparison would see a branch that is still there, or another one that is not.
    for other in (REMOVALS[:-1], [*REMOVALS[:-1], (1, "mlp")]):
        wrong, _ = masked_greedy(dense, other, prompts, len(served.tokens[0]))
        assert all(ours != theirs for ours, theirs in zip(served.tokens, wrong, strict=True))


@pytest.mark.parametrize("exported", ["untied"], indirect=True)
def test_stock_vllm_does_not_know_the_model(
    exported: tuple[Path, Path],
    engine_host: Any,
    vllm_environment: dict[str, str],
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    """Why the plugin is needed: without it no vLLM gets as far as the weights."""
    host = type(engine_host)(tmp_path / "log", {**vllm_environment, "VLLM_PLUGINS": ""})
    job = {"model": str(exported[1]), "prompts": prompts, "max_new_tokens": 1, "options": {}}
    try:
        answer = host.ask({**job, "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}})
    finally:
        host.close()
    assert "model type `trsp_sublayers`" in answer["error"]
