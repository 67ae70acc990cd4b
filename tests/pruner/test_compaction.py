"""A compacted checkpoint is the dense one without the dropped layers, to the bit, or it is not."""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
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
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trsp.pruner import compaction
from trsp.pruner.checkpoint import Checkpoint, load_model, open_checkpoint
from trsp.pruner.compaction import compact, plan_compaction
from trsp.pruner.durable import run_lock, sweep_leftovers, verify_manifest
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.layer_map import BaseModel, LayerMap, read_layer_map
from trsp.pruner.safetensors_header import header_bytes

RunKilled = Callable[[Callable[[], object], int], bool]

VOCAB_SIZE, NUM_LAYERS = 40, 6
KEPT = (0, 2, 3, 5)
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_SIZES: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 24,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
WINDOW: dict[str, Any] = {"sliding_window": 4}


def layer_map_of(checkpoint: Checkpoint, kept: tuple[int, ...] = KEPT) -> LayerMap:
    base = BaseModel("base", checkpoint.num_hidden_layers, checkpoint.fingerprint)
    return LayerMap.from_keep(base, kept)


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Make every parameter matter, so that a layer out of place shows in the logits."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.eval()
    return model


def logits_of(model: PreTrainedModel) -> Tensor:
    input_ids = torch.arange(24).reshape(2, 12) % VOCAB_SIZE
    with torch.no_grad():
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def remove_layers(model: PreTrainedModel, path: str, kept: tuple[int, ...]) -> PreTrainedModel:
    """Take the dropped layers out of the ModuleList, and out of the lists that run beside it."""
    parent = model.get_submodule(path.rpartition(".")[0])
    layers = list(parent.get_submodule(path.rpartition(".")[2]).children())
    setattr(parent, path.rpartition(".")[2], nn.ModuleList([layers[i] for i in kept]))
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.config.num_hidden_layers = len(kept)
    return model


FAMILIES: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "llama": ("model.layers", lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES))),
    "llama tied": (
        "model.layers",
        lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_SIZES, tie_word_embeddings=True)),
    ),
    "mistral": ("model.layers", lambda: MistralForCausalLM(MistralConfig(**LLAMA_SIZES, **WINDOW))),
    "qwen2 with windows": (
        "model.layers",
        lambda: Qwen2ForCausalLM(
            Qwen2Config(
                **SIZES,
                **WINDOW,
                intermediate_size=24,
                num_key_value_heads=1,
                use_sliding_window=True,
                max_window_layers=3,
            )
        ),
    ),
    "qwen3": ("model.layers", lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA_SIZES))),
    "phi3": (
        "model.layers",
        lambda: Phi3ForCausalLM(Phi3Config(**SIZES, intermediate_size=24, num_key_value_heads=1)),
    ),
    "gemma2": ("model.layers", lambda: Gemma2ForCausalLM(Gemma2Config(**LLAMA_SIZES, **WINDOW))),
    "gemma3": (
        "model.layers",
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**LLAMA_SIZES, **WINDOW)),
    ),
    "opt": (
        "model.decoder.layers",
        lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16)),
    ),
    "gpt2": (
        "transformer.h",
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB_SIZE,
                n_embd=16,
                n_layer=NUM_LAYERS,
                n_head=2,
                n_positions=32,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["8KB", "1GB"])
def test_the_compacted_model_is_the_dense_one_without_the_layers(
    tmp_path: Path, family: str, max_shard_size: str
) -> None:
    path, build = FAMILIES[family]
    dense = randomize(build())
    dense.save_pretrained(tmp_path / "dense", max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(tmp_path / "dense")
    assert (len(checkpoint.shards) > 2) == (max_shard_size == "8KB")
    out = compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out")
    pruned = load_model(open_checkpoint(out))
    full = logits_of(dense)
    expected = logits_of(remove_layers(dense, path, KEPT))
    assert torch.equal(logits_of(pruned), expected)
    assert not torch.allclose(full, expected, rtol=1e-2), "the dropped layers must matter"
    assert type(pruned) is type(dense)
    assert pruned.config.num_hidden_layers == len(KEPT)
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits_of(stock), expected)


