"""What is wrong with a checkpoint folder is found before its weights are used."""

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trsp.pruner.checkpoint import (
    INDEX_NAME,
    check_tokenizer,
    load_model,
    load_tokenizer,
    open_checkpoint,
)
from trsp.pruner.errors import UserError
from trsp.pruner.safetensors_header import header_bytes, read_header

NUM_LAYERS = 4
VOCAB_SIZE = 24


def edit_json(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))


def make_tokenizer(num_tokens: int, bos: str = "w1", eos: str = "w2") -> PreTrainedTokenizerBase:
    words = {f"w{i}": i for i in range(num_tokens)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), bos_token=bos, eos_token=eos
    )


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer Llama in several shards, with a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("pico") / "model"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10KB")
    make_tokenizer(VOCAB_SIZE).save_pretrained(folder)
    return folder


@pytest.fixture
def model(pico: Path, tmp_path: Path) -> Path:
    """A copy of the pico model to damage."""
    return Path(shutil.copytree(pico, tmp_path / "model"))


@pytest.fixture
def single(pico: Path, tmp_path: Path) -> Path:
    """The same weights in one file."""
    folder = tmp_path / "single"
    LlamaForCausalLM.from_pretrained(pico).save_pretrained(folder)
    return folder


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


# What a sound checkpoint says


def test_open_finds_every_tensor_where_safetensors_finds_it(pico: Path) -> None:
    checkpoint = open_checkpoint(pico)
    assert checkpoint.layer_prefix == "model.layers."
    assert checkpoint.num_hidden_layers == NUM_LAYERS
    assert checkpoint.config["model_type"] == "llama"
    assert [shard.name for shard in checkpoint.shards] == sorted(
        path.name for path in pico.glob("*.safetensors")
    )
    assert len(checkpoint.shards) > 2
    assert all(shard.metadata == {"format": "pt"} for shard in checkpoint.shards)
    found = {}
    for shard in checkpoint.shards:
        with safe_open(pico / shard.name, "pt") as file:
            found.update({name: (shard.name, file.get_tensor(name)) for name in file.keys()})  # noqa: SIM118
    assert found.keys() == checkpoint.tensors.keys()
    for name, (shard_name, tensor) in found.items():
        entry = checkpoint.tensors[name]
        assert (entry.shard, entry.shape, entry.dtype) == (shard_name, tuple(tensor.shape), "F32")
        content = (pico / shard_name).read_bytes()[entry.begin : entry.end]
        assert content == tensor.numpy().tobytes()


def test_source_layer_of_a_tensor(pico: Path) -> None:
    checkpoint = open_checkpoint(pico)
    assert checkpoint.source_layer("model.layers.3.mlp.up_proj.weight") == 3
    assert checkpoint.source_layer("model.norm.weight") is None
    assert checkpoint.source_layer("other.model.layers.3.mlp.up_proj.weight") is None
    layers = {checkpoint.source_layer(name) for name in checkpoint.tensors}
    assert layers == {None, 0, 1, 2, 3}


def test_fingerprint_tells_architecture_names_shapes_and_dtypes_but_not_shards(
    pico: Path, single: Path
) -> None:
    fingerprint = open_checkpoint(single).fingerprint
    assert len(fingerprint) == 64
    assert open_checkpoint(pico).fingerprint == fingerprint
    weights = load_file(single / "model.safetensors")
    norm = "model.norm.weight"

    def changed(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, single / "model.safetensors", {"format": "pt"})
        return open_checkpoint(single).fingerprint

    renamed = {name.replace(norm, "model.final.weight"): value for name, value in weights.items()}
    assert changed(weights) == fingerprint
    assert changed({**weights, norm: weights[norm] * 2}) == fingerprint
    others = [
        changed({**weights, norm: weights[norm].half()}),
        changed({**weights, norm: weights[norm][None]}),
        changed(renamed),
    ]
    changed(weights)
    edit_json(single / "config.json", architectures=["OtherForCausalLM"])
    others.append(open_checkpoint(single).fingerprint)
    assert len({fingerprint, *others}) == 5


