"""GatedModel: the patched layers are the model's own, scaled, skipped and measured exactly."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from trsp.bench.pico_checkpoint import make_pico_model
from trsp.bench.pico_families import PICO_CONFIGS
from trsp.pruner import gated_model as gated_model_module
from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.errors import UserError
from trsp.pruner.families import (
    count_side_results,
    decoder_layers,
    find_branches,
    with_side_results,
)
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.next_norms import find_next_norms
from trsp.pruner.recipe import FuseNorms

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {**SHAPE, "head_dim": 16, "sliding_window": 8}
FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig(**SHAPE), "self_attn", "mlp"),
    "mistral": (MistralConfig(**SHAPE), "self_attn", "mlp"),
    "qwen2": (Qwen2Config(**SHAPE), "self_attn", "mlp"),
    "qwen3": (Qwen3Config(**SHAPE, head_dim=16), "self_attn", "mlp"),
    "phi3": (Phi3Config(**SHAPE), "self_attn", "mlp"),
    "gemma2": (Gemma2Config(**GEMMA), "post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": (Gemma3TextConfig(**GEMMA), "post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": (
        GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=2, n_positions=64),
        "attn",
        "mlp",
    ),
    "opt": (
        OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=32,
        ),
        "self_attn",
        "fc2",
    ),
}  # fmt: skip


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(FAMILIES[family][0]), dtype=dtype
    )
    with torch.no_grad():  # larger than at initialization, so that every layer does something
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model.eval()


TOKENS = torch.arange(40).remainder(60).view(2, 20) + 3


@pytest.fixture
def model() -> PreTrainedModel:
    return build("llama")


def without_layers(model: PreTrainedModel, dropped: set[int]) -> Tensor:
    """Logits with the layers really taken out of the module list."""
    layers = decoder_layers(model)
    name = next(name for name, module in model.named_modules() if module is layers)
    parent, _, attribute = name.rpartition(".")
    kept = nn.ModuleList(layer for index, layer in enumerate(layers) if index not in dropped)
    setattr(model.get_submodule(parent), attribute, kept)
    count, types = model.config.num_hidden_layers, getattr(model.config, "layer_types", None)
    model.config.num_hidden_layers = len(kept)
    if types:
        model.config.layer_types = [t for index, t in enumerate(types) if index not in dropped]
    logits: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    setattr(model.get_submodule(parent), attribute, layers)
    model.config.num_hidden_layers = count
    if types:
        model.config.layer_types = types
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_are_found_from_structure(family: str) -> None:
    for branches in find_branches(build(family)):
        assert branches is not None
        assert (branches.attention, branches.mlp) == FAMILIES[family][1:]


@pytest.mark.parametrize("fuse_norms", ["off", "on"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_gate_1_is_the_model_and_gate_0_the_model_without_the_layer(
    family: str, dtype: torch.dtype, fuse_norms: FuseNorms
) -> None:
    model = build(family, dtype)
    dense = model(input_ids=TOKENS, use_cache=False).logits
    shallow = without_layers(model, {1})
    assert not torch.equal(dense, shallow)
    with GatedModel(model, fuse_norms=fuse_norms) as gated:
        gated.gated = gated.measured = frozenset({0, 1, 2})
        gated.gates = torch.ones(3)
        assert torch.equal(gated.logits(TOKENS), dense)
        gated.gates = torch.tensor([1.0, 0.0, 1.0])
        assert torch.equal(gated.logits(TOKENS), shallow)
        with gated.masking({1}):
            assert torch.equal(gated.logits(TOKENS), shallow)
    assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, dense), "left as it was"


def test_a_layer_without_plain_branches_goes_through_the_difference_op() -> None:
    """OPT-350m normalises after each residual add: its output is not x + a + m."""
    config = copy.deepcopy(FAMILIES["opt"][0])
    config.do_layer_norm_before = False
    model = AutoModelForCausalLM.from_config(config).eval()
    assert find_branches(model) == (None, None, None)
    with torch.no_grad(), GatedModel(model) as gated:
        dense = gated.logits(TOKENS)
        gated.gated = gated.measured = frozenset({1})
        gated.gates = torch.ones(3)
        torch.testing.assert_close(gated.logits(TOKENS), dense, rtol=0, atol=1e-6)
        gated.gates = torch.zeros(3)
        closed = gated.logits(TOKENS)
        assert float(gated.differences[1].relative()) > 0
    torch.testing.assert_close(closed, without_layers(model, {1}), rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
@torch.no_grad()
def test_difference_norms_are_those_of_layer_input_and_output(
    model: PreTrainedModel, norm: str
) -> None:
    seen: dict[str, Tensor] = {}

    def watch(_m: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x"], seen["y"] = args[0], output

    handle = decoder_layers(model)[1].register_forward_hook(watch)
    model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    order = 1 if norm == "l1" else 2
    power = 2 if norm == "l2_squared" else 1
    expected_d = torch.linalg.vector_norm(seen["y"] - seen["x"], order, dim=-1) ** power
    expected_x = torch.linalg.vector_norm(seen["x"], order, dim=-1) ** power
    with GatedModel(model, norm=norm) as gated:  # type: ignore[arg-type]
        gated.measured = frozenset({1})
        gated.logits(TOKENS)
        difference = gated.differences[1]
        torch.testing.assert_close(difference.difference, expected_d, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(difference.reference, expected_x, rtol=1e-5, atol=1e-5)
        assert set(gated.differences) == {1}
        torch.testing.assert_close(difference.relative(), (expected_d / expected_x).mean())


def test_activation_checkpointing_changes_no_gradient(model: PreTrainedModel) -> None:
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        gates = torch.full((3,), 0.5, requires_grad=True)
        with GatedModel(model, checkpoint_activations=checkpointing) as gated:
            gated.gates, gated.gated = gates, frozenset({1, 2})
            gated.measured = frozenset({2})
            logits = gated.logits(TOKENS)
            penalty = gated.differences[2].relative()
            assert penalty.requires_grad
            (logits.float().square().mean() + penalty).backward()
        assert gates.grad is not None
        gradients.append([gates.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "convention"),
    [("llama", "llama"), ("qwen3", "llama"), ("phi3", "llama"), ("gemma2", "gemma"),
     ("gemma3", "gemma"), ("gpt2", None), ("opt", None)],
)  # fmt: skip
def test_next_norms_are_found_by_what_they_compute(family: str, convention: str | None) -> None:
    model = build(family)
    found = find_next_norms(model)
    assert [norm and norm.convention for norm in found] == [convention] * 4
    if convention:
        layers = decoder_layers(model)
        assert [norm and norm.module for norm in found[:3]] == [x.input_layernorm for x in layers]
        assert found[3] is not None
        assert found[3].module is model.model.norm


def test_a_norm_that_computes_something_else_is_left_alone(model: PreTrainedModel) -> None:
    """At its own weight, all ones, 2 * w is 1 + w."""

    class Doubled(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(norm.get_parameter("weight").detach()), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    layer: Any = decoder_layers(model)[1]
    layer.input_layernorm = Doubled(layer.input_layernorm)
    layers: Any = decoder_layers(model)
    plain = type(layers[2].input_layernorm).forward

    def with_another_eps(x: Tensor) -> Tensor:
        layers[2].input_layernorm.variance_epsilon = 1e-5
        y: Tensor = plain(layers[2].input_layernorm, x)
        layers[2].input_layernorm.variance_epsilon = 1e-6
        return y

    layers[2].input_layernorm.forward = with_another_eps
    assert [norm is None for norm in find_next_norms(model)] == [False, True, True, False]


def gradients_of_a_step(model: PreTrainedModel, fuse_norms: FuseNorms) -> list[Tensor]:
    """Of a loss on the logits and a norm, with a skipped layer between gate and next norm."""
    model.zero_grad()
    gates = torch.full((3,), 0.5, requires_grad=True)
    with GatedModel(model, fuse_norms=fuse_norms) as gated:
        gated.gates, gated.gated, gated.measured = gates, frozenset({0, 2}), frozenset({0, 2})
        gated.skipped = frozenset({1})
        loss = gated.logits(TOKENS).float().square().mean()
        for difference in gated.differences.values():
            loss = loss + difference.relative()
        loss.backward()
    assert gates.grad is not None
    return [gates.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_fused_norms_change_no_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    plain = gradients_of_a_step(model, "off")
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return fused(*args, **kwargs)

    fused = gated_model_module.gated_branch_rmsnorm
    monkeypatch.setattr(gated_model_module, "gated_branch_rmsnorm", counted)
    together = gradients_of_a_step(model, "on")
    # Layer 0 with the norm of layer 2, layer 2 with the final norm.
    final = find_next_norms(model)
    assert [
        args[4] is norm.weight for args, norm in zip(calls, final[2:], strict=True) if norm
    ] == [
        True,
        True,
    ]
    assert len(plain) == len(together) > 10
    for one, other in zip(plain, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_norm_called_on_another_tensor_computes_its_own(model: PreTrainedModel) -> None:
    """Somebody rescales the hidden states between two layers: what is ready must not be used."""
    layer = decoder_layers(model)[1]
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    dense = model(input_ids=TOKENS, use_cache=False).logits
    with GatedModel(model, fuse_norms="on") as gated:
        gated.gated, gated.gates = frozenset({0}), torch.ones(3)
        assert torch.equal(gated.logits(TOKENS), dense)


def test_a_norm_shared_by_two_layers_is_restored(model: PreTrainedModel) -> None:
    layers: Any = decoder_layers(model)
    layers[2].input_layernorm = layers[1].input_layernorm
    with GatedModel(model, fuse_norms="on") as gated:
        gated.gated, gated.gates = frozenset({0, 1}), torch.ones(3)
        gated.logits(TOKENS)
    assert not any("forward" in vars(module) for module in model.modules())


def test_fused_norms_are_refused_with_checkpointing(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="choose 'auto' or 'off'"):
        GatedModel(model, fuse_norms="on", checkpoint_activations=True)
    assert set(GatedModel(model, checkpoint_activations=True).next_norms) == {None}


def test_gate_gradient_is_that_of_finite_differences(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    gates = torch.tensor([1.0, 0.7, 1.0], requires_grad=True)
    with GatedModel(model.double()) as gated:
        gated.gated = frozenset({1})

        def loss(value: float) -> Tensor:
            gated.gates = torch.tensor([1.0, value, 1.0])
            return gated.logits(TOKENS).square().mean()

        gated.gates = gates
        gated.logits(TOKENS).square().mean().backward()
        step = 1e-3
        numeric = (loss(0.7 + step) - loss(0.7 - step)) / (2 * step)
    assert gates.grad is not None
    assert gates.grad[0] == 0
    assert gates.grad[2] == 0
    assert float(gates.grad[1]) == pytest.approx(float(numeric), rel=1e-3)


def test_the_model_is_restored_after_an_error(pico_llama: Path) -> None:
    model = load_model(open_checkpoint(pico_llama))
    model.train()

    def fail() -> None:
        with GatedModel(model):
            assert not model.training
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail()
    assert model.training
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))
    assert not any(module._forward_hooks for module in model.modules())
    assert AutoConfig.from_pretrained(pico_llama).num_hidden_layers == 6


@pytest.mark.parametrize("family", ["gptj", "falcon"])
def test_layers_with_side_results_are_skipped_without_them(family: str) -> None:
    model = make_pico_model(family)
    assert set(count_side_results(model)) == {1}
    shallow = without_layers(model, {1, 4})
    dense = model(input_ids=TOKENS, use_cache=False).logits
    with torch.no_grad(), GatedModel(model) as gated:
        with gated.masking({1, 4}):
            assert torch.equal(gated.logits(TOKENS), shallow)
        gated.gated = gated.measured = frozenset({1, 4})
        gated.gates = torch.ones(gated.num_layers)
        torch.testing.assert_close(gated.logits(TOKENS), dense, rtol=0, atol=2e-6)
        assert float(gated.differences[1].relative()) > 0
        gated.gates[[1, 4]] = 0.0
        torch.testing.assert_close(gated.logits(TOKENS), shallow, rtol=0, atol=2e-6)


class ReadingBlock:
    """A layer of a model that does something with what it returns."""

    def __init__(self, layer: nn.Module, read: Callable[[Any], Any]) -> None:
        self.layer, self.read = layer, read

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.read(self.layer(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class ReadingList(nn.ModuleList):
    def __iter__(self) -> Any:
        self.seen: list[Any] = []

        def remember(output: Any) -> Any:
            self.seen.append(output[1])
            return output

        return (ReadingBlock(layer, remember) for layer in super().__iter__())


@pytest.mark.parametrize("forgiving", [True, False])
def test_side_results_that_the_model_reads_are_refused(forgiving: bool) -> None:
    """It notices that one is missing, by a failure or by other logits."""
    model = make_pico_model("gptj")
    layers = ReadingList(list(model.transformer.h))
    model.transformer.h = layers

    def use(_module: Any, _args: Any, logits: Tensor) -> Tensor:
        scale = layers.seen[0]
        return logits if forgiving and scale is None else logits * scale.mean()

    model.lm_head.register_forward_hook(use)
    with pytest.raises(UserError, match="the model reads what ReadingBlock returns"):
        count_side_results(model)


def test_a_tuple_of_one_stays_a_tuple(model: PreTrainedModel) -> None:
    """As models with code of their own return it, and take its first element."""

    class FirstOf(nn.ModuleList):
        def __iter__(self) -> Any:
            return (ReadingBlock(layer, lambda output: output[0]) for layer in super().__iter__())

    assert count_side_results(model) == (None, None, None)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _args, output: (output,))
    model.model.layers = FirstOf(list(model.model.layers))
    assert count_side_results(model) == (0, 0, 0)
    x = torch.ones(2)
    assert with_side_results(x, 0) == (x,)
    assert with_side_results(x, None) is x


def test_the_language_layers_are_found_beside_a_tower_as_deep() -> None:
    config = PICO_CONFIGS["gemma3"]()
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers
    model = AutoModelForImageTextToText.from_config(config)
    assert decoder_layers(model) is model.model.language_model.layers
