"""Perplexity equals a plain transformers loop, under a stamp that says what it holds for."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trsp.bench.base_model import train_tokenizer
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.evaluation import evaluate_perplexity
from trsp.pruner.token_ids import hash_tokenizer

CONTEXT = 32
TEXT = "\n".join(f"line {n} of the text: {n * n} is the square of {n}" for n in range(40))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT], 300)


@pytest.fixture(scope="module")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts bos before a text by itself."""
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Random, and sharp enough that every token of context moves the loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(TEXT, "utf-8")
    return path


@torch.no_grad()
def plain_loop(
    model: LlamaForCausalLM, ids: list[int], window: int, stride: int, bos: int | None = None
) -> tuple[float, int]:
    """Mean loss and tokens scored, token by token over the model's own probabilities.

    The loop of transformers' guide to perplexity, with labels of -100 for what was scored before,
    except that the mean is over tokens rather than over windows.
    """
    prefix = [] if bos is None else [bos]
    held = window - len(prefix)
    total, count, scored_to = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + held, len(ids))
        input_ids = torch.tensor([prefix + ids[begin:end]])
        labels = torch.tensor([[-100] * (len(prefix) + scored_to - begin) + ids[scored_to:end]])
        num_labels = int((labels[0, 1:] != -100).sum())
        if num_labels:
            loss = model(input_ids, labels=labels).loss
            total += float(loss) * num_labels
            count += num_labels
        scored_to = end
        if end == len(ids):
            break
    return total / count, count


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize(
    ("window", "stride"), [(None, None), (32, 8), (32, 31), (17, 16), (16, 1), (3, 2), (32, 20)]
)
def test_the_loss_is_that_of_a_plain_loop(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    window: int | None,
    stride: int | None,
    add_bos: bool,
    batch_size: int,
) -> None:
    result = evaluate_perplexity(
        model,
        tokenizer,
        [path],
        window=window,
        stride=stride,
        add_bos=add_bos,
        batch_size=batch_size,
        max_tokens=150,
    )
    ids = tokenizer(TEXT)["input_ids"][:150]
    size = window or CONTEXT
    loss, count = plain_loop(
        model, ids, size, stride or size - add_bos, tokenizer.bos_token_id if add_bos else None
    )
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert result.protocol.num_tokens == count


def test_no_token_is_left_out_or_scored_twice(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    num_tokens = len(tokenizer(TEXT)["input_ids"])
    with_bos = evaluate_perplexity(model, tokenizer, [path], add_bos=True)
    overlapping = evaluate_perplexity(model, tokenizer, [path], add_bos=False, stride=16)
    apart = evaluate_perplexity(model, tokenizer, [path], add_bos=False)
    assert with_bos.protocol.num_tokens == num_tokens
    assert overlapping.protocol.num_tokens == num_tokens - 1
    assert apart.protocol.num_tokens == num_tokens - math.ceil(num_tokens / CONTEXT)


def test_a_last_window_of_one_token_scores_nothing(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    whole = evaluate_perplexity(model, tokenizer, [path], add_bos=False, max_tokens=2 * CONTEXT)
    one_more = evaluate_perplexity(
        model, tokenizer, [path], add_bos=False, max_tokens=2 * CONTEXT + 1
    )
    assert one_more.loss == whole.loss
    assert one_more.protocol.num_tokens == whole.protocol.num_tokens == 2 * (CONTEXT - 1)


def test_the_stamp_says_what_the_number_holds_for(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    result = evaluate_perplexity(model, tokenizer, [path], window=20, stride=10, max_tokens=99)
    assert result.to_document() == {
        "schema_version": 1,
        "perplexity": result.perplexity,
        "loss": result.loss,
        "protocol": {
            "window": 20,
            "stride": 10,
            "add_bos": False,
            "dtype": "float32",
            "device": "cpu",
            "num_tokens": 98,
            "num_documents": 1,
            "max_tokens": 99,
            "text_sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
            "tokenizer_sha256": hash_tokenizer(tokenizer),
            "model_context": CONTEXT,
            "transformers_version": transformers.__version__,
            "torch_version": torch.__version__,
        },
    }
    json.dumps(result.to_document())


def test_the_tokenizer_decides_on_bos_where_nobody_else_does(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    bos_tokenizer: PreTrainedTokenizerFast,
    path: Path,
) -> None:
    by_default = evaluate_perplexity(model, bos_tokenizer, [path])
    assert by_default.protocol.add_bos
    assert by_default.loss == evaluate_perplexity(model, tokenizer, [path], add_bos=True).loss
    assert by_default.protocol.tokenizer_sha256 != hash_tokenizer(tokenizer)


def test_documents_are_joined_by_eos(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = TEXT.splitlines()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"row": row}) + "\n" for row in rows), "utf-8")
    result = evaluate_perplexity(model, tokenizer, [path], text_field="row")
    ids: list[int] = []
    for row in rows:
        ids += [*tokenizer(row)["input_ids"], tokenizer.eos_token_id]
    loss, count = plain_loop(model, ids[:-1], CONTEXT, CONTEXT)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.protocol.num_tokens == count
    assert result.protocol.num_documents == len(rows)
    assert result.protocol.text_sha256 == hashlib.sha256("\0".join(rows).encode()).hexdigest()