@pytest.mark.parametrize(
    ("names", "config", "prefix"),
    [
        (["h.{}.attn.bias", "wte.weight"], {"n_layer": 3}, "h."),
        (["transformer.h.{}.ln.weight"], {"n_layer": 3}, "transformer.h."),
        (["model.decoder.layers.{}.fc1.weight"], {"num_hidden_layers": 3}, "model.decoder.layers."),
        (["transformer.blocks.{}.a"], {"n_layers": 3}, "transformer.blocks."),
        (["model.layers.{}.block.0.a", "model.layers.{}.block.1.a"], None, "model.layers."),
        (
            ["vision_tower.encoder.layers.{}.a", "language_model.model.layers.{}.a"],
            {"text_config": {"num_hidden_layers": 3}},
            "language_model.model.layers.",
        ),
        (
            ["vision_tower.encoder.layers.0.a", "language_model.model.layers.{}.a"],
            {"text_config": {"num_hidden_layers": 3}, "num_hidden_layers": 1},
            "language_model.model.layers.",
        ),
    ],
)
def test_the_prefix_is_that_of_the_layers_of_the_language_model(
    tmp_path: Path, names: list[str], config: dict[str, Any] | None, prefix: str
) -> None:
    tensors = {name.format(layer) for name in names for layer in range(3)}
    write_checkpoint(tmp_path, sorted(tensors), config or {"num_hidden_layers": 3})
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.layer_prefix, checkpoint.num_hidden_layers) == (prefix, 3)


def write_checkpoint(folder: Path, names: list[str], config: dict[str, Any]) -> None:
    """Write tensors of one float each under these names, in one shard."""
    save_file({name: torch.ones(1) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (["model.norm.weight"], {"num_hidden_layers": 3}, "no tensor is named after a layer"),
        (["model.layers.{}.a"], {}, "num_hidden_layers"),
        (["model.layers.{}.a"], {"num_hidden_layers": True}, "num_hidden_layers"),
        (["model.layers.{}.a"], {"num_hidden_layers": 3, "n_layer": 2}, "n_layer"),
        (
            ["a.layers.{}.a", "b.layers.{}.a"],
            {"num_hidden_layers": 3},
            r"cannot tell .* a.layers.\* holds 3 \(0-2\); b.layers.\* holds 3 \(0-2\)",
        ),
        (
            ["vision_tower.layers.{}.a", "image.layers.{}.a"],
            {"num_hidden_layers": 3},
            "cannot tell",
        ),
    ],
)
def test_layers_that_cannot_be_told_are_refused(
    tmp_path: Path, names: list[str], config: dict[str, Any], message: str
) -> None:
    tensors = {name.format(layer) for name in names for layer in range(3)}
    write_checkpoint(tmp_path, sorted(tensors), config)
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)


# The layers of config and weights


@pytest.mark.parametrize("stated", [3, 6])
def test_config_and_weights_with_other_numbers_of_layers_are_refused(
    model: Path, stated: int
) -> None:
    edit_json(model / "config.json", num_hidden_layers=stated)
    with pytest.raises(
        UserError, match=rf"says {stated} layers, and in the weights model.layers.\* holds 4 \(0-3"
    ):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("layers", "text"), [((0, 1, 3), r"holds 3 \(0-1, 3\)"), ((0, 2), r"holds 2 \(0, 2\)")]
)
def test_a_layer_missing_in_the_middle_is_refused(
    tmp_path: Path, layers: tuple[int, ...], text: str
) -> None:
    write_checkpoint(tmp_path, [f"h.{n}.a" for n in layers], {"n_layer": 3})
    with pytest.raises(UserError, match=text):
        open_checkpoint(tmp_path)


# What is refused


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def nest_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)


def nest_config_a_little_too_deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100 + "1" + "}" * 100)


def grow_config(folder: Path) -> None:
    with (folder / "config.json").open("a") as file:
        file.write(" " * 2**23)


def break_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"a": \xff}')


def remove_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def truncate_shard(folder: Path) -> None:
    os.truncate(first_shard(folder), first_shard(folder).stat().st_size - 1)


def extend_shard(folder: Path) -> None:
    with first_shard(folder).open("ab") as file:
        file.write(b"\0")


