"""The whole job for families of every kind: random weights, real classes, bf16 and sharded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trsp.bench.pico_checkpoint import pico_text, write_pico_checkpoint
from trsp.pruner import api

SETTINGS = (
    "calibration.num_sequences=4", "calibration.sequence_length=16",
    "selection.first_round_steps=2", "selection.round_steps=2", "selection.batch_size=2",
    "selection.num_candidates=2", "transfer.steps=3", "transfer.batch_size=2",
)  # fmt: skip
# By what is special: plain, windows, tied, norms behind branches, fused tensors, absolute
# positions, experts, linear attention, side results, draft layers, image towers.
SHARDED = (
    "mistral", "qwen2", "gemma2", "phi3", "gpt2", "opt", "qwen3_moe", "qwen3_next", "llama4_text",
    "gptj", "deepseek_v3", "gemma3", "llava",
)  # fmt: skip
IN_ONE_FILE = ("qwen3", "gemma3_text", "opt_projected", "falcon", "qwen3_vl")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.bfloat16) for family in SHARDED]
    + [(family, torch.float32) for family in IN_ONE_FILE],
)
def test_prune_and_prove(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense, out, text = tmp_path / "dense", tmp_path / "out", tmp_path / "text.txt"
    sharded = dtype == torch.bfloat16
    write_pico_checkpoint(family, dense, dtype=dtype, max_shard_size="60KB" if sharded else "50GB")
    text.write_text(pico_text(400), "utf-8")
    report = api.prune(dense, out, layers=2, data=[text], settings=SETTINGS, vllm="off")
    assert report["proof"]["passed"]
    before, config = (_text_config(folder) for folder in (dense, out))
    if "layer_types" in config:
        assert config["layer_types"] == [before["layer_types"][i] for i in report["kept"]]
    stored = {path.name for path in out.glob("*.safetensors*")}
    assert ("model.safetensors.index.json" in stored) == (len(stored) > 1)


def _text_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    text: dict[str, Any] = config.get("text_config") or config
    return text
