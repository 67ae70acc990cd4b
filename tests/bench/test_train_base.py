"""Base models are trained the same way twice, and come out as plain checkpoints."""

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from trsp.bench import base_model, train_base
from trsp.bench.base_model import (
    TrainingStep,
    base_config,
    encode_documents,
    train_base_model,
    train_tokenizer,
)
from trsp.bench.train_base import loss_curve
from trsp.pruner.checkpoint import check_tokenizer, load_model, load_tokenizer, open_checkpoint
from trsp.pruner.errors import RunError, UserError

TEXT = "".join(f"{n} and {n} make {n + n},\n  größer than {n}\n" for n in range(400))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return encode_documents(train_tokenizer([TEXT], 300), [TEXT])


@pytest.fixture(scope="module")
def config() -> LlamaConfig:
    return base_config(
        train_tokenizer([TEXT], 300),
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=32,
        max_position_embeddings=32,
    )


def test_the_tokenizer_gives_back_the_text_and_is_the_same_twice() -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    assert len(tokenizer) == 300
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.decode(tokenizer("\x00 \U0001f40d")["input_ids"]) == "\x00 \U0001f40d"
    again = train_tokenizer([TEXT], 300)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_vocabulary_that_the_text_cannot_fill_is_refused() -> None:
    with pytest.raises(UserError, match="at least 257"):
        train_tokenizer([TEXT], 256)
    with pytest.raises(UserError, match=r"the text gives only 2\d\d tokens, vocab_size 9000"):
        train_tokenizer(["a b"], 9000)


def test_documents_are_encoded_whole_with_eos_behind_each() -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    ids = encode_documents(tokenizer, [TEXT * 9, "", "one line"])
    ends = (ids == 0).nonzero().flatten().tolist()
    assert len(ends) == 3
    assert ends[1] == ends[0] + 1
    assert tokenizer.decode(ids[: ends[0]]) == TEXT * 9
    assert tokenizer.decode(ids[ends[1] + 1 : ends[2]]) == "one line"


def test_training_learns_and_repeats_bit_for_bit(
    token_ids: torch.Tensor, config: LlamaConfig
) -> None:
    def train(seed: int) -> tuple[LlamaForCausalLM, list[TrainingStep]]:
        steps: list[TrainingStep] = []
        model = train_base_model(
            token_ids,
            config,
            num_steps=30,
            batch_size=4,
            sequence_length=16,
            seed=seed,
            log=steps.append,
        )
        return model, steps

    random_state = torch.get_rng_state()
    model, steps = train(0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.training
    assert [step.step for step in steps] == list(range(1, 31))
    assert steps[-1].num_tokens == 30 * 4 * 16
    assert steps[0].loss == pytest.approx(math.log(300), abs=0.5)
    assert steps[-1].loss < steps[0].loss - 1
    torch.rand(3)
    again, _ = train(0)
    other, _ = train(1)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bf16_learns_with_fp32_weights(token_ids: torch.Tensor, config: LlamaConfig) -> None:
    steps: list[TrainingStep] = []
    model = train_base_model(
        token_ids,
        config,
        num_steps=20,
        batch_size=4,
        sequence_length=16,
        precision="bf16",
        log=steps.append,
    )
    assert model.dtype == torch.float32
    assert steps[-1].loss < steps[0].loss - 0.7


def test_a_run_by_the_clock_ends_with_the_clock(
    token_ids: torch.Tensor, config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("trsp.bench.base_model.time.monotonic", lambda: float(next(ticks)))
    steps: list[TrainingStep] = []
    seen: list[tuple[str, int, int]] = []
    train_base_model(
        token_ids,
        config,
        minutes=0.2,
        batch_size=1,
        sequence_length=8,
        progress=lambda *report: seen.append(report),
        log=steps.append,
    )
    # One second a step: twelve of them, the rate falling to its end all the same.
    assert [step.elapsed_s for step in steps] == [float(second) for second in range(1, 13)]
    assert steps[-1].learning_rate < 0.15 * max(step.learning_rate for step in steps)
    assert seen[-1] == ("train", 12, 12)


def test_the_rate_rises_and_falls() -> None:
    shares = [base_model._schedule(part / 1000) for part in range(1000)]
    peak = shares.index(max(shares))
    assert shares[peak] == pytest.approx(1.0)
    assert peak == 50
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert 0 < shares[0] < 0.2
    assert shares[-1] == pytest.approx(0.05, abs=0.001)


def test_windows_come_once_a_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    stream = torch.arange(101)
    batches = list(islice(base_model._windows(stream, 3, 10, generator), 6))
    assert all(batch.shape == (3, 11) and (batch.diff(dim=1) == 1).all() for batch in batches)
    starts = torch.cat(batches)[:, 0]
    # Nine or ten windows fit, by the offset of the pass.
    first_pass = starts[:9]
    assert len(first_pass.unique()) == 9
    assert len((first_pass % 10).unique()) == 1
    assert len(starts.unique()) > 10


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_steps": None}, "either as num_steps or as minutes"),
        ({"minutes": 1.0}, "either as num_steps or as minutes"),
        ({"num_steps": 0}, "the run has no length"),
        ({"num_steps": None, "minutes": -1.0}, "the run has no length"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"sequence_length": 33}, "longer than the model's context, 32"),
        ({"token_ids": torch.zeros(2, 20, dtype=torch.long)}, r"not \[2, 20\] of torch.int64"),
        ({"token_ids": torch.zeros(99)}, "of torch.float32"),
        ({"token_ids": torch.zeros(8, dtype=torch.long)}, "has 8 tokens; a window of 8 needs 9"),
        ({"token_ids": torch.full((99,), 300)}, "token id 300 is outside the vocabulary of 300"),
    ],
)
def test_what_cannot_be_trained_with_is_refused(
    token_ids: torch.Tensor,
    config: LlamaConfig,
    changes: dict[str, object],
    expected: str,
) -> None:
    arguments = {"token_ids": token_ids, "num_steps": 1, "batch_size": 1, "sequence_length": 8}
    with pytest.raises(UserError, match=expected):
        train_base_model(config=config, **arguments | changes)  # type: ignore[arg-type]


