"""Fixtures shared by all tests: a pico checkpoint with its tokenizer and text, made on the spot."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Workers of pytest-xdist share the cores: pools of threads would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

# Triton chooses between compiler and interpreter when it is imported, for the whole process, and
# other libraries import it too: here, before any test module. The variable is set for that moment
# only, so child processes do not see it.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        import triton.language as tl
        import triton.runtime.interpreter

        from trsp.kernels import (  # noqa: F401
            gated_branch_rmsnorm_triton,
            gated_branch_triton,
            gated_difference_triton,
        )
    if not isinstance(tl.sum, triton.runtime.interpreter.InterpretedFunction):
        raise pytest.UsageError(
            "triton was imported before tests/conftest.py could ask it to interpret; "
            "run pytest without what imports it earlier, or with TRITON_INTERPRET=1"
        )

SENTENCE = (
    "the layer of a model moves what it reads by a little and the next layer reads it again "
    "so that a word at the end of a line knows of one at its beginning"
)


def pico_text(num_words: int, seed: int = 0) -> str:
    """Sentences with some order in them, so that a pico model has something to learn."""
    state, words, vocabulary = seed + 1, [], SENTENCE.split()
    for position in range(num_words):
        state = (state * 1103515245 + 12345) % 2**31
        step = 1 if state % 3 else state // 3 % len(vocabulary)
        words.append(vocabulary[(position + step) % len(vocabulary)])
    return " ".join(words)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text, about 6,000 words."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(pico_text(6000), "utf-8")
    return path


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to evaluate on, about 600 words."""
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(pico_text(600, seed=9), "utf-8")
    return path


@pytest.fixture(scope="session")
def pico_llama(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A trained 6-layer Llama of hidden size 64 with its tokenizer; read only."""
    from trsp.bench.base_model import (
        base_config,
        encode_documents,
        train_base_model,
        train_tokenizer,
    )

    folder = tmp_path_factory.mktemp("pico") / "llama"
    text = text_file.read_text("utf-8")
    tokenizer = train_tokenizer([text], 288)
    config = base_config(
        tokenizer, num_hidden_layers=6, hidden_size=64, max_position_embeddings=128
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = train_base_model(
        encode_documents(tokenizer, [text]),
        config,
        num_steps=40,
        batch_size=4,
        sequence_length=32,
    )
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums in one order, so that equal runs are bit-equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(pico_llama: Path) -> "PreTrainedModel":
    """The pico Llama, loaded anew."""
    from trsp.pruner.checkpoint import load_model, open_checkpoint

    return load_model(open_checkpoint(pico_llama))


@pytest.fixture
def tokens() -> Tensor:
    """Eight sequences of 32 random tokens of the pico Llama's vocabulary."""
    return torch.randint(1, 288, (8, 32), generator=torch.Generator().manual_seed(0))
