"""LaCo's merge and ReplaceMe's fold against merges and maps made by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from trsp.bench.baseline_merge import laco_merge, replace_me
from trsp.pruner.activations import residual_stream, watching
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.gated_model import GatedModel

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def random_llama(num_layers: int, *, mlp_bias: bool = False) -> PreTrainedModel:
    model = build(
        LlamaConfig(**SHAPE, num_hidden_layers=num_layers, initializer_range=0.1, mlp_bias=mlp_bias)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases start equal in all layers: nothing could be seen of their merge.
            if "layernorm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def merged_by_hand(model: PreTrainedModel, base: int, others: list[int]) -> PreTrainedModel:
    """A copy with `others` merged into `base` and taken out of the list of layers."""
    shallow = copy.deepcopy(model)
    for name, parameter in shallow.model.layers[base].named_parameters():
        own = model.model.layers[base].get_parameter(name)
        difference = torch.zeros_like(own)
        for other in others:
            difference += model.model.layers[other].get_parameter(name) - own
        parameter.copy_(own + difference)
    kept = [layer for index, layer in enumerate(shallow.model.layers) if index not in others]
    shallow.model.layers = nn.ModuleList(kept)
    shallow.config.num_hidden_layers = len(kept)
    return shallow


@torch.no_grad()
def similarity(model: PreTrainedModel, dense: PreTrainedModel, tokens: Tensor) -> float:
    mine = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    theirs = dense.model(input_ids=tokens, use_cache=False).last_hidden_state
    return float(F.cosine_similarity(mine.flatten(1), theirs.flatten(1), dim=-1).mean())


@torch.no_grad()
def masked_logits(gated: GatedModel, tokens: Tensor, removed: tuple[int, ...]) -> Tensor:
    with gated.masking(removed):
        return gated.logits(tokens)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_laco_takes_the_merges_that_change_the_end_least(number: int, tokens: Tensor) -> None:
    model = random_llama(8)
    dense = copy.deepcopy(model)
    expected, left = copy.deepcopy(model), number
    alive, gone = list(range(8)), []
    while left:
        merged = min(3, left)
        candidates = [
            merged_by_hand(expected, base, list(range(base + 1, base + 1 + merged)))
            for base in range(len(alive) - merged)
        ]
        scores = [similarity(candidate, dense, tokens) for candidate in candidates]
        best = scores.index(max(scores))
        expected = candidates[best]
        gone += alive[best + 1 : best + 1 + merged]
        alive = alive[: best + 1] + alive[best + 1 + merged :]
        left -= merged
    with GatedModel(model) as gated:
        removed = laco_merge(gated, tokens, num_to_remove=number)
        logits = masked_logits(gated, tokens, removed)
    assert removed == tuple(gone)
    for layer, by_hand in zip(alive, expected.model.layers, strict=True):
        for name, parameter in model.model.layers[layer].named_parameters():
            torch.testing.assert_close(parameter, by_hand.get_parameter(name))
    for layer in removed:
        for name, parameter in model.model.layers[layer].named_parameters():
            own = dense.model.layers[layer].get_parameter(name)
            assert torch.equal(parameter, own) or len(gone) > 3, "a merged layer may go later"
    with torch.no_grad():
        torch.testing.assert_close(
            logits, expected(input_ids=tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )


def test_a_merge_of_two_layers_drops_the_first(tokens: Tensor) -> None:
    model = random_llama(6)
    dense = copy.deepcopy(model)
    with GatedModel(model) as gated:
        (gone,) = laco_merge(gated, tokens, num_to_remove=1)
    for name, parameter in model.model.layers[gone - 1].named_parameters():
        torch.testing.assert_close(parameter, dense.model.layers[gone].get_parameter(name))


def test_laco_refuses_layers_of_two_kinds_and_breaks_on_nan(tokens: Tensor) -> None:
    model = random_llama(4)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    before = copy.deepcopy(model).state_dict()
    with GatedModel(model) as gated, pytest.raises(RunError, match="similarity"):
        laco_merge(gated, tokens, num_to_remove=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name
    model.model.layers[3].self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))
    with GatedModel(model) as gated, pytest.raises(UserError, match="layer 3 has other"):
        laco_merge(gated, tokens, num_to_remove=1)


@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize(("before", "length"), [(0, 1), (2, 1), (2, 3), (6, 1)])
def test_replace_me_finds_a_block_that_is_a_linear_map(
    before: int, length: int, mlp_bias: bool, tokens: Tensor
) -> None:
    """The block's output is made to be Y + M T: then the fold must lose nothing."""
    model = random_llama(8, mlp_bias=mlp_bias)
    untouched = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    transform = torch.eye(32) + 0.02 * torch.randn(32, 32, generator=generator)
    seen: dict[str, Tensor] = {}
    layers = model.model.layers
    last = before + length

    def keep_mlp(_module: object, _args: object, output: Tensor) -> None:
        seen["mlp"] = output

    def keep_output(_module: object, _args: object, output: Tensor) -> None:
        seen["output"] = output

    def put(_module: object, _args: object, _output: Tensor) -> Tensor:
        return seen["output"] - seen["mlp"] + seen["mlp"] @ transform

    hooks = [
        layers[before].mlp.register_forward_hook(keep_mlp),
        layers[before].register_forward_hook(keep_output),
        layers[last].register_forward_hook(put),
    ]
    with GatedModel(model) as gated:
        expected = masked_logits(gated, tokens, ())
        removed = replace_me(gated, tokens, num_to_remove=length)
        for hook in hooks:
            hook.remove()
        folded = masked_logits(gated, tokens, removed)
        deleted = masked_logits(GatedModel(untouched).__enter__(), tokens, removed)
    assert removed == tuple(range(last, before, -1))
    torch.testing.assert_close(folded, expected, rtol=1e-3, atol=1e-3)
    assert (deleted - expected).abs().max() > 0.02
    changed = {f"model.layers.{before}.mlp.down_proj.weight"}
    if mlp_bias:
        changed.add(f"model.layers.{before}.mlp.down_proj.bias")
    own = untouched.state_dict()
    assert {name for name, value in model.state_dict().items() if not value.equal(own[name])} == (
        changed
    )


