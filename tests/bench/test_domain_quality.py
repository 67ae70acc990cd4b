"""Quality beside a kept run of the dense model is that of two models run side by side."""

import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from trsp.bench.domain_quality import DomainQuality
from trsp.bench.token_losses import compare_tokens
from trsp.pruner.checkpoint import load_model, load_tokenizer, open_checkpoint
from trsp.pruner.evaluation import evaluate_perplexity
from trsp.pruner.gated_model import GatedModel
from trsp.pruner.windows import Windows, cut_windows


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 12)
    return path


def windows_of(model: PreTrainedModel, folder: Path, text: Path) -> Windows:
    tokenizer = load_tokenizer(open_checkpoint(folder))
    return cut_windows(model, tokenizer, [str(text)], window=32, stride=24, batch_size=3)


def test_the_dense_model_agrees_with_itself(
    model: PreTrainedModel, pico_llama: Path, text: Path
) -> None:
    quality = DomainQuality(model, windows_of(model, pico_llama, text))
    found = quality.measure(lambda ids: model(input_ids=ids, use_cache=False).logits)
    tokenizer = load_tokenizer(open_checkpoint(pico_llama))
    expected = evaluate_perplexity(model, tokenizer, [text], window=32, stride=24)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1.0


def test_it_is_what_a_comparison_token_by_token_says(
    model: PreTrainedModel, pico_llama: Path, text: Path
) -> None:
    windows = windows_of(model, pico_llama, text)
    quality = DomainQuality(model, windows)
    dense = load_model(open_checkpoint(pico_llama))
    with torch.no_grad():
        # The kept run must be of the model as it was, not as it is now.
        for parameter in model.parameters():
            parameter.mul_(1.3)
        with GatedModel(model) as gated, gated.masking((1, 4)):
            found = quality.measure(gated.logits)
            rows = compare_tokens(dense, model, windows)
    assert found.loss == pytest.approx(rows.pruned.mean(), rel=1e-5)
    assert found.kl == pytest.approx(rows.kl.mean(), rel=1e-4)
    assert found.kl > 0.001
    assert found.top1_agreement == (rows.dense_says == rows.pruned_says).mean() < 1
    assert found.perplexity == pytest.approx(math.exp(rows.pruned.mean()), rel=1e-5)