def empty_shard(folder: Path) -> None:
    os.truncate(first_shard(folder), 0)


def break_index(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("{")


def empty_index(folder: Path) -> None:
    (folder / INDEX_NAME).write_text('{"weight_map": {}}')


def misplace_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = names[0]
    (folder / INDEX_NAME).write_text(json.dumps(index))


def forget_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX_NAME).write_text(json.dumps(index))


def repeat_tensor(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)


def leave_stale_index(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder.parent / "whole")
    shutil.copy(folder.parent / "whole" / "model.safetensors", folder)


def remove_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, "has no config.json"),
        (nest_config, "config.json: is nested too deep"),
        (nest_config_a_little_too_deep, "config.json: is nested too deep"),
        (grow_config, "config.json: is larger than"),
        (break_config, "config.json: is not JSON"),
        (remove_shard, r"model-00001-of-\d+.safetensors: is missing"),
        (truncate_shard, r"model-00001-of-\d+.safetensors: is truncated"),
        (extend_shard, r"model-00001-of-\d+.safetensors: is followed by bytes of no tensor"),
        (empty_shard, r"model-00001-of-\d+.safetensors: is truncated"),
        (break_index, "index.json: is not JSON"),
        (empty_index, "index.json: has no weight_map"),
        (misplace_tensor, "index.json: says tensor 'model.norm.weight' is in model-00001"),
        (forget_tensor, "index.json: says tensor 'model.norm.weight' is in None"),
        (repeat_tensor, "is in two shards"),
        (leave_stale_index, "has both model.safetensors and"),
        (remove_weights, "has no weights"),
    ],
)
def test_damaged_folders_are_refused_by_name(
    model: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(model)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights"),
        ({"is_encoder_decoder": True}, "only decoder-only models"),
        ({"auto_map": {"AutoConfig": "code.Config"}}, "pass --trust-remote-code"),
        ({"vision_config": {"auto_map": {}}}, "pass --trust-remote-code"),
    ],
)
def test_configs_that_load_something_else_are_refused(
    model: Path, changes: dict[str, Any], message: str
) -> None:
    edit_json(model / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "merge it into its base model"),
    ],
)
def test_folders_of_other_kinds_are_refused(model: Path, name: str, message: str) -> None:
    (model / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        open_checkpoint(model)


def test_what_is_no_folder_is_refused(pico: Path) -> None:
    for path in ("meta-llama/Llama-3.2-1B", pico / "config.json", "a\0b"):
        with pytest.raises(UserError, match=r"is not a folder; .* must be downloaded first"):
            open_checkpoint(path)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_named_and_never_opened(model: Path, tmp_path: Path, name: str) -> None:
    remove_weights(model)
    sung = tmp_path / "sung"
    (model / name).write_bytes(pickle.dumps(Canary(sung)))
    with pytest.raises(UserError, match=rf"has pickle weights only \({name}\)"):
        open_checkpoint(model)
    assert not sung.exists()
    pickle.loads((model / name).read_bytes())
    assert sung.exists(), "the canary itself must sing, or this test cannot fail"


def test_pickled_weights_beside_safetensors_are_never_opened(model: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin"):
        (model / name).write_bytes(pickle.dumps(Canary(tmp_path / "sung")))
    checkpoint = open_checkpoint(model)
    load_model(checkpoint)
    load_tokenizer(checkpoint)
    assert not (tmp_path / "sung").exists()


def test_pickled_weights_that_take_the_place_of_safetensors_are_not_loaded(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    torch.save(load_file(single / "model.safetensors"), single / "pytorch_model.bin")
    (single / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"transformers cannot load it: .*model.safetensors"):
        load_model(checkpoint)


# Paths


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "./model.safetensors",
        "a\\b.safetensors",
        "a\0b.safetensors",
        "..",
        "",
    ],
)
def test_an_index_that_names_a_path_is_refused(model: Path, name: str) -> None:
    shutil.copytree(model, model.parent / "other")
    index = json.loads((model / INDEX_NAME).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (model / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"is not (the name of a file|a safetensors file)"):
        open_checkpoint(model)


@pytest.fixture(scope="module")
def index_only(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    shutil.copy(pico / "config.json", folder)
    return folder


@given(name=st.one_of(st.text(max_size=20), st.text("./\\~", max_size=8), st.integers()))
@settings(max_examples=80, deadline=None)
def test_an_index_never_leads_anywhere_else(index_only: Path, name: object) -> None:
    for shard in (name, f"{name}.safetensors"):
        index = {"weight_map": {"model.norm.weight": shard}}
        (index_only / INDEX_NAME).write_text(json.dumps(index))
        with pytest.raises(UserError):
            open_checkpoint(index_only)


@pytest.mark.parametrize("linked", ["config.json", INDEX_NAME, "shard"])
def test_a_link_out_of_the_folder_is_refused(model: Path, tmp_path: Path, linked: str) -> None:
    path = first_shard(model) if linked == "shard" else model / linked
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(UserError, match=f"{path.name}: is a link out of the checkpoint's folder"):
        open_checkpoint(model)


def test_links_of_the_hub_cache_are_followed_and_others_not(pico: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(pico.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert open_checkpoint(snapshot).fingerprint == open_checkpoint(pico).fingerprint
    (tmp_path / "linked").symlink_to(snapshot)
    assert open_checkpoint(tmp_path / "linked").num_hidden_layers == NUM_LAYERS
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(pico / "config.json")
    with pytest.raises(UserError, match="is a link out of the checkpoint's folder"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("target", ["config.json", "folder"])
def test_a_link_in_a_circle_and_a_folder_for_a_file_are_refused(model: Path, target: str) -> None:
    shard = first_shard(model)
    shard.unlink()
    if target == "folder":
        shard.mkdir()
    else:
        shard.symlink_to(shard.name)
    with pytest.raises(UserError, match=shard.name):
        open_checkpoint(model)


# Hostile safetensors


@pytest.fixture(scope="module")
def shard_bytes(pico: Path) -> bytes:
    return first_shard(pico).read_bytes()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_to_a_header_is_refused_or_harmless(
    shard_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header_end = 8 + int.from_bytes(shard_bytes[:8], "little")
    content = bytearray(shard_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), header_end, header_end - 5, 7]))]
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    path.write_bytes(content)
    refusal = ""
    try:
        _, entries = read_header(path, path.name)
    except UserError as error:
        refusal, entries = str(error), []
    assert not refusal or refusal.startswith(str(path))
    assert all(8 <= entry.begin <= entry.end <= len(content) for entry in entries)


@given(length=st.integers(0, 5000))
@settings(max_examples=60, deadline=None)
def test_a_shard_cut_anywhere_is_refused(
    shard_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, length: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    path.write_bytes(shard_bytes[: min(length, len(shard_bytes) - 1)])
    with pytest.raises(UserError, match=r"model.safetensors: is truncated"):
        read_header(path, path.name)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": F32, "b": F32}, "tensor 'b' overlaps another or leaves a gap"),
        ({"a": {**F32, "data_offsets": [8, 16]}}, "overlaps another or leaves a gap"),
        ({"a": {**F32, "data_offsets": [0, 4]}}, "entry of tensor 'a' is damaged"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, "entry of tensor 'a' is damaged"),
        ({"a": {**F32, "shape": [-2]}}, "entry of tensor 'a' is damaged"),
        ({"a": {**F32, "shape": [2.0]}}, "entry of tensor 'a' is damaged"),
        ({"a": {**F32, "shape": [True, 2]}}, "entry of tensor 'a' is damaged"),
        ({"a": {**F32, "shape": [2**62, 2**62, 0]}}, "entry of tensor 'a' is damaged"),
        ({"a": {**F32, "shape": [10**3000, 10**3000]}}, "entry of tensor 'a' is damaged"),
        ({"a": {**F32, "shape": [1] * 70 + [2]}}, "entry of tensor 'a' is damaged"),
        ({"a": {**F32, "dtype": "F31"}}, "has dtype 'F31', expected one of"),
        ({"a": {**F32, "more": 1}}, "entry of tensor 'a' is damaged"),
        ({"a": [1]}, "entry of tensor 'a' is damaged"),
        ({"\ud800": F32}, "is damaged"),
        ({"__metadata__": {"format": 1}, "a": F32}, "__metadata__ is not text"),
        ({"__metadata__": [], "a": F32}, "__metadata__ is not text"),
        ([], "expected a JSON object"),
    ],
)
def test_headers_that_describe_nothing_sound_are_refused(
    tmp_path: Path, header: object, message: str
) -> None:
    content = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + b"\0" * 8)
    with pytest.raises(UserError, match=message) as caught:
        read_header(path, path.name)
    assert str(caught.value).isprintable()


def test_repeated_names_deep_and_huge_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def refusal(content: bytes, length: int | None = None) -> str:
        path.write_bytes((length or len(content)).to_bytes(8, "little") + content)
        with pytest.raises(UserError) as caught:
            read_header(path, path.name)
        return str(caught.value)

    entry = json.dumps(F32)
    assert "'a' is repeated" in refusal(f'{{"a":{entry},"a":{entry}}}'.encode())
    assert "nested too deep" in refusal(b'{"a":' * 100_000)
    with path.open("wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)
    with pytest.raises(UserError, match="its header of 1073741824 bytes is over"):
        read_header(path, path.name)


def test_what_header_bytes_writes_safetensors_and_read_header_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = [
        ("größer", "F32", (2, 1), 8),
        ("empty", "F32", (0, 3), 0),
        ("half", "BF16", (3,), 6),
        ("scalar", "U8", (), 1),
    ]
    header = header_bytes(tensors, {"format": "pt"})
    assert len(header) % 8 == 0
    path.write_bytes(header + bytes(range(15)))
    shard, entries = read_header(path, "model.safetensors")
    assert shard.metadata == {"format": "pt"}
    assert [(e.name, e.dtype, e.shape, e.num_bytes) for e in entries] == tensors
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("half").shape == (3,)
        assert file.get_tensor("scalar") == 14


# Loading


def test_load_model_is_offline_and_gives_the_weights_on_disk(
    pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("loading went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    checkpoint = open_checkpoint(pico)
    model = load_model(checkpoint)
    assert len(load_tokenizer(checkpoint)) == VOCAB_SIZE
    assert not model.training
    assert model.dtype == torch.float32
    expected = LlamaForCausalLM.from_pretrained(pico).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    assert load_model(checkpoint, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(checkpoint, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_transformers_is_told_to_stay_local_and_whom_to_trust(
    pico: Path, monkeypatch: pytest.MonkeyPatch, trust_remote_code: bool
) -> None:
    told: list[dict[str, Any]] = []
    for loader in (AutoModelForCausalLM, AutoTokenizer):
        load = loader.from_pretrained

        def recorded(*args: Any, load: Any = load, **options: Any) -> Any:
            told.append(options)
            return load(*args, **options)

        monkeypatch.setattr(loader, "from_pretrained", recorded)
    checkpoint = open_checkpoint(pico)
    load_model(checkpoint, trust_remote_code=trust_remote_code)
    load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    assert len(told) == 2
    assert all(options["local_files_only"] is True for options in told)
    assert all(options["trust_remote_code"] is trust_remote_code for options in told)


def test_load_model_fills_in_nothing(single: Path) -> None:
    weights = load_file(single / "model.safetensors")

    def refusal(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, single / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError) as caught:
            load_model(open_checkpoint(single))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: value for key, value in weights.items() if key != name}
    assert f"1 missing keys, the first is {name}" in refusal(without)
    assert "1 unexpected keys, the first is model.extra" in refusal(
        {**weights, "model.extra": torch.ones(1)}
    )
    cut = {**weights, name: weights[name][:-1].contiguous()}
    assert f"1 mismatched keys, the first is {name} torch.Size([23, 16]) torch.Size" in refusal(cut)


def test_load_model_refuses_a_head_that_is_neither_tied_nor_there(single: Path) -> None:
    weights = load_file(single / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, single / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys, the first is lm_head.weight"):
        load_model(open_checkpoint(single))
    edit_json(single / "config.json", tie_word_embeddings=True)
    model = load_model(open_checkpoint(single))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_load_model_names_what_transformers_cannot_load(model: Path) -> None:
    edit_json(model / "config.json", model_type="unheard_of")
    with pytest.raises(UserError, match=r"transformers cannot load it: .*unheard_of") as caught:
        load_model(open_checkpoint(model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "device 'abacus' does not exist"),
        ({"device": "cuda:99"}, "device 'cuda:99': torch sees no such GPU"),
        ({"dtype": "float12"}, "dtype 'float12' does not exist"),
        ({"dtype": "nn"}, "dtype 'nn' does not exist"),
    ],
)
def test_load_model_names_a_device_or_dtype_that_is_not_there(
    pico: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_model(open_checkpoint(pico), **options)


def test_code_runs_only_where_it_is_trusted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sung = tmp_path / "sung"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (model / "canary.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(sung)!r}).touch()\n"
        "class CanaryConfig(LlamaConfig):\n    model_type = 'trsp_canary'\n"
    )
    edit_json(
        model / "config.json",
        model_type="trsp_canary",
        auto_map={"AutoConfig": "canary.CanaryConfig"},
    )
    with pytest.raises(UserError, match="--trust-remote-code"):
        open_checkpoint(model)
    checkpoint = open_checkpoint(model, trust_remote_code=True)
    assert checkpoint.trust_remote_code
    with pytest.raises(UserError, match="trust_remote_code"):
        load_model(checkpoint)
    assert not sung.exists()
    with pytest.raises(UserError, match="CanaryConfig"):
        load_model(checkpoint, trust_remote_code=True)
    assert sung.exists()


def test_an_auto_map_of_the_tokenizer_needs_trust_too(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]})
    with pytest.raises(UserError, match=r"tokenizer_config.json: its auto_map"):
        open_checkpoint(model)


# Tokenizers


def test_the_models_own_tokenizer_is_accepted(pico: Path) -> None:
    checkpoint = open_checkpoint(pico)
    check_tokenizer(checkpoint, load_tokenizer(checkpoint))
    check_tokenizer(checkpoint, make_tokenizer(VOCAB_SIZE - 5))


def test_a_tokenizer_of_another_vocabulary_is_refused(pico: Path) -> None:
    with pytest.raises(UserError, match=r"token ids up to 24, and the model .* has 24 embeddings"):
        check_tokenizer(open_checkpoint(pico), make_tokenizer(VOCAB_SIZE + 1))


def test_a_tokenizer_with_a_gap_in_its_ids_is_measured_by_its_largest(pico: Path) -> None:
    words = {"w0": 0, "w1": 1, "w2": 2, "far": VOCAB_SIZE}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)))
    with pytest.raises(UserError, match="token ids up to 24"):
        check_tokenizer(open_checkpoint(pico), tokenizer)


@pytest.mark.parametrize(("bos", "eos", "field"), [("w3", "w2", "bos"), ("w1", "w3", "eos")])
def test_a_tokenizer_with_other_special_tokens_is_refused(
    pico: Path, bos: str, eos: str, field: str
) -> None:
    with pytest.raises(UserError, match=rf"its {field}_token_id is 3, and the model .* \[[12]\]"):
        check_tokenizer(open_checkpoint(pico), make_tokenizer(VOCAB_SIZE, bos, eos))


def test_an_end_of_text_that_the_generation_config_names_is_accepted(model: Path) -> None:
    edit_json(model / "generation_config.json", eos_token_id=[2, 3])
    check_tokenizer(open_checkpoint(model), make_tokenizer(VOCAB_SIZE, "w1", "w3"))
    edit_json(model / "config.json", eos_token_id=None, bos_token_id=None)
    edit_json(model / "generation_config.json", eos_token_id=None, bos_token_id=None)
    check_tokenizer(open_checkpoint(model), make_tokenizer(VOCAB_SIZE, "w7", "w8"))


def test_a_folder_without_tokenizer_is_refused(single: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer files"):
        load_tokenizer(open_checkpoint(single))


def test_a_broken_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="transformers cannot load it"):
        load_tokenizer(open_checkpoint(model))
