"""The paper's protocol on pico models: what is run, in which order, and what is refused."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from trsp.bench import transformers_backend
from trsp.bench.model_shapes import SHAPES, write_shape
from trsp.bench.serve import run_serve
from trsp.bench.serve_design import ServeOptions
from trsp.bench.serve_record import Arm, ServeRecord, Workload
from trsp.bench.speed_backend import ArmModel
from trsp.bench.transformers_backend import TransformersBackend, loads
from trsp.bench.transformers_speed import (
    PaperProtocol,
    load_arm,
    measure_generation,
    measure_prompt,
    require_positions,
)
from trsp.pruner.errors import RunError, UserError

TINY = PaperProtocol(prompt_tokens=9, batch_size=2, input_len=3, output_len=4, warmups=0)
SMALL = {**SHAPES["pico"], "vocab_size": 50}
METRICS = {
    "prompt_latency_s",
    "prompt_throughput",
    "generation_latency_s",
    "generation_throughput",
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shapes")
    return {
        "dense": write_shape(SMALL, folder / "dense"),
        "pruned": write_shape(SMALL, folder / "pruned", num_layers=2),
    }


def measure_once(
    model: Any, protocol: PaperProtocol, *, device: str, seed: int
) -> dict[str, float]:
    return {
        **measure_prompt(model, protocol, device=device, seed=seed),
        **measure_generation(model, protocol, device=device, seed=seed),
    }


class Recorder:
    """A model that notes what it is asked and takes a known time."""

    def __init__(self, num_new: int | None = None) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.num_new = num_new
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50))

    def __call__(self, **arguments: Any) -> None:
        self.calls.append(("forward", arguments.pop("input_ids"), arguments))
        time.sleep(0.02)

    def generate(self, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        self.calls.append(("generate", tokens, arguments))
        time.sleep(0.05)
        num_new = arguments["max_new_tokens"] if self.num_new is None else self.num_new
        return torch.cat([tokens, tokens.new_zeros(len(tokens), num_new)], dim=1)

    def parameters(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(10)


def test_the_protocol_is_the_papers() -> None:
    protocol = PaperProtocol()
    assert protocol.prompt_tokens == 2048
    assert (protocol.batch_size, protocol.input_len, protocol.output_len) == (64, 64, 128)


def test_what_is_timed_is_what_the_protocol_says() -> None:
    model = Recorder()
    found = measure_once(model, TINY, device="cpu", seed=1)
    assert [(kind, tuple(tokens.shape)) for kind, tokens, _ in model.calls] == [
        *[("forward", (1, 9))] * 6,
        ("generate", (2, 3)),
    ]
    prompts = [tuple(tokens[0].tolist()) for _, tokens, _ in model.calls[:6]]
    assert len(set(prompts)) == 6
    asked = model.calls[6][2]
    assert asked["max_new_tokens"] == 4
    assert asked["eos_token_id"] is None
    assert asked["do_sample"] is False
    assert asked["use_cache"] is True
    assert 0.02 <= found["prompt_latency_s"] < 0.05
    assert found["prompt_throughput"] == pytest.approx(9 / found["prompt_latency_s"])
    assert 0.05 <= found["generation_latency_s"] < 0.2
    assert found["generation_throughput"] == pytest.approx(8 / found["generation_latency_s"])
    assert set(found) == METRICS


def test_tokens_follow_the_seed_and_stay_in_the_vocabulary() -> None:
    model = Recorder()
    for seed in (1, 1, 2):
        measure_once(model, TINY, device="cpu", seed=seed)
    prompts = [tokens for kind, tokens, _ in model.calls if kind == "forward"]
    assert torch.equal(prompts[0], prompts[6])
    assert not torch.equal(prompts[0], prompts[12])
    assert all(0 <= int(tokens.min()) <= int(tokens.max()) < 50 for tokens in prompts)


def test_a_generation_that_ended_early_does_not_count() -> None:
    with pytest.raises(RunError, match="3 new tokens for 2 sequences, expected 4"):
        measure_once(Recorder(num_new=3), TINY, device="cpu", seed=1)


def test_an_end_of_text_token_ends_nothing(shapes: dict[str, Path]) -> None:
    """Every token is an end-of-text token to the settings the model came with."""
    model = load_arm(shapes["pruned"], load_format="dummy")
    assert model.generation_config.eos_token_id is None
    model.generation_config = GenerationConfig(eos_token_id=list(range(50)))
    assert set(measure_once(model, TINY, device="cpu", seed=1)) == METRICS
    ids = torch.ones(1, 2, dtype=torch.long)
    assert model.generate(ids, max_new_tokens=4, pad_token_id=0).shape == (1, 3)


def test_random_weights_make_a_model_that_computes(
    shapes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def initialize(self: Any, module: Any) -> None:
        raise AssertionError("transformers' own initialization costs minutes for a large model")

    monkeypatch.setattr(LlamaForCausalLM, "_init_weights", initialize)
    model = load_arm(shapes["dense"], load_format="dummy", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.config.num_hidden_layers == len(model.model.layers) == 8
    first = model.model.layers[0]
    assert float(first.mlp.up_proj.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first.input_layernorm.weight, torch.ones(128, dtype=torch.bfloat16))
    # Without it, positions would be whatever lay in memory.
    expected = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    with torch.no_grad():
        logits = model(torch.arange(6)[None]).logits
    assert torch.isfinite(logits).all()
    assert float(logits.float().std()) > 0


def test_random_weights_keep_tied_embeddings_tied(tmp_path: Path) -> None:
    folder = write_shape({**SMALL, "tie_word_embeddings": True}, tmp_path)
    model = load_arm(folder, load_format="dummy")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == 8 * 200960 + 128 + 50 * 128


def test_a_checkpoint_is_loaded_with_its_weights(pico_llama: Path) -> None:
    from safetensors.torch import load_file

    model = load_arm(pico_llama)
    weights = load_file(pico_llama / "model.safetensors")
    found = model.state_dict()
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(found[name], weights[name])


def options(out: Path, **words: Any) -> ServeOptions:
    small = {"prompt_tokens": 9, "concurrencies": (2,), "input_len": 3, "output_len": 4}
    chosen = {"shape": "pico", "remove": (2, 4), "load_format": "dummy", "num_blocks": 2}
    return ServeOptions(
        out=out, backend="transformers", **{"shares": (), **small, **chosen, **words}
    )


def test_the_protocol_runs_in_blocks_and_leaves_a_record(tmp_path: Path) -> None:
    record = run_serve(options(tmp_path / "out"), tell=lambda line: None)
    assert isinstance(record, ServeRecord)
    arms = ["dense", "dense again", "pico-minus-2", "pico-minus-4"]
    turned = list(reversed(arms))
    orders = [[*arms, *turned], [*turned, *arms]]
    prompts = [cell for cell in record.cells if cell.load == "prompt"]
    assert [(cell.block, cell.arm) for cell in prompts] == [
        (block, arm) for block in (0, 1) for arm in orders[block]
    ]
    for cell in record.cells:
        kind = {"prompt": "prompt_", "generation": "generation_"}[cell.load]
        assert set(cell.metrics) == {name for name in METRICS if name.startswith(kind)}
        assert all(value > 0 for value in cell.metrics.values())
    generated = [cell for cell in record.cells if cell.load == "generation"]
    assert {cell.total_output_tokens for cell in generated} == {8}
    assert not record.partial
    assert record.label is not None
    assert "random weights" in record.label
    for ratio in record.ratios:
        if ratio.arm != "dense again":
            layers = {"pico-minus-2": 6, "pico-minus-4": 4}[ratio.arm]
            # Embedding and head stay, so the bound is below the ratio of the layers.
            assert ratio.bound is not None
            assert 1 < ratio.bound < 8 / layers
    assert all(start.weights_gib for start in record.starts)


def arm_model(folder: Path) -> ArmModel:
    arm = Arm(
        name="dense",
        role="dense",
        model="pico",
        num_hidden_layers=8,
        weights="dummy",
        fingerprint=None,
        disk_bytes=None,
        num_parameters=1,
        weight_bytes=4,
        kv_bytes_per_token=1,
        quality=[],
    )
    return ArmModel(arm, folder, {"equal-kv": 1})


def backend(protocol: PaperProtocol, device: str = "cpu") -> TransformersBackend:
    workload = Workload(
        input_len=3, output_len=4, dtype="float32", seed=5, ttft_slo_ms=1.0, tpot_slo_ms=1.0
    )
    return TransformersBackend("dummy", workload, protocol, device, "transformers")


def test_warm_ups_have_tokens_of_their_own(
    shapes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def measure(model: Any, protocol: PaperProtocol, *, device: str, seed: int) -> dict[str, float]:
        seeds.append(seed)
        return dict.fromkeys(METRICS, 1.0)

    monkeypatch.setattr(transformers_backend, "measure_prompt", measure)
    monkeypatch.setattr(transformers_backend, "measure_generation", measure)
    protocol = PaperProtocol(9, 2, 3, 4, warmups=2)
    asked: list[None] = []
    with backend(protocol).session(
        arm_model(shapes["dense"]), "equal-kv", 0, lambda: asked.append(None)
    ) as session:
        assert seeds == [-1, -1, -2, -2]
        for load in loads(2, 5):
            session.measure(load)
    assert seeds[4:] == [5, 5]
    assert len(asked) == 4


@pytest.mark.parametrize("stage", ["warm-up", "measurement"])
def test_running_out_of_memory_is_one_line(
    shapes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers_backend, "measure_generation", fail)
    protocol = PaperProtocol(9, 2, 3, 4, warmups=1 if stage == "warm-up" else 0)

    def run() -> None:
        with backend(protocol).session(
            arm_model(shapes["dense"]), "equal-kv", 0, lambda: None
        ) as session:
            session.measure(loads(2, 5)[1])

    with pytest.raises(RunError, match=r"dense: out of memory on cpu with batch 2 of 3 \+ 4 tok"):
        run()


def test_what_cannot_be_measured_is_refused(shapes: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4096 positions and the protocol needs 4097"):
        require_positions(shapes["dense"], PaperProtocol(prompt_tokens=4097))

    def refused(match: str, folder: Path, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            load_arm(folder, **{"load_format": "dummy", **options})

    refused(r"no config\.json", tmp_path / "absent")
    refused("load format 'fast'", shapes["dense"], load_format="fast")
    refused("dtype 'float15'", shapes["dense"], dtype="float15")
    refused("device 'abacus'", shapes["dense"], device="abacus")
    refused("has no weights", shapes["dense"], load_format="auto")
    if not torch.cuda.is_available():
        refused("no such GPU", shapes["dense"], device="cuda")


@pytest.mark.parametrize("field", ["prompt_tokens", "batch_size", "input_len", "output_len"])
def test_a_protocol_has_lengths(field: str) -> None:
    with pytest.raises(UserError, match=f"{field} is 0"):
        PaperProtocol(**{field: 0})
    with pytest.raises(UserError, match="warmups is -1"):
        PaperProtocol(warmups=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_is_waited_for(shapes: dict[str, Path]) -> None:
    protocol = PaperProtocol(prompt_tokens=256, batch_size=4, input_len=8, output_len=8)
    with backend(protocol, "cuda").session(
        arm_model(shapes["dense"]), "equal-kv", 0, lambda: None
    ) as session:
        assert session.measure(loads(4, 5)[0]).metrics["prompt_latency_s"] > 1e-4
