"""Checkpoints of 100 GB and of many shards: what is read is headers, what is held is little.

Their data are holes in sparse files. Each case runs in a process of its own, which tells what it
used; a process without torch.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trsp.pruner.safetensors_header import header_bytes

NUM_LAYERS, NUM_SHARDS = 80, 25
CONFIG = {"model_type": "llama", "num_hidden_layers": NUM_LAYERS, "architectures": ["L"]}
# A linear layer of 70B models in bf16: 8192 x 28672 takes 470 MB; 9 of them a layer, and more.
WIDTH, INNER = 8192, 28672
MODULES = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (1024, WIDTH),
    "self_attn.v_proj": (1024, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER), "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}  # fmt: skip

PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.compaction import compact, plan_compaction
from trsp.pruner.layer_map import BaseModel, LayerMap

folder, out, kept, num_files = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, num_files))
started = time.process_time()
checkpoint = open_checkpoint(folder)
base = BaseModel("big", checkpoint.num_hidden_layers, checkpoint.fingerprint)
plan = plan_compaction(checkpoint, LayerMap.from_keep(base, kept))
if out:
    compact(checkpoint, LayerMap.from_keep(base, kept), out)
# The high-water mark of this program alone; ru_maxrss is inherited from the parent over exec.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "seconds": time.process_time() - started,
    "peak_bytes": 1024 * int(peak),
    "read": plan.num_bytes_read, "written": plan.num_bytes_written, "torch": "torch" in sys.modules,
}))
"""


def write_sparse(folder: Path, shards: list[dict[str, tuple[int, ...]]]) -> int:
    """A checkpoint of these tensors in bf16, without data on disk; its apparent size."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards):
        name = f"model-{number:05d}.safetensors"
        sizes = {key: 2 * _product(shape) for key, shape in tensors.items()}
        header = header_bytes(((k, "BF16", shape, sizes[k]) for k, shape in tensors.items()), {})
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(sizes.values()))
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(sizes.values())
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def run(folder: Path, out: str, kept: list[int], num_files: int) -> dict[str, Any]:
    words = [sys.executable, "-P", "-c", PROGRAM, str(folder), out, json.dumps(kept)]
    done = subprocess.run([*words, str(num_files)], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    assert not result["torch"]
    return result


def test_a_hundred_gigabytes_are_planned_from_their_headers(tmp_path: Path) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(NUM_SHARDS)]
    shards[0]["model.embed_tokens.weight"] = (128256, WIDTH)
    for layer in range(NUM_LAYERS):
        for module, shape in MODULES.items():
            shard = shards[layer * NUM_SHARDS // NUM_LAYERS]
            shard[f"model.layers.{layer}.{module}.weight"] = shape
    total = write_sparse(tmp_path / "dense", shards)
    assert total > 100e9
    kept = list(range(0, NUM_LAYERS, 2))
    used = run(tmp_path / "dense", "", kept, 64)
    assert 0.45 * total < used["written"] < 0.55 * total
    assert used["peak_bytes"] < 100 * 2**20
    assert used["seconds"] < 10


@pytest.mark.parametrize("num_shards", [800])
def test_many_shards_are_copied_with_few_files_open(num_shards: int, tmp_path: Path) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(num_shards)]
    for number in range(num_shards):
        name = f"model.layers.{number % NUM_LAYERS}.mlp.experts.{number // NUM_LAYERS}.weight"
        shards[number][name] = (64, 128)
    total = write_sparse(tmp_path / "dense", shards)
    used = run(tmp_path / "dense", str(tmp_path / "out"), list(range(60)), 64)
    assert used["written"] > 0.75 * total
    assert used["peak_bytes"] < 100 * 2**20
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == num_shards * 60 // NUM_LAYERS
