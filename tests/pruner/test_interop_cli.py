"""`trsp map` and `trsp adapter`: what other tools wrote comes in, what they read goes out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from trsp.bench.cli import app
from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.layer_map import LayerMap, read_layer_map

SLEB = "Model Name: org/model\n# Total Blocks: 6\nBlock Removal Order: [4, 1]\n"


def call(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: Any) -> str:
    """The one line that a mistake gives."""
    result = call(*arguments, code=2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    line: str = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


@pytest.fixture
def layer_map(pico_llama: Path, tmp_path: Path) -> Path:
    """The map of the pico Llama without its layers 4 and 1, removed in this order."""
    source, out = tmp_path / "sleb.txt", tmp_path / "map.json"
    source.write_text(SLEB, "utf-8")
    call("map", source, "--model", pico_llama, "--out", out)
    return out


def test_an_imported_list_is_a_map_that_compacts(pico_llama: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "slices.yaml", tmp_path / "layer_map.json"
    pieces = [
        {"sources": [{"model": "org/model", "layer_range": r}]} for r in ([0, 2], [3, 6])
    ]  # fmt: skip
    document = {"slices": pieces, "merge_method": "passthrough", "dtype": "bfloat16"}
    source.write_text(yaml.safe_dump(document), "utf-8")
    done = call("map", source, "--model", pico_llama, "--out", out)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "read as mergekit list",
        "kept     0, 1, 3, 4, 5",
        "dropped  2",
        f"made for org/model, used for {pico_llama}",
        "its dtype bfloat16 is not applied: weights keep theirs",
    ]
    layer_map = read_layer_map(out)
    assert layer_map.kept == (0, 1, 3, 4, 5)
    assert layer_map.base_model.fingerprint == open_checkpoint(pico_llama).fingerprint
    call("compact", pico_llama, out, "--out", tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text("utf-8"))
    assert config["num_hidden_layers"] == 5
    weights = load_file(tmp_path / "pruned" / "model.safetensors")
    dense = load_file(pico_llama / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(weights[name.format(2)], dense[name.format(3)])


@pytest.mark.parametrize(
    ("form", "listed"), [("json", ()), ("mergekit", ()), ("llama-cpp", ("--list", "drop"))]
)
def test_what_goes_out_comes_in_again(
    pico_llama: Path, layer_map: Path, tmp_path: Path, form: str, listed: tuple[str, ...]
) -> None:
    exported, again = tmp_path / "exported", tmp_path / "again.json"
    call("map", layer_map, "--format", form, "--out", exported)
    model = () if form == "json" else ("--model", pico_llama)
    call("map", exported, *model, *listed, "--out", again)
    before, after = read_layer_map(layer_map), read_layer_map(again)
    assert after.kept == before.kept == (0, 2, 3, 5)
    assert after.base_model == before.base_model


def test_stdout_is_the_file(pico_llama: Path, layer_map: Path, tmp_path: Path) -> None:
    for form in ("json", "mergekit", "llama-cpp"):
        out = tmp_path / form
        call("map", layer_map, "--format", form, "--out", out)
        assert call("map", layer_map, "--format", form).stdout == out.read_text("utf-8")


def test_an_order_of_removal_has_prefixes(pico_llama: Path, layer_map: Path) -> None:
    assert read_layer_map(layer_map).removal_order == (4, 1)
    shown = call("map", layer_map, "--prefix", 1, "--format", "llama-cpp").stdout
    assert shown == "4\n"
    error = refused("map", layer_map, "--prefix", 3)
    assert "3" in error


def test_a_plain_list(pico_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "list.txt"
    source.write_text("0-2,5", "utf-8")
    words = ("map", source, "--model", pico_llama, "--format", "llama-cpp")
    assert call(*words, "--list", "keep").stdout == "3,4\n"
    assert call(*words, "--list", "drop").stdout == "0,1,2,5\n"


def test_mistakes_at_the_map(pico_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "list.txt"
    source.write_text("4,1", "utf-8")
    for words, message in (
        ([], "another tool's file is read with --model"),
        (["--list", "drop"], "--list and --trust-remote-code need --model"),
        (["--trust-remote-code"], "--list and --trust-remote-code need --model"),
        (["--model", pico_llama], "say --list keep or --list drop"),
        (["--model", pico_llama, "--list", "remove"], "'remove' is unknown; choose keep or drop"),
        (["--model", tmp_path, "--list", "drop"], "config.json"),
        (
            ["--model", pico_llama, "--list", "drop", "--format", "yaml"],
            "'yaml' is unknown; choose from json, mergekit, llama-cpp",
        ),
        (["--model", pico_llama, "--list", "drop", "--out", tmp_path], "name of a file"),
        (["--model", pico_llama, "--list", "drop", "--out", source / "x"], "name of a file"),
    ):
        assert re.search(re.escape(message), refused("map", source, *words)), words


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA of every layer of the pico Llama, written by hand."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(
        {
            f"base_model.model.model.layers.{n}.mlp.up_proj.lora_{part}.weight": torch.full((2,), n)
            for n in range(6)
            for part in "AB"
        },
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "target_modules": ["up_proj"], "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def layers_of(adapter: Path) -> list[int]:
    weights = load_file(adapter / "adapter_model.safetensors")
    names = [f"base_model.model.model.layers.{n}.mlp.up_proj.lora_A.weight" for n in range(6)]
    return [int(weights[name][0]) for name in names if name in weights]


def test_an_adapter_follows_its_model(layer_map: Path, adapter: Path, tmp_path: Path) -> None:
    done = call("adapter", adapter, layer_map, "--out", tmp_path / "out", "--base-model", "org/p")
    assert done.stdout == f"{tmp_path / 'out'}: for the 4 layers of the pruned model\n"
    assert layers_of(tmp_path / "out") == [0, 2, 3, 5]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "org/p"
    call("adapter", adapter, layer_map, "--out", tmp_path / "one", "--prefix", 1)
    assert layers_of(tmp_path / "one") == [0, 1, 2, 3, 5]
    assert read_layer_map(tmp_path / "one" / "layer_map.json").dropped == (4,)


def test_mistakes_at_the_adapter(layer_map: Path, adapter: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "give the folder of a PEFT adapter" in refused("adapter", tmp_path, layer_map, *out)
    assert "adapter_config.json" in refused(
        "adapter", adapter, adapter / "adapter_config.json", *out
    )
    other = read_layer_map(layer_map)
    shallow = LayerMap.from_drop(type(other.base_model)("org/small", 4, "a" * 64), (1,))
    (tmp_path / "shallow.json").write_text(shallow.to_json(), "utf-8")
    error = refused("adapter", adapter, tmp_path / "shallow.json", *out)
    assert "adapts layer 4, and the layer map is for a model of layers 0 to 3" in error
    call("adapter", adapter, layer_map, *out)
    assert "already exists" in refused("adapter", adapter, layer_map, *out)
    call("adapter", adapter, layer_map, *out, "--overwrite")
