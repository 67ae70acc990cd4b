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
    assert any("fewer of their tokens will be accepted" in text for text in report["warnings"])
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
    report = api.prune(dense, out, keep=KEPT, vllm="off")
    assert report["proof"]["passed"]
    assert any("fewer of their tokens will be accepted" in text for text in report["warnings"])
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


@pytest.mark.parametrize("family", ["gemma3", "llava", "mistral3"])
def test_the_newer_names_of_a_multimodal_checkpoint_are_as_good(
    family: str, tmp_path: Path
) -> None:
    """transformers 5.19 writes the older ones; those of 4.52 on have the model in front."""
    write_pico_checkpoint(family, tmp_path)
    older = open_checkpoint(tmp_path)
    assert older.layer_prefix == "language_model.model.layers."
    expected = load_model(older).state_dict()

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            rest = name.removeprefix("language_model.")
            new = rest.replace("model.", "model.language_model.", 1)
            tensors[new if rest != name else f"model.{name}"] = tensors.pop(name)

    change_weights(tmp_path, rename)
    newer = open_checkpoint(tmp_path)
    assert newer.layer_prefix == "model.language_model.layers."
    found = load_model(newer).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_note_of_drafts_where_there_are_none(tmp_path: Path) -> None:
    write_pico_checkpoint("llama", tmp_path / "dense")
    assert not open_checkpoint(tmp_path / "dense").has_drafts
    report = api.prune(tmp_path / "dense", tmp_path / "out", keep=KEPT, vllm="off")
    assert not report["warnings"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_dtype_sharded_or_not_keeps_its_bytes(
    dtype: torch.dtype, family: str, sharded: bool, tmp_path: Path
) -> None:
    """Llama's head is its own, Gemma's is tied; the proof compares each byte and the logits."""
    dense, out = tmp_path / "dense", tmp_path / "out"
    write_pico_checkpoint(family, dense, dtype=dtype)
    if sharded:
        tensors = load_file(dense / "model.safetensors")
        (dense / "model.safetensors").unlink()
        weight_map = {}
        for number, name in enumerate(tensors):
            weight_map[name] = f"part-{number % 5}.safetensors"
        for part in set(weight_map.values()):
            own = {name: tensors[name].clone() for name in tensors if weight_map[name] == part}
            save_file(own, dense / part, {"format": "pt"})
        index = dense / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    report = api.prune(dense, out, keep=KEPT, vllm="off")
    checks = {check["name"]: check["status"] for check in report["proof"]["checks"]}
    assert checks["weights"] == checks["logits"] == "passed"
    (stored,) = {entry.dtype for entry in open_checkpoint(out).tensors.values()}
    assert stored == {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert len(open_checkpoint(out).shards) == (5 if sharded else 1)


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    write_pico_checkpoint("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    entries = [f'"{name}": "a.safetensors"' for name in load_file(tmp_path / "a.safetensors")]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{{", ".join(entries)}}}}}')
    assert open_checkpoint(tmp_path).num_hidden_layers == NUM_LAYERS
    twice = entries[0].replace("a.safe", "b.safe")
    index.write_text(f'{{"weight_map": {{{", ".join([twice, *entries])}}}}}')
    with pytest.raises(UserError, match=r"the key 'lm_head.weight' is repeated"):
        open_checkpoint(tmp_path)


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