def test_a_shape_that_does_not_exist_is_refused() -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    with pytest.raises(UserError, match="hidden_size 100 is not a multiple of the head size 64"):
        base_config(tokenizer, num_hidden_layers=2, hidden_size=100)
    with pytest.raises(UserError, match="num_hidden_layers is 0"):
        base_config(tokenizer, num_hidden_layers=0, hidden_size=64)


def test_a_broken_loss_stops_the_run(token_ids: torch.Tensor, config: LlamaConfig) -> None:
    with pytest.raises(RunError, match=r"loss is (nan|inf) at step \d+"):
        train_base_model(
            token_ids,
            config,
            num_steps=9,
            batch_size=1,
            sequence_length=8,
            learning_rate=1e30,
        )


def test_the_loss_curve_averages_and_ends_with_the_last_step() -> None:
    steps = [TrainingStep(n, float(n), 0.1, n * 10, float(n)) for n in range(1, 8)]
    curve = loss_curve(steps, num_points=3)
    assert [(point["step"], point["loss"]) for point in curve] == [(1, 1.0), (4, 3.0), (7, 6.0)]
    assert loss_curve(steps) == [step.as_record() for step in steps]


OPTIONS = {
    "--layers": 2,
    "--hidden-size": 64,
    "--vocab-size": 300,
    "--context": 32,
    "--steps": 3,
    "--batch-size": 1,
    "--sequence-length": 16,
}


def command_line(text: Path, out: Path) -> list[str]:
    options = {"--text": text, "--out": out, **OPTIONS}
    return [str(word) for option in options.items() for word in option]


def test_the_command_publishes_a_plain_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    arguments = command_line(text, tmp_path / "base")
    result = CliRunner().invoke(train_base.app, [*arguments, "--log-every", "1"])
    assert result.exit_code == 0, result.output
    assert "step 3  loss" in result.stderr
    checkpoint = open_checkpoint(tmp_path / "base")
    tokenizer = load_tokenizer(checkpoint)
    check_tokenizer(checkpoint, tokenizer)
    model = load_model(checkpoint)
    assert model.config.num_hidden_layers == 2
    assert len(tokenizer) == model.config.vocab_size == 300
    record = json.loads((tmp_path / "base" / "train_record.json").read_text("utf-8"))
    assert record["num_steps"] == len(record["loss_curve"]) == 3
    assert record["num_tokens_trained"] == 48
    assert record["num_parameters"] == model.num_parameters()
    assert record["device"] == "cpu"
    assert record["environment"]["versions"]["torch"]
    again = CliRunner().invoke(train_base.app, arguments)
    assert again.exit_code == 2
    assert "already exists" in again.stderr


def test_text_that_is_not_utf_8_ends_with_2_and_nothing_written(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT.encode("latin-1"))
    arguments = command_line(text, tmp_path / "base")
    result = CliRunner().invoke(train_base.app, arguments)
    assert result.exit_code == 2
    assert "text.txt: is not UTF-8: byte 0xf6" in result.stderr
    assert not (tmp_path / "base").exists()
