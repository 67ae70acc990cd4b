"""The training-free selectors and LLM-Streamline against computations made by other means."""

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from trsp.bench.base_model import encode_documents
from trsp.bench.baseline_orders import (
    NESTED,
    SELECTORS,
    block_cosines,
    random_layers,
    residual_stream,
    taylor_scores,
)
from trsp.bench.baseline_streamline import LEARNING_RATE_BY_WIDTH, WEIGHT_DECAY, streamline
from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.sampling import batch_indices

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OTHER_FAMILIES = {
    "gemma2": Gemma2Config(**SHAPE, num_hidden_layers=3, head_dim=8, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=2, n_positions=64),
    "opt": OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def random_llama(num_layers: int) -> PreTrainedModel:
    """Weights large enough that each layer matters and no two do the same."""
    return build(LlamaConfig(**SHAPE, num_hidden_layers=num_layers, initializer_range=0.1))


def make_identity(model: PreTrainedModel, layer: int) -> None:
    """The layer's two branches add nothing."""
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight.zero_()
        model.model.layers[layer].mlp.down_proj.weight.zero_()


def layer_inputs(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """Transformers' own hidden states, the last taken before the final norm."""
    before_norm: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    return [*states[:-1], before_norm[0]]


def without(model: PreTrainedModel, removed: tuple[int, ...]) -> PreTrainedModel:
    """A copy whose layers are taken out of the list, not skipped."""
    shallow = copy.deepcopy(model)
    kept = [layer for index, layer in enumerate(shallow.model.layers) if index not in removed]
    shallow.model.layers = torch.nn.ModuleList(kept)
    shallow.config.num_hidden_layers = len(kept)
    return shallow


@torch.no_grad()
def loss_of(model: PreTrainedModel, tokens: Tensor) -> float:
    logits = model(input_ids=tokens, use_cache=False).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.fixture
def llama() -> PreTrainedModel:
    return random_llama(8)


@pytest.fixture
def tokens() -> Tensor:
    """Six sequences, so that a batch of 4 leaves an uneven rest."""
    return torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sentences(pico_llama: Path, text_file: Path) -> Tensor:
    """Text that the pico Llama was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(pico_llama)
    return encode_documents(tokenizer, [text_file.read_text("utf-8")])[: 8 * 32].view(8, 32)


@pytest.mark.parametrize("planted", [0, 3, 5])
@pytest.mark.parametrize("name", ["block_influence", "angular", "sleb", "one_shot_loss"])
def test_a_layer_that_does_nothing_goes_first(
    name: str, planted: int, pico_llama: Path, sentences: Tensor
) -> None:
    model = load_model(open_checkpoint(pico_llama))
    make_identity(model, planted)
    with GatedModel(model) as gated:
        assert SELECTORS[name](gated, sentences, num_to_remove=1, seed=0) == (planted,)


def test_taylor_takes_a_layer_that_does_nothing_unless_it_keeps_it(tokens: Tensor) -> None:
    for planted in (1, 5, 7, 9):
        model = random_llama(10)
        make_identity(model, planted)
        with GatedModel(model) as gated:
            assert taylor_scores(gated, tokens)[planted] == 0
            first = SELECTORS["taylor"](gated, tokens, num_to_remove=1, seed=0)[0]
        assert first in (4, 5, 6, 7)
        assert (first == planted) == (planted in (5, 7))


def test_taylor_gives_up_the_ends_from_the_inside(llama: PreTrainedModel, tokens: Tensor) -> None:
    with GatedModel(llama) as gated:
        order = SELECTORS["taylor"](gated, tokens, num_to_remove=7, seed=0)
    assert set(order[:2]) == {4, 5}
    assert order[2:] == (3, 2, 6, 1, 7)
    with GatedModel(random_llama(5)) as gated:
        assert SELECTORS["taylor"](gated, tokens, num_to_remove=4, seed=0) == (2, 3, 1, 4)


def test_taylor_scores_are_those_of_one_backward_pass(
    llama: PreTrainedModel, tokens: Tensor
) -> None:
    logits = llama(input_ids=tokens, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = [
        sum(float((p.detach() * p.grad).abs().sum()) for p in layer.parameters())
        for layer in llama.model.layers
    ]
    llama.zero_grad(set_to_none=True)
    llama.requires_grad_(False)
    with GatedModel(llama) as gated:
        gated.skipped = frozenset({1})  # what somebody left there does not count
        scores = taylor_scores(gated, tokens, batch_size=4)
    assert scores == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", sorted(NESTED))
def test_picks_for_fewer_are_the_first_picks_for_more(
    name: str, llama: PreTrainedModel, tokens: Tensor
) -> None:
    with GatedModel(llama) as gated:
        whole = SELECTORS[name](gated, tokens, num_to_remove=7, seed=5)
        assert len(set(whole)) == 7
        assert set(whole) < set(range(8))
        for number in range(1, 7):
            picks = SELECTORS[name](gated, tokens, num_to_remove=number, seed=5)
            assert picks == whole[:number]


def test_random_layers_are_the_seeds(llama: PreTrainedModel, tokens: Tensor) -> None:
    with GatedModel(llama) as gated:
        drawn = {SELECTORS["random"](gated, tokens, num_to_remove=4, seed=s) for s in range(20)}
    assert len(drawn) > 15
    assert {layer for picks in drawn for layer in picks} == set(range(8))


def test_random_layers_can_be_kept_from_some(llama: PreTrainedModel, tokens: Tensor) -> None:
    with GatedModel(llama) as gated:
        words: dict[str, Any] = {"never": {0, 5}}
        drawn = {random_layers(gated, tokens, num_to_remove=4, seed=s, **words) for s in range(20)}
        assert {layer for picks in drawn for layer in picks} == {1, 2, 3, 4, 6, 7}
        with pytest.raises(UserError, match="7 layers are to go, 6 are not protected"):
            random_layers(gated, tokens, num_to_remove=7, seed=0, **words)


def test_last_layers_go_from_the_end(llama: PreTrainedModel, tokens: Tensor) -> None:
    with GatedModel(llama) as gated:
        assert SELECTORS["last"](gated, tokens, num_to_remove=3, seed=0) == (7, 6, 5)


def test_block_influence_orders_by_cosine(llama: PreTrainedModel, tokens: Tensor) -> None:
    states = layer_inputs(llama, tokens)
    cosines = [float(F.cosine_similarity(x, y, dim=-1).mean()) for x, y in pairwise(states)]
    expected = sorted(range(8), key=lambda layer: -cosines[layer])[:5]
    with GatedModel(llama) as gated:
        picks = SELECTORS["block_influence"](gated, tokens, num_to_remove=5, seed=0)
    assert picks == tuple(expected)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_angular_block_is_that_of_transformers_hidden_states(length: int, tokens: Tensor) -> None:
    model = random_llama(8)
    # So that the best block is inside: random layers are ever more alike to the end.
    for layer in (2, 4):
        make_identity(model, layer)
    states = [state[:, -1] for state in layer_inputs(model, tokens)]
    angles = []
    for start in range(8 - length + 1):
        cosine = F.cosine_similarity(states[start].double(), states[start + length].double(), -1)
        angles.append(float((cosine.clamp(-1, 1).arccos() / math.pi).mean()))
    first = angles.index(min(angles))
    with GatedModel(model) as gated:
        picks = SELECTORS["angular"](gated, tokens, num_to_remove=length, seed=0)
    assert picks == tuple(reversed(range(first, first + length)))


def test_only_the_last_token_decides_the_angular_block(tokens: Tensor) -> None:
    """A layer that leaves the last token alone and turns all others."""
    model = random_llama(8)

    def turn_all_but_last(_module: object, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        return torch.cat((-args[0][:, :-1], args[0][:, -1:]), dim=1)

    model.model.layers[2].register_forward_hook(turn_all_but_last)
    with GatedModel(model) as gated:
        assert SELECTORS["angular"](gated, tokens, num_to_remove=1, seed=0) == (2,)
        assert SELECTORS["block_influence"](gated, tokens, num_to_remove=1, seed=0) != (2,)


def test_sleb_is_the_greedy_search_by_deletion(llama: PreTrainedModel, tokens: Tensor) -> None:
    expected: tuple[int, ...] = ()
    for _ in range(3):
        rest = [layer for layer in range(8) if layer not in expected]
        best = min(rest, key=lambda layer: loss_of(without(llama, (*expected, layer)), tokens))
        expected = (*expected, best)
    picked: list[int] = []
    with GatedModel(llama) as gated:
        picks = SELECTORS["sleb"](
            gated, tokens, num_to_remove=3, seed=0, on_pick=lambda: picked.append(1)
        )
        one_shot = SELECTORS["one_shot_loss"](gated, tokens, num_to_remove=3, seed=0)
    assert picks == expected
    assert len(picked) == 3
    alone = sorted(range(8), key=lambda layer: loss_of(without(llama, (layer,)), tokens))
    assert one_shot == tuple(alone[:3])
    assert one_shot != picks, "the two criteria must differ here, or this shows nothing"


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_selectors_leave_the_model_as_it_was(
    name: str, llama: PreTrainedModel, tokens: Tensor
) -> None:
    llama.requires_grad_(False)
    llama.model.norm.weight.requires_grad_(True)
    before = {key: value.clone() for key, value in llama.state_dict().items()}
    with GatedModel(llama) as gated:
        gated.skipped = frozenset({1})
        masked = SELECTORS[name](gated, tokens, num_to_remove=3, seed=0)
        assert gated.skipped == {1}
        gated.skipped = frozenset()
        assert SELECTORS[name](gated, tokens, num_to_remove=3, seed=0) == masked
    for key, value in llama.state_dict().items():
        assert torch.equal(value, before[key])
    trainable = [name for name, p in llama.named_parameters() if p.requires_grad]
    assert trainable == ["model.norm.weight"]
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert not any(module._forward_hooks for module in llama.modules())
    assert not any(module._forward_pre_hooks for module in llama.modules())


@pytest.mark.parametrize("number", [0, 8, -1])
@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_a_number_of_layers_that_cannot_go_is_refused(
    name: str, number: int, llama: PreTrainedModel, tokens: Tensor
) -> None:
    with GatedModel(llama) as gated, pytest.raises(UserError, match="expected 1 to 7"):
        SELECTORS[name](gated, tokens, num_to_remove=number, seed=0)


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - {"random", "last"}))
def test_a_score_that_is_not_finite_stops_the_run(
    name: str, llama: PreTrainedModel, tokens: Tensor
) -> None:
    with torch.no_grad():
        llama.model.layers[4].mlp.up_proj.weight[0, 0] = math.nan
    with GatedModel(llama) as gated, pytest.raises(RunError, match="nan"):
        SELECTORS[name](gated, tokens, num_to_remove=2, seed=0)


@pytest.mark.parametrize("family", sorted(OTHER_FAMILIES))
def test_every_family_has_a_residual_stream_and_a_choice(family: str, tokens: Tensor) -> None:
    model = build(OTHER_FAMILIES[family])
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    with GatedModel(model) as gated:
        stream = residual_stream(gated, tokens)
        assert len(stream) == 4
        for mine, theirs in zip(stream[:-1], states[:-1], strict=True):
            assert torch.equal(mine, theirs)
        for selector in SELECTORS.values():
            assert len(set(selector(gated, tokens, num_to_remove=2, seed=0))) == 2


def test_block_cosines_are_over_all_tokens(llama: PreTrainedModel, tokens: Tensor) -> None:
    states = layer_inputs(llama, tokens)
    expected = [
        float(F.cosine_similarity(states[start], states[start + 3], dim=-1).mean())
        for start in range(6)
    ]
    with GatedModel(llama) as gated:
        cosines = block_cosines(gated, tokens, length=3, batch_size=4)
    assert cosines == pytest.approx(expected, abs=1e-5)


def block_error(model: PreTrainedModel, dense: PreTrainedModel, tokens: Tensor) -> float:
    """Mean squared error of layer 2 of `model` to layer 4 of the dense model."""
    return float(F.mse_loss(layer_inputs(model, tokens)[3], layer_inputs(dense, tokens)[5]))


def with_a_block_of_three(model: PreTrainedModel) -> PreTrainedModel:
    """Make layers 2, 3 and 4 the block of least change, each of them still doing something."""
    with torch.no_grad():
        for layer in (2, 3, 4):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(0.1)
            model.model.layers[layer].mlp.down_proj.weight.mul_(0.1)
    return model


def test_streamline_trains_one_layer_towards_its_block(tokens: Tensor) -> None:
    model = with_a_block_of_three(random_llama(8))
    model.requires_grad_(False)
    dense = copy.deepcopy(model)
    with GatedModel(model) as gated:
        removed = streamline(gated, tokens, num_to_remove=2, steps=40, learning_rate=1e-3, seed=0)
    assert removed == (4, 3)
    assert block_error(model, dense, tokens) < 0.5 * block_error(dense, dense, tokens)
    after, before = model.state_dict(), dense.state_dict()
    for name in before:
        assert torch.equal(after[name], before[name]) == ("layers.2." not in name), name
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_streamlines_steps_are_those_of_adamw_on_the_dense_block(tokens: Tensor) -> None:
    model = with_a_block_of_three(random_llama(8))
    dense, student = copy.deepcopy(model), copy.deepcopy(model)
    parameters = list(student.model.layers[2].parameters())
    peak = LEARNING_RATE_BY_WIDTH / 32
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=WEIGHT_DECAY)
    made: list[Tensor] = []
    student.model.layers[2].register_forward_hook(lambda _m, _a, output: made.append(output))
    for step, rate in enumerate((peak, peak / 2)):
        batch = tokens[batch_indices(step, num_sequences=6, batch_size=4, seed=3)]
        student(input_ids=batch, use_cache=False)
        loss = F.mse_loss(made.pop(), layer_inputs(dense, batch)[5])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with GatedModel(model) as gated:
        streamline(gated, tokens, num_to_remove=2, steps=2, learning_rate=None, seed=3)
    for mine, theirs in zip(model.model.layers[2].parameters(), parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_streamline_in_bf16_trains_in_fp32(tokens: Tensor) -> None:
    """Steps of 0.001 on a weight of 1 add up: in bf16 each would round away."""
    model = with_a_block_of_three(random_llama(8)).to(torch.bfloat16)
    dense = copy.deepcopy(model)
    with GatedModel(model) as gated:
        streamline(gated, tokens, num_to_remove=2, steps=40, learning_rate=1e-3, seed=0)
    weight = model.model.layers[2].input_layernorm.weight
    assert weight.dtype == torch.bfloat16
    assert not torch.equal(weight, dense.model.layers[2].input_layernorm.weight)


def test_streamline_changes_nothing_when_its_loss_breaks(
    llama: PreTrainedModel, tokens: Tensor
) -> None:
    before = copy.deepcopy(llama).state_dict()
    with GatedModel(llama) as gated:
        with pytest.raises(RunError, match="streamline loss"):
            streamline(gated, tokens, num_to_remove=2, steps=4, learning_rate=1e30, seed=0)
        with pytest.raises(UserError, match="expected 1 to 7"):
            streamline(gated, tokens, num_to_remove=8, steps=4, learning_rate=None, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
