"""What else a folder may hold: layers for drafting, towers, GGUF, two stacks, gaps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trsp.bench.pico_checkpoint import pico_text, write_pico_checkpoint
from trsp.bench.pico_families import MULTIMODAL, NUM_LAYERS
from trsp.pruner import api
from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.errors import UserError

KEPT = (0, 2, 3, 5, 7)
NUM_DRAFTS = 2


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def add_drafts(folder: Path, num_drafts: int) -> None:
    """As on the Hub: whole layers behind the last, with what joins them to the model."""

    def add(tensors: dict[str, Tensor]) -> None:
        last = f"model.layers.{NUM_LAYERS - 1}."
        of_last = {name: tensors[name] for name in tensors if name.startswith(last)}
        for number in range(NUM_LAYERS, NUM_LAYERS + num_drafts):
            for name, tensor in of_last.items():
                tensors[f"model.layers.{number}.{name.removeprefix(last)}"] = tensor + number
            tensors[f"model.layers.{number}.eh_proj.weight"] = torch.full((4, 8), float(number))

    change_weights(folder, add)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "num_nextn_predict_layers": num_drafts}), "utf-8")


@pytest.mark.parametrize("num_drafts", [1, NUM_DRAFTS])
def test_layers_for_drafting_move_behind_the_kept_ones(num_drafts: int, tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    write_pico_checkpoint("deepseek_v3", dense)
    add_drafts(dense, num_drafts)
    checkpoint = open_checkpoint(dense)
    assert checkpoint.num_hidden_layers == NUM_LAYERS
    report = api.prune(dense, out, keep=KEPT, vllm="off")
    assert report["proof"]["passed"]
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, out))
    for number in range(num_drafts):
        old, new = f"model.layers.{NUM_LAYERS + number}.", f"model.layers.{len(KEPT) + number}."
        moved = {name.removeprefix(new): t for name, t in after.items() if name.startswith(new)}
        stood = {name.removeprefix(old): t for name, t in before.items() if name.startswith(old)}
        assert moved.keys() == stood.keys()
        assert all(torch.equal(moved[name], stood[name]) for name in stood)
    assert f"model.layers.{len(KEPT) + num_drafts}." not in " ".join(after)
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["num_nextn_predict_layers"] == num_drafts
    again = api.prune(out, tmp_path / "again", keep=[0, 1, 2], vllm="off")
    assert again["proof"]["passed"]


def test_more_layers_than_config_and_drafts_explain_are_refused(tmp_path: Path) -> None:
    write_pico_checkpoint("deepseek_v3", tmp_path)
    add_drafts(tmp_path, 2)
    path = tmp_path / "config.json"
    path.write_text(path.read_text("utf-8").replace('_predict_layers": 2', '_predict_layers": 1'))
    with pytest.raises(UserError, match=r"says 8 layers, .* holds 10 \(0-9\)"):
        open_checkpoint(tmp_path)


def test_training_says_that_drafts_are_left_behind(tmp_path: Path) -> None:
    dense, out, text = tmp_path / "dense", tmp_path / "out", tmp_path / "text.txt"
    write_pico_checkpoint("deepseek_v3", dense)
    add_drafts(dense, 1)
    text.write_text(pico_text(400), "utf-8")
    settings = (
        "calibration.num_sequences=4", "calibration.sequence_length=16", "transfer.steps=2",
        "transfer.batch_size=2",
    )  # fmt: skip
    report = api.prune(dense, out, layers=2, data=[text], settings=settings, vllm="off")
    assert report["proof"]["passed"]
    assert any("not carried through stage 2" in warning for warning in report["warnings"])


def test_drafts_under_a_name_of_their_own_stay_as_they_are(tmp_path: Path) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    write_pico_checkpoint("qwen3_next", dense)
    change_weights(dense, lambda tensors: tensors.update({"mtp.layers.0.x": torch.ones(3)}))
    assert api.prune(dense, out, keep=KEPT, vllm="off")["proof"]["passed"]
    assert torch.equal(load_file(out / "model.safetensors")["mtp.layers.0.x"], torch.ones(3))


@pytest.mark.parametrize("family", sorted(MULTIMODAL))
def test_a_multimodal_checkpoint_is_loaded_whole(family: str, tmp_path: Path) -> None:
    write_pico_checkpoint(family, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model = load_model(checkpoint)
    assert type(model).__name__.endswith("ForConditionalGeneration")
    assert checkpoint.num_hidden_layers == NUM_LAYERS


@pytest.mark.parametrize("as_file", [True, False])
def test_gguf_is_refused_with_llama_cpps_way(as_file: bool, tmp_path: Path) -> None:
    file = tmp_path / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"--prune-layers .*trsp map MAP --format llama-cpp"):
        open_checkpoint(file if as_file else tmp_path)


def test_layers_with_a_gap_are_refused(tmp_path: Path) -> None:
    write_pico_checkpoint("llama", tmp_path)

    def lose(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            tensors[name.replace(".3.", ".8.")] = tensors.pop(name)

    change_weights(tmp_path, lose)
    with pytest.raises(UserError, match=r"holds 8 \(0-2, 4-8\)"):
        open_checkpoint(tmp_path)


def test_an_encoder_and_a_decoder_are_refused(tmp_path: Path) -> None:
    """Although nothing in the config says that it has both."""
    write_pico_checkpoint("opt", tmp_path)

    def add_encoder(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".decoder.layers." in name]:
            tensors[name.replace(".decoder.", ".encoder.")] = tensors[name]

    change_weights(tmp_path, add_encoder)
    with pytest.raises(UserError, match="two stacks of layers, an encoder's"):
        open_checkpoint(tmp_path)
