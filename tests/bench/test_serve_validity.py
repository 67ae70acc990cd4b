"""Every check passes what is sound and finds the one defect that was planted."""

from collections.abc import Callable
from typing import Any

import pytest

from trsp.bench.serve_plan import CONTROL, DENSE
from trsp.bench.serve_record import Cell, Load, Start, Workload
from trsp.bench.serve_validity import cell_problems, config_problems, prompt_problems

WORKLOAD = Workload(
    input_len=16, output_len=4, dtype="float32", seed=0, ttft_slo_ms=2000.0, tpot_slo_ms=100.0
)
CLOSED = Load(name="closed 2", kind="closed", concurrency=2, num_requests=10)
OPEN = Load(name="open 0.5", kind="open", share=0.5, request_rate=5.0, num_requests=10)
CONFIG = {
    "model_config.model": "/models/dense",
    "model_config.dtype": "torch.float32",
    "model_config.hf_config.num_hidden_layers": "8",
    "model_config.hf_config.layer_types.7": "full_attention",
    "cache_config.kv_cache_memory_bytes": "1000",
    "cache_config.enable_prefix_caching": "false",
    "parallel_config.data_parallel_master_port": "1234",
    "instance_id": "abc",
}


def sound() -> dict[str, Any]:
    """What vLLM's client says of ten good requests."""
    return {
        "completed": 10,
        "failed": 0,
        "output_lens": [4] * 10,
        "start_times": [0.2 * n for n in range(10)],
    }


def problems(document: dict[str, Any], load: Load = CLOSED, **changes: Any) -> list[str]:
    told: dict[str, Any] = {"cpu_share": 0.5, "prefix_cache_hits": 0}
    return cell_problems(document, load, WORKLOAD, **(told | changes))


@pytest.mark.parametrize("load", [CLOSED, OPEN])
def test_a_sound_measurement_has_no_problems(load: Load) -> None:
    assert problems(sound(), load) == []


@pytest.mark.parametrize(
    ("planted", "load", "told"),
    [
        ({"completed": 9, "failed": 1}, CLOSED, "9 of 10 requests completed, 1 failed"),
        ({"completed": 9}, CLOSED, "9 of 10 requests completed, 0 failed"),
        ({"failed": 1}, CLOSED, "10 of 10 requests completed, 1 failed"),
        ({"output_lens": [4] * 9 + [3]}, CLOSED, "outputs are not all 4 tokens long"),
        ({"output_lens": [4] * 9 + [5]}, OPEN, "outputs are not all 4 tokens long"),
        (
            {"start_times": [0.25 * n for n in range(10)]},
            OPEN,
            "requests left the client over 1.12 x the planned time: it is too slow for this rate",
        ),
    ],
)
def test_a_planted_defect_of_the_requests(planted: dict[str, Any], load: Load, told: str) -> None:
    assert problems(sound() | planted, load) == [told]


def test_late_requests_of_a_closed_loop_are_its_nature() -> None:
    assert problems(sound() | {"start_times": [9.0 * n for n in range(10)]}) == []


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        ({"cpu_share": 0.91}, "the client took 91% of a core: it may be slower than the server"),
        ({"prefix_cache_hits": 1}, "1 tokens came from the prefix cache"),
    ],
)
def test_a_planted_defect_of_the_surroundings(planted: dict[str, Any], told: str) -> None:
    assert problems(sound(), **planted) == [told]


def test_all_problems_are_told() -> None:
    assert len(problems(sound() | {"failed": 2}, cpu_share=2.0)) == 2


MakeCell = Callable[..., Cell]


@pytest.fixture
def cell() -> MakeCell:
    def make(**changes: Any) -> Cell:
        fields: dict[str, Any] = {
            "block": 0, "position": 0, "memory": "equal-kv", "arm": DENSE, "load": "closed 2",
            "started_at": "2026-01-01", "completed": 10, "failed": 0, "total_input_tokens": 160,
            "total_output_tokens": 40, "metrics": {}, "prompts_sha256": "aa",
            "client_cpu_share": 0.1, "prefix_cache_hits": 0, "num_preemptions": 0, "notes": [],
            "invalid": [],
        }  # fmt: skip
        return Cell(**(fields | changes))

    return make


