"""Branches are left out exactly, and removed in the order of what their absence costs."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from trsp.bench.pico_checkpoint import make_pico_model, pico_text, write_pico_checkpoint
from trsp.bench.sublayers import KINDS, Sublayer, Sublayers, app, remove_greedily
from trsp.pruner.calibration import build_calibration
from trsp.pruner.checkpoint import load_tokenizer, open_checkpoint
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import LayerMap, read_layer_map

TOKENS = torch.arange(3, 67).view(4, 16)


def by_hand(model: PreTrainedModel, removed: set[tuple[int, str]]) -> Tensor:
    """The logits with the branches' last projections zeroed: another way to the same function."""
    changed = copy.deepcopy(model)
    for layer, branch in removed:
        block = changed.model.layers[layer]
        projection = block.self_attn.o_proj if branch == "attention" else block.mlp.down_proj
        nn.init.zeros_(projection.weight)
    with torch.no_grad():
        logits: Tensor = changed(input_ids=TOKENS, use_cache=False).logits
    return logits


@pytest.mark.parametrize(
    "removed", [{(2, "attention")}, {(5, "mlp")}, {(0, "attention"), (3, "attention"), (3, "mlp")}]
)
def test_a_branch_left_out_adds_nothing(removed: set[tuple[int, str]]) -> None:
    model = make_pico_model("llama")
    sublayers = Sublayers(model)
    dense = by_hand(model, set())
    with torch.no_grad(), sublayers.without(frozenset(Sublayer(*one) for one in removed)):
        logits = model(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(logits, by_hand(model, removed))
    assert not torch.equal(logits, dense)
    assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, dense), "left as it was"


@pytest.mark.parametrize("family", ["gpt_neox", "phi", "opt_projected", "granite"])
def test_layers_whose_branches_do_not_stand_alone_are_refused(family: str) -> None:
    with pytest.raises(UserError, match="cannot be taken out alone"):
        Sublayers(make_pico_model(family))


def test_idle_branches_go_first(model: PreTrainedModel, pico_llama: Path, text_file: Path) -> None:
    layers = model.model.layers
    nn.init.zeros_(layers[4].self_attn.o_proj.weight)
    nn.init.zeros_(layers[1].mlp.down_proj.weight)
    idle = frozenset({Sublayer(4, "attention"), Sublayer(1, "mlp")})
    tokenizer = load_tokenizer(open_checkpoint(pico_llama))
    tokens = build_calibration(
        [str(text_file)], tokenizer, num_sequences=8, sequence_length=32, seed=0
    ).input_ids
    sublayers = Sublayers(model)
    size = sum(sublayers.num_parameters[one] for one in idle)
    assert frozenset(remove_greedily(sublayers, tokens, size, kind="sublayers")) == idle
    whole = remove_greedily(sublayers, tokens, size, kind="layers")
    assert len(whole) == 2
    assert len({one.source_layer for one in whole}) == 1
    assert remove_greedily(sublayers, tokens, 1, kind="attention") == (Sublayer(4, "attention"),)
    assert remove_greedily(sublayers, tokens, 1, kind="mlp") == (Sublayer(1, "mlp"),)
    other = remove_greedily(sublayers, tokens, 1, kind="sublayers", kept=idle)
    assert idle.isdisjoint(other)
    for kind in KINDS:
        with pytest.raises(UserError, match="cannot be removed"):
            remove_greedily(sublayers, tokens, 10**9, kind=kind)


@pytest.mark.parametrize("family", ["gemma2", "opt"])
def test_branches_of_unknown_size_are_refused(family: str) -> None:
    with pytest.raises(UserError, match="parameters outside its branches"):
        Sublayers(make_pico_model(family))


def test_the_command_compares_equal_sizes(tmp_path: Path) -> None:
    write_pico_checkpoint("llama", tmp_path / "dense")
    for name, seed in (("train", 0), ("test", 1)):
        (tmp_path / f"{name}.txt").write_text(pico_text(200, seed=seed), "utf-8")
    words = ["--model", str(tmp_path / "dense"), "--data", str(tmp_path / "train.txt")]
    words += ["--eval-data", str(tmp_path / "test.txt"), "--sequence-length", "16"]
    words += ["--num-sequences", "2", "--out", str(tmp_path / "record.json")]
    words += ["--map", str(tmp_path / "map.json"), "--export", str(tmp_path / "decilm")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "layers     25.0 %  perplexity" in result.output
    assert (tmp_path / "record.json").is_file()
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    taken = [tuple(one) for one in rows["sublayers"]["removed"]]
    layer_map = read_layer_map(tmp_path / "map.json", sublayers=True)
    base = layer_map.base_model
    assert layer_map == LayerMap.from_removals(base, taken, method=layer_map.method)
    config = json.loads((tmp_path / "decilm" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(layer_map.kept)
    assert CliRunner().invoke(app, [*words, "--ratio", "1"]).exit_code == 2
    assert CliRunner().invoke(app, words).exit_code == 2, "the folder exists"
    # All attention but the first layer's is half of all.
    more = CliRunner().invoke(app, [*words[:-2], "--ratio", "0.6"])
    assert "% is all there is of them" in more.output