def test_max_tokens_tokenizes_a_part_of_the_text_to_the_same_tokens(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 50, "utf-8")
    longest = 0

    def watched(tokenizer: Any, texts: list[str]) -> list[list[int]]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return [tokenizer(text)["input_ids"] for text in texts]

    monkeypatch.setattr("trsp.pruner.windows.encode", watched)
    part = evaluate_perplexity(model, tokenizer, [long], max_tokens=120)
    assert longest < len(TEXT) * 2
    assert part.loss == evaluate_perplexity(model, tokenizer, [path], max_tokens=120).loss


def test_max_tokens_reads_on_where_a_token_is_many_characters(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    ruled = (("=" * 64 + "\n") * 60) + TEXT
    tokenizer = train_tokenizer([ruled * 3], 300)
    ids = tokenizer(ruled)["input_ids"]
    # The first try takes 16 characters for each of max_tokens + 16.
    assert len(ruled) > 16 * (200 + 16)
    assert len(tokenizer(ruled[: 16 * (200 + 16)])["input_ids"]) < 200
    path = tmp_path / "ruled.txt"
    path.write_text(ruled, "utf-8")
    result = evaluate_perplexity(model, tokenizer, [path], max_tokens=200)
    loss, count = plain_loop(model, ids[:200], CONTEXT, CONTEXT)
    assert result.loss == pytest.approx(loss, rel=1e-6)
    assert result.protocol.num_tokens == count


def test_half_precision_is_summed_in_double_over_fp32_losses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    result = evaluate_perplexity(half, tokenizer, [path])
    assert result.protocol.dtype == "bfloat16"
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    total, count = 0.0, 0
    half.eval()
    for window in ids.split(CONTEXT):
        with torch.no_grad():
            logits = half(window[None]).logits[0, :-1].float().double()
        picked = logits.log_softmax(-1).gather(1, window[1:, None])
        total, count = total - float(picked.sum()), count + len(picked)
    assert result.loss == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_restored_and_not_used(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path, training: bool
) -> None:
    expected = evaluate_perplexity(model, tokenizer, [path]).loss
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train(training)
    try:
        assert evaluate_perplexity(model, tokenizer, [path]).loss == expected
        assert model.training == training
    finally:
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        model.eval()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"window": 33}, "window 33 is longer than the model's context, 32"),
        ({"window": 1}, "window 1 is too small"),
        ({"window": 2, "add_bos": True}, "window 2 is too small"),
        ({"stride": 33}, "stride 33 is not within 1 to 32"),
        ({"stride": 32, "add_bos": True}, "stride 32 is not within 1 to 31"),
        ({"stride": 0}, "stride 0 is not within"),
        ({"batch_size": 0}, "batch_size 0 is not positive"),
        ({"max_tokens": 31}, "max_tokens 31 is less than one window holds, 32"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    settings: dict[str, Any],
    expected: str,
) -> None:
    with pytest.raises(UserError, match=expected):
        evaluate_perplexity(model, tokenizer, [path], **settings)


def test_text_that_cannot_be_scored_is_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("short", "utf-8")
    num_tokens = len(tokenizer("short")["input_ids"])
    with pytest.raises(UserError, match=f"has {num_tokens} tokens, one window needs 32; give"):
        evaluate_perplexity(model, tokenizer, [short])
    with pytest.raises(UserError, match="no text"):
        evaluate_perplexity(model, tokenizer, [])
    with pytest.raises(UserError, match="does not exist"):
        evaluate_perplexity(model, tokenizer, [tmp_path / "nowhere.txt"])
    nameless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no bos token"):
        evaluate_perplexity(model, nameless, [path], add_bos=True)
    with pytest.raises(UserError, match="no eos token"):
        evaluate_perplexity(model, nameless, [path, path])
    larger = train_tokenizer([TEXT], 320)
    with pytest.raises(UserError, match=r"the model knows 300 of them.*another model's"):
        evaluate_perplexity(model, larger, [path])


def test_a_loss_that_is_not_finite_fails_the_run(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    broken = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken.lm_head.weight[7, 3] = math.nan
    with pytest.raises(RunError, match="loss is nan in windows 0 to 1 of the text"):
        evaluate_perplexity(broken, tokenizer, [path], batch_size=2)
    with torch.no_grad():
        broken.lm_head.weight.copy_(model.lm_head.weight * 1e5)
    with pytest.raises(RunError, match="no finite perplexity"):
        evaluate_perplexity(broken, tokenizer, [path])


def test_progress_counts_windows(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate_perplexity(
        model,
        tokenizer,
        [path],
        max_tokens=100,
        batch_size=2,
        progress=lambda *report: seen.append(report),
    )
    assert [report[1:] for report in seen if report[0] == "evaluating"] == [
        (0, 4),
        (2, 4),
        (3, 4),
        (4, 4),
    ]
