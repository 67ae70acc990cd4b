"""From text to token ids: how documents are encoded and set apart, and how both are hashed."""

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trsp.pruner.errors import UserError


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens around it."""
    # verbose=False: no warning that a document is longer than the model's context.
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that stands between two documents, eos.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos token to put between documents; set eos_token in its"
            " tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts bos before a text by itself, as Llama's and Gemma's do."""
    if tokenizer.bos_token_id is None:
        return False
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids[:1] == [tokenizer.bos_token_id]


def hash_ids(input_ids: Tensor) -> str:
    """sha256 (hex) of token ids: the sizes of the tensor, then its ids, as int64 little-endian."""
    digest = hashlib.sha256()
    for values in (torch.tensor(input_ids.shape), input_ids):
        digest.update(values.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of what maps text to ids: the fast tokenizer's JSON, or else the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = (
        backend.to_str()
        if backend is not None
        else json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    )
    return hashlib.sha256(content.encode()).hexdigest()
