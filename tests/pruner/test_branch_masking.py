"""Leaving out one branch of a layer: against models written by hand, and who refuses."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp.bench.pico_checkpoint import make_pico_model
from trsp.bench.pico_families import VOCAB_SIZE
from trsp.pruner import sublayers as sublayers_module
from trsp.pruner.errors import UserError
from trsp.pruner.families import decoder_layers
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.losses import language_model_loss
from trsp.pruner.sublayers import find_sublayers, masking_sublayers, removal_loss

MISSING = [(0, "attention"), (2, "mlp"), (3, "mlp"), (6, "attention")]


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(0))


def by_hand(model: PreTrainedModel, input_ids: Tensor, missing: set[tuple[int, str]]) -> Tensor:
    """Logits of a Llama-shaped model whose layers leave out branches, without any hook."""
    inner = model.model
    length = input_ids.shape[1]
    hidden = inner.embed_tokens(input_ids)
    positions = torch.arange(length).unsqueeze(0)
    # transformers hands SDPA no mask where causal order says it all.
    rotary = inner.rotary_emb(hidden, positions)
    for index, layer in enumerate(inner.layers):
        if (index, "attention") not in missing:
            normed = layer.input_layernorm(hidden)
            hidden = (
                hidden
                + layer.self_attn(
                    hidden_states=normed, position_embeddings=rotary, attention_mask=None
                )[0]
            )
        if (index, "mlp") not in missing:
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits: Tensor = model.lm_head(inner.norm(hidden))
    return logits


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_masked_is_the_model_without_the_branches(name: str) -> None:
    model, input_ids = make_pico_model(name), tokens(2, 12)
    sublayers = find_sublayers(model)
    dense = model(input_ids=input_ids, use_cache=False).logits
    with masking_sublayers(model, sublayers, MISSING):
        masked = model(input_ids=input_ids, use_cache=False).logits
    assert torch.equal(masked, by_hand(model, input_ids, set(MISSING)))
    assert not torch.equal(masked, dense)
    assert torch.equal(model(input_ids=input_ids, use_cache=False).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["llama", "mixtral", "qwen3_next", "gemma2", "opt", "gpt2", "llama4_text", "glm4"]
)
def test_both_branches_are_the_layer(name: str) -> None:
    """Each branch changes the model by itself, and without both the layer is not there."""
    model, input_ids = make_pico_model(name), tokens(2, 12)
    sublayers = find_sublayers(model)
    with GatedModel(model) as gated:
        logits = {}
        for parts in ([], ["attention"], ["mlp"], ["attention", "mlp"]):
            with masking_sublayers(model, sublayers, [(3, part) for part in parts]):
                logits[len(parts), *parts] = gated.logits(input_ids)
        with gated.masking([3]):
            skipped = gated.logits(input_ids)
    assert torch.equal(logits[2, "attention", "mlp"], skipped)
    alone = [logits[0,], logits[1, "attention"], logits[1, "mlp"], skipped]
    assert all(not torch.equal(a, b) for n, a in enumerate(alone) for b in alone[:n])


@torch.no_grad()
def test_loss_without_layers_and_branches() -> None:
    model, input_ids = make_pico_model("llama"), tokens(4, 12)
    gone = {(5, "attention"), (5, "mlp"), (2, "mlp"), (6, "attention")}
    expected = float(language_model_loss(by_hand(model, input_ids, gone), input_ids))
    with GatedModel(model) as gated:
        removals = [5, (2, "mlp"), (6, "attention")]
        loss = removal_loss(gated, find_sublayers(model), input_ids, removals, batch_size=2)
        assert loss == pytest.approx(expected, rel=1e-6)
        dense = removal_loss(gated, find_sublayers(model), input_ids, [], batch_size=2)
    assert abs(dense - expected) > 1e-4


@torch.no_grad()
def test_a_watched_branch_is_seen_masked() -> None:
    """Gates form their output from the branches that they watch: zeros must be what they see."""
    model, input_ids = make_pico_model("llama"), tokens(2, 12)
    sublayers = find_sublayers(model)
    with GatedModel(model) as gated, masking_sublayers(model, sublayers, [(3, "mlp")]):
        plain = gated.logits(input_ids)
        gated.gates, gated.gated = torch.ones(gated.num_layers), frozenset({3})
        assert torch.allclose(gated.logits(input_ids), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt_neox", "not its input plus two branches"),
        ("gptj", "not its input plus two branches"),
        ("falcon", "not its input plus two branches"),
        ("phi", "not its input plus two branches"),
        ("gemma3n_text", "not its input plus two branches"),
        ("granite", "not its input plus two branches"),
        ("cohere2", "attention and MLP side by side"),
    ],
)
def test_what_has_no_branch_to_remove_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^layer 0 .*{message}.*remove whole layers"):
        find_sublayers(make_pico_model(name))


def test_a_shared_branch_is_refused() -> None:
    model = make_pico_model("llama")
    layers = decoder_layers(model)
    layers[4].mlp = layers[1].mlp
    with pytest.raises(UserError, match=r"layer 1 .* two branches of its own"):
        find_sublayers(model)


def test_branches_that_add_nothing_are_branches() -> None:
    """As in layers inserted into a trained model, whose last projections begin at 0."""
    model = make_pico_model("llama")
    for layer in (2, 5):
        torch.nn.init.zeros_(decoder_layers(model)[layer].self_attn.o_proj.weight)
    for layer in (1, 5):
        torch.nn.init.zeros_(decoder_layers(model)[layer].mlp.down_proj.weight)
    assert len(find_sublayers(model)) == 8


@pytest.mark.parametrize("removal", [(8, "mlp"), (-1, "mlp"), (1, "norm")])
def test_no_such_branch_leaves_no_hook(removal: tuple[int, str]) -> None:
    model = make_pico_model("llama")
    sublayers = find_sublayers(model)
    masking = masking_sublayers(model, sublayers, [(0, "mlp"), removal])
    with pytest.raises(UserError, match="expected attention or mlp of a layer 0 to 7"), masking:
        pass
    assert not any(module._forward_hooks for module in model.modules())


def test_finding_leaves_no_hook() -> None:
    model = make_pico_model("llama").train()
    find_sublayers(model)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_the_probe_is_what_tells_parallel_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: without the second run of each layer, cohere2 would pass."""
    monkeypatch.setattr(
        sublayers_module, "_mlp_reads_attention", lambda model, layers, found: [True] * len(layers)
    )
    assert len(find_sublayers(make_pico_model("cohere2"))) == 8
