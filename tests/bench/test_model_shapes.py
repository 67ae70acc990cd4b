"""Shapes without weights: sizes by the published formulas, exact prompts, fair layer choice."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trsp.bench.model_shapes import SHAPES, copy_config_only, spread_layers, write_shape
from trsp.pruner.errors import UserError
from trsp.pruner.vllm_process import has_vllm

needs_vllm = pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed")

# Published parameter counts.
BILLIONS = {
    "llama2-7b": 6.738415616,
    "llama2-13b": 13.015864320,
    "llama3-8b": 8.030261248,
    "opt-13b": 12.853473280,
    "qwen3-8b": 8.190735360,
}
POSITIONS = {
    "llama2-7b": 4096,
    "llama2-13b": 4096,
    "llama3-8b": 8192,
    "opt-13b": 2048,
    "qwen3-8b": 40960,
}
THETA = {"llama2-7b": 1e4, "llama2-13b": 1e4, "llama3-8b": 5e5, "qwen3-8b": 1e6}


def read_config(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return document


@pytest.mark.parametrize("name", sorted(BILLIONS))
def test_a_shape_is_the_published_one(name: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_shape(name, tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == round(BILLIONS[name] * 1e9)
    assert config.dtype == (torch.bfloat16 if name in {"llama3-8b", "qwen3-8b"} else torch.float16)
    assert config.max_position_embeddings == POSITIONS[name]
    if name != "opt-13b":
        assert config.rope_parameters["rope_theta"] == THETA[name]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_shape_can_be_shortened(name: str, tmp_path: Path) -> None:
    # A tokenizer of full size takes a second to write.
    before = {**SHAPES[name], "vocab_size": 100}
    layers = before["num_hidden_layers"]
    folder = write_shape(before, tmp_path / "out", num_layers=3 * layers // 4)
    config = AutoConfig.from_pretrained(folder)
    assert config.num_hidden_layers == 3 * layers // 4
    after = read_config(folder)
    assert {key for key in before if before[key] != after[key]} <= {
        "num_hidden_layers",
        "max_window_layers",
    }


@pytest.mark.parametrize("name", ["pico", "qwen3-8b"])
def test_text_and_token_ids_are_one_to_one(name: str, tmp_path: Path) -> None:
    folder = write_shape(name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = SHAPES[name]["vocab_size"]
    assert len(tokenizer) == tokenizer.vocab_size == size
    assert tokenizer.all_special_ids == []
    assert tokenizer.num_special_tokens_to_add() == 0
    ids = [size - 1, 0, 1, 1, 0, size // 2, 10, 100]
    text = tokenizer.decode(ids)
    assert text == " ".join(f"t{token}" for token in ids)
    for add_special_tokens in (True, False):
        assert tokenizer.encode(text, add_special_tokens=add_special_tokens) == ids


@needs_vllm
@pytest.mark.vllm
def test_vllms_random_prompts_have_exactly_the_tokens_asked_for(tmp_path: Path) -> None:
    from vllm.benchmarks.datasets.datasets import RandomDataset

    tokenizer = AutoTokenizer.from_pretrained(write_shape("pico", tmp_path))
    # A prefix, and lengths that cross the end of the vocabulary.
    requests = RandomDataset(random_seed=1).sample(
        tokenizer, 50, prefix_len=7, input_len=900, output_len=5
    )
    for request in requests:
        assert request.prompt_len == 907
        assert len(tokenizer.encode(request.prompt)) == 907
    assert len({request.prompt for request in requests}) == 50


def test_layers_that_stay_are_evenly_spread() -> None:
    assert spread_layers(SHAPES["pico"], 8) == tuple(range(8))
    assert spread_layers(SHAPES["pico"], 4) == (1, 3, 5, 7)
    assert spread_layers(SHAPES["pico"], 1) == (4,)
    for count in range(1, 33):
        kept = spread_layers(SHAPES["llama3-8b"], count)
        assert len(set(kept)) == count
        gaps = {after - before for before, after in pairwise(kept)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_kinds_of_layers_keep_their_share(tmp_path: Path) -> None:
    # Gemma 2 alternates: evenly spaced halves of it alone would be all of one kind.
    config = {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "num_hidden_layers": 12,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window": 16,
        "vocab_size": 100,
    }
    for count in (2, 4, 6, 8, 10):
        kept = spread_layers(config, count)
        assert sum(layer % 2 for layer in kept) == count // 2
    # A share that is no whole number goes to the kinds with the largest remainder.
    for count in (1, 3, 5, 7, 9, 11):
        kept = spread_layers(config, count)
        assert len(kept) == count
        assert sum(layer % 2 for layer in kept) in {count // 2, count // 2 + 1}
    types = AutoConfig.from_pretrained(write_shape(config, tmp_path, num_layers=6)).layer_types
    assert types.count("full_attention") == types.count("sliding_attention") == 3


@pytest.mark.parametrize("count", [0, -1, 9])
def test_a_number_of_layers_it_does_not_have_is_refused(count: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give 1 to 8"):
        write_shape("pico", tmp_path / "out", num_layers=count)
    assert not (tmp_path / "out").exists()


def test_an_unknown_shape_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no shape 'llama9'; known: .*pico"):
        write_shape("llama9", tmp_path)


def test_a_config_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "no-such", "num_hidden_layers": 4, "vocab_size": 10}
    with pytest.raises(UserError, match="transformers cannot read it"):
        write_shape(config, tmp_path, num_layers=2)


def test_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match="holds weights"):
        write_shape("pico", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_the_shape_of_a_folder_keeps_its_tokenizer(pico_llama: Path, tmp_path: Path) -> None:
    folder = copy_config_only(pico_llama, tmp_path / "out", num_layers=4)
    assert read_config(folder)["num_hidden_layers"] == 4
    assert not list(folder.glob("*.safetensors*"))
    assert (folder / "tokenizer.json").read_bytes() == (pico_llama / "tokenizer.json").read_bytes()


def test_a_folder_without_a_tokenizer_gets_the_one_of_words(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(dict(SHAPES["pico"])))
    folder = copy_config_only(tmp_path / "model", tmp_path / "out")
    assert read_config(folder) == dict(SHAPES["pico"])
    assert AutoTokenizer.from_pretrained(folder).decode([7]) == "t7"


def test_the_shape_of_a_folder_is_not_written_onto_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        copy_config_only(tmp_path, tmp_path / "out")
    write_shape("pico", tmp_path)
    with pytest.raises(UserError, match="is the model itself"):
        copy_config_only(tmp_path, tmp_path)
