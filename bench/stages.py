"""What the stages cost: memory and step time of both, compaction against a plain copy, start-up.

    python -m trsp.bench.stages --out stages.json

On random weights: these are costs, not quality. Arms of a comparison alternate within one run and
the ratio of their medians is reported, because a shared CPU is noisy.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trsp.bench.record import write_record
from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.distillation import record_teacher
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.layer_map import LayerMap, write_layer_map
from trsp.pruner.losses import distillation_loss, language_model_loss
from trsp.pruner.recipe import TransferRecipe
from trsp.pruner.run import base_model_of
from trsp.pruner.transfer import TransferLoop

STAGE_1_STEP_BAR = 1.10
STAGE_2_STEP_BAR = 1.15
STATE_BAR = 0.01
COPY_BAR = 2.0
PEAK_BAR_BYTES = 300 * 10**6
HELP_BAR_SECONDS = 0.5

_COMPACT = """
import json, sys
from trsp.pruner.api import compact
from trsp.pruner.cost import StageCost
with StageCost() as cost:
    compact(sys.argv[1], sys.argv[2], sys.argv[3])
print(json.dumps(cost.to_document()))
"""


def random_llama(num_layers: int, hidden_size: int, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    torch.nn.Module.to(model, device)
    return model


def _medians(arms: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each arm; arms take turns in an order that reverses every round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name in list(arms) if repeat % 2 else reversed(list(arms)):
            started = time.perf_counter()
            arms[name]()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def saved_bytes(model: nn.Module, step: Callable[[], Any]) -> int:
    """Bytes of distinct activations that autograd keeps during `step`; parameters not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def measure_stage_1(
    model: LlamaForCausalLM, tokens: Tensor, repeats: int, device: str
) -> dict[str, Any]:
    """A step of gate training against forward and backward of the frozen model."""
    model.requires_grad_(False)
    gated = GatedModel(model)
    num_layers = gated.num_layers
    gates = torch.ones(num_layers, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([gates], lr=1e-3)

    def frozen() -> None:
        embeddings = model.get_input_embeddings()(tokens).requires_grad_(True)
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
        language_model_loss(logits, tokens).backward()

    def gate_step() -> None:
        with gated:
            gated.gates, gated.gated = gates, frozenset(range(num_layers))
            loss = language_model_loss(gated.logits(tokens), tokens)
            optimizer.zero_grad()
            (loss + 1e-3 * gates.abs().sum()).backward()
            optimizer.step()

    seconds = _medians({"frozen model": frozen, "gates": gate_step}, repeats, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = [gates, gates.grad, *(v for s in optimizer.state.values() for v in s.values())]
    state += [parameter.grad for parameter in model.parameters()]
    state_bytes = sum(t.numel() * t.element_size() for t in state if isinstance(t, Tensor))
    activations = {
        "frozen model": saved_bytes(model, frozen),
        "gates": saved_bytes(model, gate_step),
    }
    return {
        "seconds": seconds,
        "step_ratio": seconds["gates"] / seconds["frozen model"],
        "weight_bytes": weights,
        "state_bytes": state_bytes,
        "state_share_of_weights": state_bytes / weights,
        "saved_activation_bytes": activations,
    }


def measure_stage_2(
    model: LlamaForCausalLM, tokens: Tensor, repeats: int, device: str
) -> dict[str, Any]:
    """Steps of transfer against plain fine-tuning: same loss, model, batch and optimizer."""
    num_layers = model.config.num_hidden_layers
    dropped = tuple(range(1, 1 + num_layers // 4))
    teacher = record_teacher(model, tokens, batch_size=len(tokens))
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    common: dict[str, Any] = {"batch_size": len(tokens), "steps": 10_000, "learning_rate": 1e-6}
    recipes = {
        "paper": TransferRecipe(**common, label_weight=1, distill_weight=0, closing="never"),
        "trsp": TransferRecipe(**common, closing="linear"),
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-6, betas=(0.9, 0.95), fused=True)
    sequences = list(range(len(tokens)))
    half_closed = round(recipes["trsp"].closing_fraction * recipes["trsp"].steps / 2)

    def plain(loss_of: Callable[[Tensor], Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model(input_ids=tokens, use_cache=False).logits)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()

    def transfer_step(loop: TransferLoop, step: int) -> None:
        with loop.gated:
            loop.step(step)

    loops = {
        name: TransferLoop(
            GatedModel(model), parameters, tokens, recipe, dropped,
            teacher if recipe.distill_weight else None, seed=0,
        )
        for name, recipe in recipes.items()
    }  # fmt: skip
    arms: dict[str, Callable[[], Any]] = {
        "fine-tuning, labels": lambda: plain(lambda logits: language_model_loss(logits, tokens)),
        "paper": lambda: transfer_step(loops["paper"], 1),
        "fine-tuning, distillation": lambda: plain(
            lambda logits: distillation_loss(logits, teacher.logits(sequences), 1.0)
        ),
        # Half-way through a linear closing every chosen layer is gated and measured: the
        # dearest step.
        "trsp": lambda: transfer_step(loops["trsp"], half_closed),
    }
    seconds = _medians(arms, repeats, device)
    return {
        "seconds": seconds,
        "step_ratio": {
            "paper": seconds["paper"] / seconds["fine-tuning, labels"],
            "trsp": seconds["trsp"] / seconds["fine-tuning, distillation"],
            "trsp against labels": seconds["trsp"] / seconds["fine-tuning, labels"],
        },
    }


def measure_compaction(folder: Path, num_layers: int, hidden_size: int) -> dict[str, Any]:
    """Compaction in a process of its own against a copy, with fsync, of the bytes it writes."""
    model = random_llama(num_layers, hidden_size, "cpu")
    dense = folder / "dense"
    model.save_pretrained(dense, max_shard_size="200MB")
    del model
    checkpoint = open_checkpoint(dense)
    dropped = tuple(range(1, 1 + num_layers // 4))
    layer_map = folder / "layer_map.json"
    write_layer_map(LayerMap.from_removal_order(base_model_of(checkpoint), dropped), layer_map)
    seconds: dict[str, list[float]] = {"compaction": [], "copy": []}
    peak = 0
    written = 0
    for repeat in range(4):
        out = folder / f"out-{repeat}"
        done = subprocess.run(
            [sys.executable, "-c", _COMPACT, str(dense), str(layer_map), str(out)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        cost = json.loads(done.stdout)
        copied = folder / f"copy-{repeat}"
        started = time.perf_counter()
        copied.mkdir()
        written = 0
        for shard in sorted(out.glob("*.safetensors")):
            shutil.copyfile(shard, copied / shard.name)
            with (copied / shard.name).open("rb") as file:
                os.fsync(file.fileno())
            written += shard.stat().st_size
        if repeat:
            seconds["compaction"].append(cost["seconds"])
            seconds["copy"].append(time.perf_counter() - started)
            peak = max(peak, cost["peak_bytes"])
        shutil.rmtree(out)
        shutil.rmtree(copied)
    shard_bytes = max(file.stat().st_size for file in dense.glob("*.safetensors"))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": medians,
        "time_ratio_to_copy": medians["compaction"] / medians["copy"],
        "written_bytes": written,
        "largest_shard_bytes": shard_bytes,
        "peak_bytes": peak,
        "peak_beyond_largest_shard_bytes": peak - shard_bytes,
    }


def measure_start_up() -> dict[str, Any]:
    """`trsp --help` and reading a layer map, each in a new process."""
    script = Path(sys.executable).with_name("trsp")
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run([str(script), "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    probe = "import sys, trsp.pruner.layer_map; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return {
        "help_seconds": statistics.median(seconds),
        "layer_map_imports_torch": done.stdout.strip() == "True",
    }


def results_table(record: dict[str, Any]) -> Table:
    """Measured value, bar and verdict of each figure."""
    stage_1, stage_2 = record["stage_1"], record["stage_2"]
    compaction, start_up = record["compaction"], record["start_up"]
    beyond = compaction["peak_beyond_largest_shard_bytes"]
    rows = [
        ("stage 1: step, x frozen forward + backward", stage_1["step_ratio"], STAGE_1_STEP_BAR),
        ("stage 1: state, share of the weights", stage_1["state_share_of_weights"], STATE_BAR),
        ("stage 2, paper: step, x fine-tuning", stage_2["step_ratio"]["paper"], STAGE_2_STEP_BAR),
        ("stage 2, trsp: step, x distillation", stage_2["step_ratio"]["trsp"], STAGE_2_STEP_BAR),
        ("compaction: time, x copy of what it writes", compaction["time_ratio_to_copy"], COPY_BAR),
        ("compaction: peak beyond a shard, MB", beyond / 1e6, PEAK_BAR_BYTES / 1e6),
        ("trsp --help, s", start_up["help_seconds"], HELP_BAR_SECONDS),
    ]
    table = Table("figure", "measured", "bar", "met")
    for name, measured, bar in rows:
        table.add_row(name, f"{measured:.3g}", f"{bar:g}", "yes" if measured <= bar else "NO")
    imports = start_up["layer_map_imports_torch"]
    table.add_row(
        "reading a layer map imports torch", str(imports), "False", "NO" if imports else "yes"
    )
    return table


def main() -> None:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON record to write")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--checkpoint-hidden-size", type=int, default=1536)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = arguments.device
    model = random_llama(arguments.layers, arguments.hidden_size, device)
    shape = (arguments.batch_size, arguments.sequence_length)
    tokens = torch.randint(0, 4096, shape, generator=torch.Generator().manual_seed(0)).to(device)
    record: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}}
    record["stage_1"] = measure_stage_1(model, tokens, arguments.repeats, device)
    record["stage_2"] = measure_stage_2(model, tokens, arguments.repeats, device)
    del model
    with tempfile.TemporaryDirectory() as folder:
        record["compaction"] = measure_compaction(
            Path(folder), arguments.layers, arguments.checkpoint_hidden_size
        )
    record["start_up"] = measure_start_up()
    write_record(arguments.out, record)
    console = Console(soft_wrap=True)
    console.print(results_table(record))
    stage_1 = record["stage_1"]["saved_activation_bytes"]
    more = stage_1["gates"] / stage_1["frozen model"] - 1
    console.print(f"stage 1 keeps {more:+.1%} activations against the frozen model")
    console.print(f"record: {arguments.out}")


if __name__ == "__main__":
    main()