def test_the_same_prompts_for_everyone(cell: MakeCell) -> None:
    cells = [cell(), cell(arm="p"), cell(load="open 0.5", prompts_sha256="bb")]
    assert prompt_problems([*cells, cell(prompts_sha256=None)]) == []


@pytest.mark.parametrize("planted", [{"arm": "p"}, {"block": 1}, {"memory": "equal-memory"}])
def test_other_prompts_are_found(planted: dict[str, Any], cell: MakeCell) -> None:
    cells = [cell(), cell(arm="p"), cell(prompts_sha256="cc", **planted)]
    assert prompt_problems(cells) == ["load closed 2: 2 different sets of prompts were sent"]


def start(arm: str, *, memory: str = "equal-kv", blocks: int = 64, **config: str) -> Start:
    return Start.model_validate(
        {
            "arm": arm, "memory": memory, "block": 0, "command": "x", "load_seconds": 1.0,
            "weights_gib": None, "kv_cache_tokens": blocks * 16, "num_kv_blocks": blocks,
            "engine_config": CONFIG | config,
        }
    )  # fmt: skip


def pruned(**config: str) -> Start:
    """A pruned arm's start, which differs in what follows from its layers."""
    layers = {
        "model_config.model": "/models/pruned",
        "model_config.hf_config.num_hidden_layers": "6",
        "cache_config.kv_cache_memory_bytes": "750",
        "parallel_config.data_parallel_master_port": "99",
        "instance_id": "xyz",
    }
    found = start("p", **(layers | config))
    without = dict(found.engine_config)
    del without["model_config.hf_config.layer_types.7"]
    return found.model_copy(update={"engine_config": without})


def test_what_follows_from_the_layers_is_explained() -> None:
    wrong, explained = config_problems([start(DENSE), start(CONTROL), pruned()], DENSE, CONTROL)
    assert wrong == []
    assert explained == [
        "p, equal-kv: cache_config.kv_cache_memory_bytes is 750, dense 1000",
        "p, equal-kv: model_config.hf_config.layer_types.7 is absent, dense full_attention",
        "p, equal-kv: model_config.hf_config.num_hidden_layers is 6, dense 8",
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"model_config.dtype": "torch.bfloat16"},
        {"cache_config.enable_prefix_caching": "true"},
        {"scheduler_config.max_num_seqs": "8"},
        {"cache_config.block_size": "32"},
        {"model_config.quantization": "fp8"},
        {"speculative_config.model_name": "draft"},
        {"model_config.hf_config.hidden_size": "128"},
    ],
)
def test_another_setting_is_found(config: dict[str, str]) -> None:
    wrong, _ = config_problems([start(DENSE), start(CONTROL), pruned(**config)], DENSE, CONTROL)
    (name,) = config
    assert len(wrong) == 1
    assert wrong[0].startswith(f"p, equal-kv: {name} is {config[name]}, dense ")


@pytest.mark.parametrize("arm", [DENSE, CONTROL])
@pytest.mark.parametrize(
    "config",
    [
        {"model_config.hf_config.num_hidden_layers": "7"},
        {"cache_config.kv_cache_memory_bytes": "999"},
    ],
)
def test_the_same_model_may_not_differ_even_in_layers_and_room(
    arm: str, config: dict[str, str]
) -> None:
    wrong, explained = config_problems([start(DENSE), start(arm, **config)], DENSE, CONTROL)
    assert len(wrong) == 1
    assert explained == []


def test_unequal_blocks_are_found_at_equal_kv_only() -> None:
    wrong, _ = config_problems([start(DENSE), start("p", blocks=65)], DENSE, CONTROL)
    assert wrong == ["p: 65 KV blocks, dense 64: not equal"]
    room = [start(DENSE, memory="equal-memory"), start("p", memory="equal-memory", blocks=90)]
    assert config_problems(room, DENSE, CONTROL) == ([], [])


def test_a_difference_that_comes_back_is_told_once() -> None:
    odd = start("p", **{"model_config.dtype": "x"})
    wrong, _ = config_problems([start(DENSE), odd, odd, odd], DENSE, CONTROL)
    assert len(wrong) == 1


def test_a_long_value_is_cut() -> None:
    odd = start("p", **{"kernel_config.passes": "y" * 500})
    (line,) = config_problems([start(DENSE), odd], DENSE, CONTROL)[0]
    assert len(line) < 200
