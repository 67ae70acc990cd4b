"""The whole job for each supported family: random weights, real classes, bf16 and sharded too."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from trsp.pruner import api

SHAPE: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GEMMA: dict[str, Any] = {**SHAPE, "head_dim": 16, "sliding_window": 8}
SLIDING = ["sliding_attention", "full_attention", "full_attention"] * 2
CONFIGS = {
    "mistral": MistralConfig(**SHAPE),
    "qwen2": Qwen2Config(
        **SHAPE, use_sliding_window=True, max_window_layers=3, tie_word_embeddings=True
    ),
    "qwen3": Qwen3Config(
        **SHAPE, head_dim=16, layer_types=SLIDING, use_sliding_window=True, sliding_window=8
    ),
    "phi3": Phi3Config(**SHAPE),
    "gemma2": Gemma2Config(**GEMMA),
    "gemma3": Gemma3TextConfig(**GEMMA),
    "gpt2": GPT2Config(
        vocab_size=288, n_embd=32, n_layer=6, n_head=2, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    ),
    "opt": OPTConfig(
        vocab_size=288, hidden_size=32, ffn_dim=48, num_hidden_layers=6, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_prune_and_prove(
    family: str, dtype: str, pico_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    dense = tmp_path / "dense"
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=getattr(torch, dtype))
    model.save_pretrained(dense, max_shard_size="60KB" if dtype == "bfloat16" else "50GB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pico_llama / file, dense / file)
    settings = (
        "calibration.num_sequences=4", "calibration.sequence_length=16",
        "selection.first_round_steps=2", "selection.round_steps=2", "selection.batch_size=2",
        "selection.num_candidates=2", "transfer.steps=3", "transfer.batch_size=2",
    )  # fmt: skip
    report = api.prune(
        dense, tmp_path / "out", layers=2, data=[text_file], settings=settings, vllm="off"
    )
    assert report["proof"]["passed"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((dense / "config.json").read_text())
    if "layer_types" in config:
        assert config["layer_types"] == [before["layer_types"][i] for i in report["kept"]]
    stored = {path.name for path in (tmp_path / "out").glob("*.safetensors*")}
    assert ("model.safetensors.index.json" in stored) == (len(stored) > 1)
