"""What a CPU can time honestly: the reference path beside eager torch, compaction, layer maps.

In the normal suite (`--benchmark-disable` in pyproject.toml) each runs once, untimed, and its
result is checked. To time them, save a record, and compare a later commit with it on the same
machine (`--benchmark-enable` overrides the setting):

    pytest tests/bench/test_cpu_benchmarks.py --benchmark-enable --benchmark-autosave
    pytest tests/bench/test_cpu_benchmarks.py --benchmark-enable --benchmark-compare \\
        --benchmark-compare-fail=median:10%

Records are JSON in .benchmarks/<platform>/, elsewhere with --benchmark-storage=FOLDER. The second
command fails where a median grew by more than a tenth, where there is no record, and where the
record is of another processor, number of cores or threads, or torch (tests/bench/conftest.py). Run
both on an idle machine: beside other work the medians of equal code were seen 50 % apart.

T = 512 tokens, D = 1024, fp32.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from trsp.bench.kernel_arms import Arm, arm_forward, arm_gradients
from trsp.bench.kernel_cases import KernelCase, Op, make_problem
from trsp.pruner.api import compact
from trsp.pruner.layer_map import BaseModel, LayerMap, read_layer_map, write_layer_map

pytestmark = pytest.mark.usefixtures("one_thread", "compared_as_asked")

Benchmark = Any
NUM_TOKENS, HIDDEN_SIZE = 512, 1024
# The op itself is the reference path: TRSP_KERNELS says so below.
ARMS: dict[Op, tuple[Arm, ...]] = {
    "gated_branch": ("fused", "eager_hf", "eager_careful"),
    "gated_difference": ("fused", "eager_hf", "eager_careful"),
    "gated_branch_rmsnorm": ("fused", "eager_f_rms_norm", "eager_hf_norm"),
}
NUM_LAYERS, DROPPED = 6, (1, 3)


@pytest.mark.parametrize(
    ("op", "arm"),
    [
        pytest.param(op, arm, id=f"{op}-{'reference' if arm == 'fused' else arm}")
        for op, arms in ARMS.items()
        for arm in arms
    ],
)
def test_a_training_step(
    op: Op, arm: Arm, benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "reference")
    benchmark.group = op
    case = KernelCase(op, dtype="fp32", hidden_size=HIDDEN_SIZE)
    problem = make_problem(case, NUM_TOKENS, "cpu")

    def step(arm: Arm) -> dict[str, Tensor]:
        outputs = arm_forward(arm, problem)
        grads = arm_gradients(arm, problem, outputs)
        return outputs | {f"d{name}": grad for name, grad in grads.items()}

    found = benchmark(step, arm)
    expected = step(ARMS[op][1] if arm == "fused" else "fused")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # The gate's gradient sums half a million products that mostly cancel.
        atol = 1e-2 if name == "dgate" else 1e-4
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of six layers in several shards, 2 MB."""
    folder = tmp_path_factory.mktemp("dense") / "dense"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for shard in folder.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }


@pytest.fixture
def new_folder(tmp_path: Path) -> Callable[[], tuple[tuple[Path], dict[str, Any]]]:
    """A setup that gives every timed round a folder nobody has written."""
    rounds = iter(range(10**6))
    return lambda: ((tmp_path / f"out-{next(rounds)}",), {})


@pytest.mark.benchmark(group="compaction")
def test_compaction(
    dense: Path, tmp_path: Path, benchmark: Benchmark, new_folder: Callable[..., Any]
) -> None:
    layer_map = LayerMap.from_removal_order(
        BaseModel("dense", NUM_LAYERS, fingerprint_of(dense)), DROPPED
    )
    write_layer_map(layer_map, tmp_path / "layer_map.json")

    def run(out: Path) -> Path:
        compact(dense, tmp_path / "layer_map.json", out)
        return out

    out = benchmark.pedantic(run, setup=new_folder, rounds=10, warmup_rounds=1)
    kept = [layer for layer in range(NUM_LAYERS) if layer not in DROPPED]
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == len(kept)
    compacted, whole = tensors_of(out), tensors_of(dense)
    assert len(compacted) == len(whole) - 9 * len(DROPPED)
    for layer, source_layer in enumerate(kept):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(compacted[name.format(layer)], whole[name.format(source_layer)])


@pytest.mark.benchmark(group="compaction")
def test_a_plain_copy(dense: Path, benchmark: Benchmark, new_folder: Callable[..., Any]) -> None:
    def run(out: Path) -> Path:
        return Path(shutil.copytree(dense, out))

    out = benchmark.pedantic(run, setup=new_folder, rounds=10, warmup_rounds=1)
    assert tensors_of(out).keys() == tensors_of(dense).keys()


def fingerprint_of(folder: Path) -> str:
    from trsp.pruner.checkpoint import open_checkpoint
    from trsp.pruner.run import base_model_of

    return base_model_of(open_checkpoint(folder)).fingerprint


@pytest.fixture
def layer_map() -> LayerMap:
    """A map of 80 layers, half of them dropped."""
    return LayerMap.from_removal_order(BaseModel("base", 80, "0" * 64), tuple(range(1, 80, 2)))


@pytest.mark.benchmark(group="layer map")
def test_reading_a_layer_map(layer_map: LayerMap, tmp_path: Path, benchmark: Benchmark) -> None:
    path = tmp_path / "layer_map.json"
    write_layer_map(layer_map, path)
    assert benchmark(read_layer_map, path) == layer_map


@pytest.mark.benchmark(group="layer map")
def test_writing_a_layer_map(layer_map: LayerMap, tmp_path: Path, benchmark: Benchmark) -> None:
    path = tmp_path / "layer_map.json"
    benchmark(write_layer_map, layer_map, path)
    assert read_layer_map(path) == layer_map


class TestMachineKey:
    """The hooks of conftest.py, called as pytest-benchmark calls them."""

    @pytest.fixture
    def here(self, pytestconfig: pytest.Config) -> dict[str, Any]:
        info: dict[str, Any] = {"cpu": {"hz_actual": [1, 0], "arch": "X"}}
        pytestconfig.hook.pytest_benchmark_update_machine_info(
            config=pytestconfig, machine_info=info
        )
        return info

    def compare(self, config: pytest.Config, here: dict[str, Any], there: dict[str, Any]) -> None:
        config.hook.pytest_benchmark_compare_machine_info(
            config=config,
            benchmarksession=config._benchmarksession,  # type: ignore[attr-defined]
            machine_info=here,
            compared_benchmark={"machine_info": there},
        )

    def test_a_record_of_this_machine_is_compared(
        self, pytestconfig: pytest.Config, here: dict[str, Any]
    ) -> None:
        assert here["cpu"] == {"arch": "X"}
        self.compare(pytestconfig, here, copy.deepcopy(here))

    @pytest.mark.parametrize("name", ["processor", "num_cpus", "torch_threads", "torch"])
    def test_a_record_of_another_is_refused(
        self, pytestconfig: pytest.Config, here: dict[str, Any], name: str
    ) -> None:
        there = copy.deepcopy(here)
        there["trsp"][name] = "another"
        with pytest.raises(pytest.UsageError, match=f"not comparable.*{name} is 'another' there"):
            self.compare(pytestconfig, here, there)

    def test_a_record_without_the_key_is_refused(
        self, pytestconfig: pytest.Config, here: dict[str, Any]
    ) -> None:
        with pytest.raises(pytest.UsageError, match="not comparable"):
            self.compare(pytestconfig, here, {"node": "elsewhere"})