def test_replace_me_never_takes_the_first_layer(tokens: Tensor) -> None:
    model = random_llama(6)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    with GatedModel(model) as gated:
        assert 0 not in replace_me(gated, tokens, num_to_remove=1)
        assert replace_me(gated, tokens, num_to_remove=5) == (5, 4, 3, 2, 1)


def test_replace_me_is_the_least_squares_solution(tokens: Tensor) -> None:
    model = random_llama(6)
    dense = copy.deepcopy(model)
    with GatedModel(model) as gated:
        removed = replace_me(gated, tokens, num_to_remove=2)
    before, last = min(removed) - 1, max(removed)
    made: dict[str, Tensor] = {}
    for name, module in (
        ("mlp", dense.model.layers[before].mlp),
        ("start", dense.model.layers[before]),
        ("end", dense.model.layers[last]),
    ):
        module.register_forward_hook(
            lambda _m, _a, output, name=name: made.update({name: output.flatten(0, 1).double()})
        )
    with torch.no_grad():
        dense(input_ids=tokens, use_cache=False)
        target = made["end"] - made["start"] + made["mlp"]
        transform = torch.linalg.lstsq(made["mlp"], target).solution
        weight = dense.model.layers[before].mlp.down_proj.weight.double()
    folded = model.model.layers[before].mlp.down_proj.weight.double()
    torch.testing.assert_close(folded, transform.T @ weight, rtol=1e-3, atol=1e-3)


def test_replace_me_folds_into_a_bare_projection_with_a_bias(tokens: Tensor) -> None:
    model = build(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.0,
        )
    )
    before = copy.deepcopy(model).state_dict()
    with GatedModel(model) as gated:
        removed = replace_me(gated, tokens, num_to_remove=1)
    layer = f"model.decoder.layers.{removed[0] - 1}.fc2"
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    # Biases start at zero, and T of zero is zero.
    assert changed == {f"{layer}.weight"}


def test_replace_me_folds_into_gpt2_whose_projections_are_transposed(tokens: Tensor) -> None:
    model = build(GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=64))
    with torch.no_grad():
        for name, parameter in model.transformer.h.named_parameters():
            if "ln_" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    dense = copy.deepcopy(model)
    with GatedModel(model) as gated:
        (removed,) = replace_me(gated, tokens, num_to_remove=1)
    before = dense.transformer.h[removed - 1]
    with GatedModel(dense) as gated, watching([before.mlp.c_proj]) as seen:
        stream = residual_stream(gated, tokens)
    mlp = seen.outputs[before.mlp.c_proj].flatten(0, 1).double()
    target = (stream[removed + 1] - stream[removed]).flatten(0, 1).double() + mlp
    transform = torch.linalg.lstsq(mlp, target).solution
    folded = model.transformer.h[removed - 1].mlp.c_proj
    # y = x W + b, so the map stands behind both.
    for ours, theirs in zip(folded.parameters(), before.mlp.c_proj.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double() @ transform, rtol=1e-3, atol=1e-3)


def test_replace_me_refuses_a_norm_behind_the_mlp(tokens: Tensor) -> None:
    model = build(Gemma2Config(**SHAPE, num_hidden_layers=3, head_dim=8, sliding_window=8))
    before = copy.deepcopy(model).state_dict()
    with GatedModel(model) as gated, pytest.raises(UserError, match="linear projection"):
        replace_me(gated, tokens, num_to_remove=1)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", [laco_merge, replace_me])
@pytest.mark.parametrize("number", [0, 4])
def test_a_number_of_layers_that_cannot_go_is_refused(
    method: object, number: int, tokens: Tensor
) -> None:
    with GatedModel(random_llama(4)) as gated, pytest.raises(UserError, match="expected 1 to 3"):
        method(gated, tokens, num_to_remove=number)
