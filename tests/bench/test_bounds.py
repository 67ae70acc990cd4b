"""Bounds beside formulas written out by hand, and the verdict at its edges."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trsp.bench.bounds import (
    BEYOND,
    FAR_BELOW,
    OVERHEAD,
    WITHIN,
    LayerCost,
    ModelCost,
    achieved_over_bound,
    decode_bound,
    prefill_bound,
    verdict,
)
from trsp.bench.model_shapes import SHAPES, write_shape
from trsp.bench.statistics import Interval
from trsp.pruner.errors import UserError


def cost(tmp_path: Path, shape: Any, num_layers: int | None = None, **options: Any) -> ModelCost:
    folder = tmp_path / f"model-{num_layers}"
    return ModelCost.from_config(write_shape(shape, folder, num_layers=num_layers), **options)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelCost, ModelCost]:
    """The 8B shape with 32 and with 24 layers."""
    folder = tmp_path_factory.mktemp("llama3")
    return cost(folder, "llama3-8b"), cost(folder, "llama3-8b", 24)


def test_a_llamas_parameters_are_those_of_the_formula(llama3: tuple[ModelCost, ModelCost]) -> None:
    dense, pruned = llama3
    hidden, intermediate, kv = 4096, 14336, 8 * 128
    matrices = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate
    layer = LayerCost(matrices + 2 * hidden, matrices, 2 * kv, 32 * 256, None)
    assert dense.layers == (layer,) * 32
    assert pruned.layers == (layer,) * 24
    table = 128256 * hidden
    assert (dense.embedding_parameters, dense.head_parameters) == (table, table)
    assert (dense.rest_parameters, dense.embedding_width, dense.tied) == (hidden, hidden, False)
    assert dense.num_parameters == 32 * layer.parameters + 2 * table + hidden
    assert dense.weight_bytes == 2 * dense.num_parameters
    assert dense.kv_bytes_per_token == 32 * 2 * 8 * 128 * 2


def test_the_designs_numbers_for_24_of_32_layers(llama3: tuple[ModelCost, ModelCost]) -> None:
    """At batch 1 the design gives 1.28, the ratio of all weights; the input embedding is in it.

    Of that table a step reads one row, so the bound itself is 1.30. And +37.7 % cache tokens in
    equal memory is what 0.9 of 128 GiB leaves beside the weights; a smaller GPU gains more.
    """
    dense, pruned = llama3
    assert dense.weight_bytes / pruned.weight_bytes == pytest.approx(1.28, abs=0.005)
    assert decode_bound(dense, pruned, batch=1, context=0) == pytest.approx(1.303, abs=0.001)

    def gain(gib: float) -> float:
        memory = int(0.9 * gib * 2**30)
        tokens = [model.kv_tokens(memory - model.weight_bytes) for model in (pruned, dense)]
        return tokens[0] / tokens[1] - 1

    assert gain(128) == pytest.approx(0.377, abs=0.001)
    assert gain(80) == pytest.approx(0.409, abs=0.001)
    assert gain(24) == pytest.approx(0.986, abs=0.001)


def test_a_decode_step_moves_what_the_formula_says(tmp_path: Path) -> None:
    model = cost(tmp_path, "pico")
    layer = 4 * 128 * 128 + 3 * 128 * 352 + 2 * 128
    head, norm = 10240 * 128, 128
    for batch, context in ((1, 0), (3, 50)):
        weights = 4 * (8 * layer + head + norm + batch * 128)
        cached = 4 * batch * 8 * (2 * 2 * 64) * (context + 1)
        assert model.decode_step_bytes(batch, context) == weights + cached
    # A cache of another width, weights of another.
    eighth = cost(tmp_path, "pico", weight_bytes_per_parameter=0.5, kv_bytes_per_number=1)
    assert eighth.weight_bytes == model.weight_bytes // 8
    assert eighth.kv_bytes_per_token == model.kv_bytes_per_token // 4


def test_a_prompt_costs_what_the_formula_says(tmp_path: Path) -> None:
    model = cost(tmp_path, "pico")
    matrices = 4 * 128 * 128 + 3 * 128 * 352
    pairs = sum(position + 1 for position in range(10))
    # Scores and their use: two products of head_dim for each of 2 heads and each pair.
    attention = 2 * 2 * 2 * 64 * pairs
    head = 2 * 10240 * 128
    assert model.prefill_flops(10) == 8 * (2 * 10 * matrices + attention) + head
    assert model.prefill_flops(10, logit_positions=10) == model.prefill_flops(10) + 9 * head


def test_operations_agree_with_torchs_own_count(tmp_path: Path) -> None:
    """Torch counts full attention, not the causal half, so attention is put in for comparison."""
    from torch.utils.flop_counter import FlopCounterMode

    folder = write_shape("pico", tmp_path)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), attn_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(12)[None], logits_to_keep=1)
    full_minus_causal = 8 * 2 * 2 * 2 * 64 * (12 * 12 - 12 * 13 // 2)
    ours = ModelCost.from_config(folder).prefill_flops(12)
    assert counter.get_total_flops() == ours + full_minus_causal


def test_tied_embeddings_are_held_once_and_read_as_the_head(tmp_path: Path) -> None:
    untied = cost(tmp_path, "pico")
    tied = cost(tmp_path, {**SHAPES["pico"], "tie_word_embeddings": True})
    assert tied.tied
    assert untied.num_parameters - tied.num_parameters == 10240 * 128
    assert tied.decode_step_bytes(2, 5) == untied.decode_step_bytes(2, 5)


def test_position_tables_are_read_by_the_row(tmp_path: Path) -> None:
    opt = cost(tmp_path, "opt-13b")
    assert opt.embedding_parameters == (50272 + 2048 + 2) * 5120
    assert opt.embedding_width == 2 * 5120
    assert opt.head_parameters == 50272 * 5120
    assert opt.tied


def test_a_windowed_layer_reads_its_window(tmp_path: Path) -> None:
    shape = {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window": 16,
        "vocab_size": 100,
        "dtype": "bfloat16",
    }
    model = cost(tmp_path, shape)
    assert [layer.window for layer in model.layers] == [16, None, 16, None]
    added = model.decode_step_bytes(1, 100) - model.decode_step_bytes(1, 0)
    assert added == 2 * (2 * 32) * (2 * 16 + 2 * 100)
    pairs = [sum(min(position + 1, reach) for position in range(40)) for reach in (16, 40)]
    heads = 2 * 2 * 2 * 32
    matrices = 2 * sum(layer.matrix_parameters for layer in model.layers)
    assert model.prefill_flops(40) == 40 * matrices + 2 * heads * sum(pairs) + 2 * 100 * 64


@pytest.mark.parametrize(
    ("shape", "kv_heads"),
    [
        ({"model_type": "falcon", "multi_query": True, "num_kv_heads": 4}, 1),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ({"model_type": "gpt_bigcode", "multi_query": True, "n_inner": 128}, 1),
        ({"model_type": "gpt2", "n_inner": 128}, 4),
        ({"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2}, 4),
        ({"model_type": "mistral", "num_key_value_heads": 2, "intermediate_size": 64}, 2),
    ],
)
def test_the_cache_of_other_families(shape: dict[str, Any], kv_heads: int, tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    if shape["model_type"] == "mpt":
        sizes = {"vocab_size": 100}
    model = cost(tmp_path, {**sizes, **shape})
    assert [layer.kv_width for layer in model.layers] == [2 * kv_heads * 16] * 2
    # The same by experiment: what transformers really caches. It repeats the heads of new Falcons
    # before caching them, which engines do not.
    if "new_decoder_architecture" in shape:
        return
    whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model-None"))
    cache = whole(torch.arange(5)[None], use_cache=True).past_key_values
    for layer in cache.layers:
        assert layer.keys.numel() + layer.values.numel() == 5 * 2 * kv_heads * 16


def test_bounds_lie_between_one_and_the_layers_ratio(llama3: tuple[ModelCost, ModelCost]) -> None:
    dense, pruned = llama3
    last = 1.0
    for context in (0, 1000, 100_000):
        bound = decode_bound(dense, pruned, batch=8, context=context)
        assert last < bound < 32 / 24
        last = bound
    assert 1 < prefill_bound(dense, pruned, tokens=1) < prefill_bound(dense, pruned, tokens=2048)
    assert prefill_bound(dense, pruned, tokens=2048) < 32 / 24
    assert prefill_bound(dense, dense, tokens=5) == decode_bound(dense, dense, batch=1, context=1)


def test_the_share_of_the_gain_that_was_reached() -> None:
    assert achieved_over_bound(1.2, 1.4) == pytest.approx(0.5)
    assert achieved_over_bound(0.9, 1.4) == pytest.approx(-0.25)
    assert achieved_over_bound(1.2, 1.0) is None


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.25, 1.29, WITHIN),
        (1.29, 1.35, WITHIN),
        (1.34, 1.35, BEYOND),
        (1.31, 1.35, OVERHEAD),
        (1.05, 1.09, FAR_BELOW),
        (1.05, 1.11, WITHIN),
        (0.5, 0.9, FAR_BELOW),
        (None, None, WITHIN),
    ],
)
def test_the_verdict_goes_by_the_interval(
    low: float | None, high: float | None, expected: str
) -> None:
    # A third of the bound's gain is 1.1.
    assert verdict(Interval(1.2, low, high, 5), 1.3, 4 / 3) == expected


def test_one_block_is_judged_by_its_estimate() -> None:
    assert verdict(Interval(1.34, None, None, 1), 1.3, 4 / 3) == BEYOND
    assert verdict(Interval(1.09, None, None, 1), 1.3, 4 / 3) == FAR_BELOW


def test_without_a_bound_the_layers_ratio_is_one() -> None:
    assert verdict(Interval(1.32, 1.31, 1.325, 5), None, 4 / 3) == WITHIN
    assert verdict(Interval(1.35, 1.34, 1.36, 5), None, 4 / 3) == BEYOND


def test_a_control_is_only_unexplained_when_all_of_it_is_off_one() -> None:
    assert verdict(Interval(0.97, 0.96, 0.98, 5), 1.0, 1.0) == FAR_BELOW
    assert verdict(Interval(1.0, 0.99, 1.01, 5), 1.0, 1.0) == WITHIN
    assert verdict(Interval(1.03, 1.02, 1.04, 5), 1.0, 1.0) == BEYOND


@pytest.mark.parametrize(("bound", "layer_ratio"), [(0.8, 1.2), (None, 0.75), (1.2, 0.75)])
def test_arms_that_were_swapped_are_noticed(bound: float | None, layer_ratio: float) -> None:
    with pytest.raises(ValueError, match="taken for the pruned one"):
        verdict(Interval(1.0, None, None, 1), bound, layer_ratio)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        ModelCost.from_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such"}')
    with pytest.raises(UserError, match="cannot build the model"):
        ModelCost.from_config(tmp_path)
    with pytest.raises(UserError, match="dtype 'float15' does not exist"):
        cost(tmp_path, "pico", dtype="float15")
    model = cost(tmp_path, "pico")
    for call in (
        lambda: model.decode_step_bytes(0, 1),
        lambda: model.decode_step_bytes(1, -1),
        lambda: model.prefill_flops(0),
    ):
        with pytest.raises(ValueError, match="expected at least"):
            call()