def test_gpt2_without_its_prefix(tmp_path: Path) -> None:
    dense = randomize(FAMILIES["gpt2"][1]())
    dense.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    weights = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    # As the first GPT-2 files on the hub have it: with the causal masks that are no parameters.
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 32, 32).tril() for n in range(NUM_LAYERS)}
    save_file({**weights, **masks}, file, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "dense")
    assert checkpoint.layer_prefix == "h."
    out = compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out")
    expected = logits_of(remove_layers(dense, "transformer.h", KEPT))
    assert torch.equal(logits_of(load_model(open_checkpoint(out))), expected)


@pytest.mark.parametrize("stored", ["embedding only", "both"])
def test_tied_embeddings_stay_as_they_are_stored(tmp_path: Path, stored: str) -> None:
    dense = randomize(FAMILIES["llama tied"][1]())
    dense.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    weights = load_file(file)
    assert "lm_head.weight" not in weights
    if stored == "both":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, file, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "dense")
    out = compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out")
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (stored == "both")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    pruned = load_model(open_checkpoint(out))
    assert pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight
    expected = logits_of(remove_layers(dense, "model.layers", KEPT))
    assert torch.equal(logits_of(pruned), expected)


def test_the_layers_of_a_text_config_are_cut_and_the_vision_tower_is_not(tmp_path: Path) -> None:
    vision = [f"vision_tower.encoder.layers.{n}.a" for n in range(NUM_LAYERS)]
    text = [f"language_model.model.layers.{n}.a" for n in range(NUM_LAYERS)]
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate([*vision, *text])}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "num_hidden_layers": NUM_LAYERS},
        "vision_config": {"num_hidden_layers": NUM_LAYERS},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    out = compact(checkpoint, layer_map_of(checkpoint), tmp_path.with_name("out"))
    written = load_file(out / "model.safetensors")
    assert {name for name in written if name.startswith("vision")} == set(vision)
    for layer, old in enumerate(KEPT):
        name = "language_model.model.layers.{}.a"
        assert torch.equal(written[name.format(layer)], tensors[name.format(old)])
    assert len(written) == NUM_LAYERS + len(KEPT)
    new_config = json.loads((out / "config.json").read_text())
    assert new_config["text_config"]["num_hidden_layers"] == len(KEPT)
    assert new_config["vision_config"] == config["vision_config"]


# The folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in many shards, with tokenizer, chat template and things that must not travel."""
    folder = tmp_path_factory.mktemp("sharded") / "dense"
    model = randomize(FAMILIES["llama"][1]())
    model.save_pretrained(folder, max_shard_size="3KB")
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), bos_token="w1", eos_token="w2"
    )
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ 1 / 0 }}{{ ''.__class__.__mro__ }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ boom() }}")
    for name in COMPANIONS_ADDED + STRANGERS:
        (folder / name).write_text(f"content of {name}")
    return folder


COMPANIONS_ADDED = ["LICENSE", "LICENSE.txt", "NOTICE", "vocab.txt", "merges.txt", "spiece.model"]
STRANGERS = [
    *("README.md", "pytorch_model.bin", "tokenizer.pkl", "vocab.pt", "vocab.bin", "modeling.py"),
    *("tokenizer.py", "trainer_state.json", "optimizer.pt", "extra.safetensors", "run.sh"),
]


@pytest.fixture
def checkpoint(sharded: Path) -> Checkpoint:
    return open_checkpoint(sharded)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_the_folder_holds_what_belongs_to_the_model_and_nothing_else(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = compact(
        checkpoint,
        layer_map_of(checkpoint),
        tmp_path / "out",
        extra_files={"README.md": "größer", "recipe.yaml": b"a: 1"},
    )
    shards = {name for name in names_in(out) if name.endswith(".safetensors")}
    copied = {
        *("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        *("chat_template.jinja", "additional_chat_templates/tools.jinja"),
        *COMPANIONS_ADDED,
    }
    made = {
        *("config.json", "model.safetensors.index.json", "layer_map.json", "manifest.json"),
        *("README.md", "recipe.yaml"),
    }
    assert names_in(out) == shards | copied | made
    for name in copied:
        assert (out / name).read_bytes() == (checkpoint.path / name).read_bytes()
    assert (out / "README.md").read_text("utf-8") == "größer"
    count = len(shards)
    assert 1 < count < len(checkpoint.shards)
    assert shards == {f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    verify_manifest(out)
    assert names_in(tmp_path) == {f"out/{name}" for name in names_in(out)}
    assert len(AutoTokenizer.from_pretrained(out)) == VOCAB_SIZE


def test_python_files_travel_only_where_they_are_trusted(sharded: Path, tmp_path: Path) -> None:
    trusted = open_checkpoint(sharded, trust_remote_code=True)
    out = compact(trusted, layer_map_of(trusted), tmp_path / "out")
    assert {"modeling.py", "tokenizer.py"} <= names_in(out)
    assert not {"tokenizer.pkl", "vocab.pt", "run.sh"} & names_in(out)


def test_the_layer_map_tells_what_was_changed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out")
    written = read_layer_map(out / "layer_map.json")
    assert written.kept == KEPT
    (change,) = written.config_changes
    assert (change.field, change.before, change.after) == ("num_hidden_layers", 6, 4)
    before = json.loads((checkpoint.path / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    assert after == {**before, "num_hidden_layers": 4}


def test_index_and_headers_are_what_transformers_writes(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    model = load_model(open_checkpoint(out))
    stored: dict[str, str] = {}
    for path in out.glob("*.safetensors"):
        content = path.read_bytes()
        assert int.from_bytes(content[:8], "little") % 8 == 0
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            stored.update(dict.fromkeys(file.keys(), path.name))
    assert index["weight_map"] == stored
    assert index["metadata"] == {
        "total_size": sum(4 * p.numel() for p in model.parameters()),
        "total_parameters": sum(p.numel() for p in model.parameters()),
    }
    manifest = json.loads((out / "manifest.json").read_text())["files"]
    for name, record in manifest.items():
        content = (out / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def test_shards_are_not_read_again_for_their_digest(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_again: list[str] = []

    def recorded_sha256(path: Path) -> str:
        read_again.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr("trsp.pruner.durable._sha256", recorded_sha256)
    compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out")
    assert "config.json" in read_again
    assert not [name for name in read_again if name.endswith(".safetensors")]


def test_compacting_twice_gives_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compact(checkpoint, layer_map_of(checkpoint), tmp_path / name)
    assert names_in(tmp_path / "a") == names_in(tmp_path / "b")
    for name in names_in(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_compacting_what_was_compacted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    once = open_checkpoint(compact(checkpoint, layer_map_of(checkpoint), tmp_path / "once"))
    twice = compact(once, layer_map_of(once, (0, 3)), tmp_path / "twice")
    straight = compact(checkpoint, layer_map_of(checkpoint, (0, 5)), tmp_path / "straight")
    assert torch.equal(
        logits_of(load_model(open_checkpoint(twice))),
        logits_of(load_model(open_checkpoint(straight))),
    )


def test_keeping_every_layer_is_a_copy(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = compact(checkpoint, layer_map_of(checkpoint, tuple(range(NUM_LAYERS))), tmp_path / "out")
    for name in ("config.json", "tokenizer.json"):
        before, after = checkpoint.path / name, out / name
        assert json.loads(before.read_text()) == json.loads(after.read_text())
    assert open_checkpoint(out).fingerprint == checkpoint.fingerprint


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_kept_tensor_arrives_whole_whatever_the_shards(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("property")
    num_layers = data.draw(st.integers(1, 5))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64])
    shapes = st.lists(st.integers(0, 4), max_size=3)
    names = ["embed.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{n}.{part}" for n in range(num_layers) for part in ("a", "b.weight")]
    tensors = {}
    shards: dict[str, dict[str, Tensor]] = {}
    for i, name in enumerate(names):
        shape = data.draw(shapes)
        tensors[name] = (torch.rand(shape) * 100 + i).to(data.draw(dtypes))
        shard = f"part{data.draw(st.integers(0, 2))}.safetensors"
        shards.setdefault(shard, {})[name] = tensors[name]
    for shard, content in shards.items():
        save_file(content, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, content in shards.items() for name in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": num_layers})
    )
    kept = tuple(
        sorted(data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1), label="kept"))
    )
    checkpoint = open_checkpoint(folder)
    out = folder / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(compaction, "_PIECE_BYTES", data.draw(st.integers(1, 64)))
        compact(checkpoint, layer_map_of(checkpoint, kept), out)
    written: dict[str, Tensor] = {}
    for path in out.glob("*.safetensors"):
        written.update(load_file(path))
    expected = {name: x for name, x in tensors.items() if ".layers." not in name}
    for layer, old in enumerate(kept):
        for part in ("a", "b.weight"):
            expected[f"model.layers.{layer}.{part}"] = tensors[f"model.layers.{old}.{part}"]
    assert written.keys() == expected.keys()
    for name, x in expected.items():
        assert written[name].dtype == x.dtype
        assert torch.equal(written[name], x)
    verify_manifest(out)
    shutil.rmtree(folder)


# The plan


def test_the_plan_says_what_will_be_done_and_writes_nothing(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    plan = plan_compaction(checkpoint, layer_map_of(checkpoint))
    text = plan.describe()
    assert text.splitlines()[0] == "layers     6 -> 4, dropped: 1, 4"
    assert "config     num_hidden_layers: 6 -> 4" in text
    assert "-> nothing, all its layers go" in text
    assert "tokenizer.json" in text
    for shard in plan.shards:
        assert f"{shard.source} (" in text
        assert f"-> {shard.name} (" in text
    out = compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out")
    for shard in plan.shards:
        assert (out / shard.name).stat().st_size == shard.num_bytes
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    companions = sum((out / name).stat().st_size for name in plan.companions)
    assert plan.num_bytes_written == weights + companions
    headers = sum(len(shard.header) for shard in plan.shards)
    assert plan.num_bytes_read == plan.num_bytes_written - headers


def test_progress_counts_the_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    plan = plan_compaction(checkpoint, layer_map_of(checkpoint))
    compact(
        checkpoint,
        layer_map_of(checkpoint),
        tmp_path / "out",
        progress=lambda *report: reports.append(report),
    )
    total = sum(shard.num_bytes for shard in plan.shards)
    assert reports[0] == ("compact", 0, total)
    assert reports[-1] == ("compact", total, total)
    assert [r[1] for r in reports] == sorted(r[1] for r in reports)


# What is refused


def test_a_layer_map_for_another_checkpoint_is_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    deeper = LayerMap.from_keep(BaseModel("other", 8, checkpoint.fingerprint), KEPT)
    with pytest.raises(UserError, match=r"for a model of 8 layers \(other\), and .* has 6"):
        compact(checkpoint, deeper, tmp_path / "out")
    stranger = LayerMap.from_keep(BaseModel("other", NUM_LAYERS, "0" * 64), KEPT)
    with pytest.raises(UserError, match=r"for another model \(other, fingerprint 0{12}\) than"):
        compact(checkpoint, stranger, tmp_path / "out")
    assert names_in(tmp_path) == set()


def test_a_config_that_cannot_be_carried_over_is_refused_by_name(
    sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "dense"))
    config = json.loads((folder / "config.json").read_text())
    config["mystery_by_layer"] = [1, 2, 3, 4, 5, 6]
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UserError, match=r"dense: config.json .*mystery_by_layer"):
        compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused_or_replaced_as_a_whole(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(checkpoint.path, out)
    before = names_in(out)
    with pytest.raises(UserError, match="already exists"):
        compact(checkpoint, layer_map_of(checkpoint), out)
    assert names_in(out) == before
    compact(checkpoint, layer_map_of(checkpoint, (0,)), out, overwrite=True)
    assert not names_in(out) & {"README.md", "pytorch_model.bin", checkpoint.shards[-1].name}
    assert load_model(open_checkpoint(out)).config.num_hidden_layers == 1
    verify_manifest(out)


def test_the_checkpoint_itself_is_never_overwritten(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "models" / "dense"))
    (tmp_path / "models" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    checkpoint = open_checkpoint(folder)
    for out in (folder, tmp_path / "models", tmp_path / "link"):
        with pytest.raises(UserError, match="holds the checkpoint that is read"):
            compact(checkpoint, layer_map_of(checkpoint), out, overwrite=True)
    assert open_checkpoint(folder).fingerprint == checkpoint.fingerprint


@pytest.mark.parametrize(
    "name",
    ["config.json", "layer_map.json", "tokenizer.json", "../out.txt", "a/b", "manifest.json"],
)
def test_an_extra_file_replaces_nothing_and_stays_inside(
    checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match="is a name in use or no base name"):
        compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out", extra_files={name: "x"})
    assert names_in(tmp_path) == set()


def test_a_tokenizer_that_is_a_link_out_of_the_folder_is_refused(
    sharded: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "dense"))
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").symlink_to("/etc/hostname")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UserError, match=r"vocab.txt: is a link out of the checkpoint's folder"):
        compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out")


def test_a_flipped_bit_is_found_where_the_checkpoint_has_a_manifest(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    once = compact(checkpoint, layer_map_of(checkpoint), tmp_path / "once")
    (once / "README.md").write_text("a model card of one's own")
    source = open_checkpoint(once)
    compact(source, layer_map_of(source, (0, 1)), tmp_path / "twice")
    shard = once / source.shards[0].name
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    source = open_checkpoint(once)
    with pytest.raises(UserError, match=f"{shard.name}: its sha256 is not the one in manifest"):
        compact(source, layer_map_of(source, (0, 1)), tmp_path / "thrice")
    assert not (tmp_path / "thrice").exists()


# Faults


def test_a_failed_proof_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    seen: list[Path] = []

    def prove(folder: Path) -> None:
        seen.append(folder)
        assert load_model(open_checkpoint(folder)).config.num_hidden_layers == len(KEPT)
        assert not (tmp_path / "out").exists()
        raise RunError("logits differ")

    with pytest.raises(RunError, match="logits differ"):
        compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out", prove=prove)
    assert seen[0].name == f"out.tmp-{os.getpid()}"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Checkpoint]:
    """Three shards of a few bytes: quick to compact over and over."""
    folder = tmp_path / "dense"
    folder.mkdir()
    weight_map = {}
    for n in range(3):
        name = f"model-{n + 1:05d}-of-00003.safetensors"
        save_file({f"model.layers.{n}.a": torch.full((50,), float(n))}, folder / name)
        weight_map[f"model.layers.{n}.a"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    (folder / "tokenizer.json").write_text("{}")
    yield open_checkpoint(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_anywhere_it_shows_a_whole_model_or_none(
    small: Checkpoint, tmp_path: Path, run_killed: RunKilled, overwrite: bool
) -> None:
    out = tmp_path / "out"
    after = layer_map_of(small, (0, 2))
    before = compact(small, layer_map_of(small, (0,)), small.path / "before")
    num_layers_seen = []
    for nth in range(1, 300):
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(before, out)
        killed = run_killed(lambda: compact(small, after, out, overwrite=overwrite), nth)
        if out.exists():
            verify_manifest(out)
        sweep_leftovers(out)
        num_layers_seen.append(open_checkpoint(out).num_hidden_layers if out.exists() else 0)
        assert {path.name for path in tmp_path.iterdir()} <= {"dense", "out"}
        if not killed:
            break
    assert not killed, "the loop never reached the end of the work"
    assert nth > 30
    assert num_layers_seen[0] == (1 if overwrite else 0)
    assert num_layers_seen[-2:] == [2, 2], "a kill after the rename must leave the new model"
    assert num_layers_seen == sorted(num_layers_seen)


def test_the_next_run_sweeps_what_a_killed_one_left(
    small: Checkpoint, tmp_path: Path, run_killed: RunKilled
) -> None:
    kept = layer_map_of(small, (0, 2))
    assert run_killed(lambda: compact(small, kept, tmp_path / "out"), 20)
    assert [path for path in tmp_path.iterdir() if ".tmp-" in path.name]
    compact(small, kept, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}


def test_every_file_is_synced_before_the_model_gets_its_name(
    small: Checkpoint, tmp_path: Path, file_operations: list[tuple[str, str]]
) -> None:
    out = compact(small, layer_map_of(small, (0, 2)), tmp_path / "out")
    published = file_operations.index(("rename", str(out)))
    synced = {path for kind, path in file_operations[:published] if kind == "fsync"}
    temp = f"{out}.tmp-{os.getpid()}"
    for name in names_in(out) - {"manifest.json"}:
        assert f"{temp}/{name}" in synced
    assert temp in synced
    assert file_operations[published + 1 :] == [("fsync", str(tmp_path))]


def test_a_disk_that_fills_up_at_any_write_leaves_nothing(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, writes_left = os.write, 0

    def full_at_last(descriptor: int, data: Any) -> int:
        nonlocal writes_left
        writes_left -= 1
        if writes_left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: max(1, len(data) // 2)])

    monkeypatch.setattr(os, "write", full_at_last)
    refusals = 0
    for nth in range(1, 200):
        writes_left = nth
        try:
            compact(small, layer_map_of(small, (0, 2)), tmp_path / "out")
        except RunError as error:
            refusals += 1
            assert "No space left" in (message := str(error)), message  # noqa: PT017
            assert {path.name for path in tmp_path.iterdir()} == {"dense"}
        else:
            break
    assert refusals > 10, "header and tensors are written in pieces here"
    verify_manifest(tmp_path / "out")


def test_a_file_size_limit_names_the_bytes_needed_and_free(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"File too large, .* kB needed and .* free; nothing"):
            compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_writing(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trsp.pruner.durable._free_bytes", lambda path: 1000)
    with pytest.raises(RunError, match=r"not enough disk space, .* kB needed and 1.0 kB free"):
        compact(checkpoint, layer_map_of(checkpoint), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_changes_meanwhile_is_noticed(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = small.path / small.shards[2].name
    kept = layer_map_of(small, (0, 2))
    monkeypatch.setattr(compaction, "_PIECE_BYTES", 16)

    def cut(task: str, completed: int, total: int) -> None:
        if completed > total - 150:
            os.truncate(shard, shard.stat().st_size // 2)

    with pytest.raises(RunError, match=f"{shard.name}: was cut while it was read"):
        compact(small, kept, tmp_path / "out", progress=cut)
    with pytest.raises(RunError, match=f"{shard.name}: changed since it was opened"):
        compact(small, kept, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_a_second_run_on_the_same_output_is_refused(small: Checkpoint, tmp_path: Path) -> None:
    refused: list[str] = []

    def compact_too() -> None:
        try:
            compact(small, layer_map_of(small, (0, 2)), tmp_path / "out")
        except UserError as error:
            refused.append(str(error))

    with run_lock(tmp_path / "out"):
        thread = threading.Thread(target=compact_too)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert "another run" in refused[0]


# Memory


MEASURED = """
import sys
from pathlib import Path
from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.compaction import compact
from trsp.pruner.layer_map import BaseModel, LayerMap
checkpoint = open_checkpoint(Path(sys.argv[1]))
base = BaseModel("base", checkpoint.num_hidden_layers, checkpoint.fingerprint)
compact(checkpoint, LayerMap.from_keep(base, [0, 2, 3]), Path(sys.argv[2]))
assert "torch" not in sys.modules and "numpy" not in sys.modules
# The high-water mark of this program alone; ru_maxrss is inherited from the parent over exec.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_peak_memory_is_far_below_the_largest_shard(tmp_path: Path) -> None:
    num_layers, layer_bytes = 4, 60 * 2**20
    tensors = [
        (f"model.layers.{n}.a", "U8", (layer_bytes,), layer_bytes) for n in range(num_layers)
    ]
    header = header_bytes(tensors, {"format": "pt"})
    source = tmp_path / "dense"
    source.mkdir()
    with (source / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + num_layers * layer_bytes)
    (source / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 4}')
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peak_bytes = int(result.stdout) * 1024
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 3 * layer_bytes
    shutil.rmtree(tmp_path / "out")
    # The promise is the largest shard + 300 MB; two buffers and the interpreter are 45 MB.
    assert peak_bytes < 100 * 2**20
