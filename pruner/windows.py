"""Text as windows of tokens, the same for every model that is measured on it.

Documents are tokenized whole and joined by eos. Windows of W tokens move over that stream by a
stride; a token is scored once, in the first window that holds it, given all tokens of that window
before it. With bos each window begins with it and holds W - 1 tokens of text; without, the first
token of a window has nothing before it and is scored only where the window before it reaches there
(a stride under W) or not at all.

W: tokens of a window, B: windows of a batch, S: tokens of the text.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trsp.pruner.errors import UserError
from trsp.pruner.progress import Progress, silent
from trsp.pruner.text_files import read_texts
from trsp.pruner.token_ids import encode, hash_tokenizer, separator, starts_with_bos

DEFAULT_WINDOW = 2048
# Only so much text is tokenized for a token asked for by max_tokens.
_CHARS_PER_TOKEN = 16


@dataclass(frozen=True)
class Protocol:
    """All that a perplexity depends on besides the weights; two that differ do not compare."""

    window: int
    stride: int
    add_bos: bool
    dtype: str
    device: str
    num_tokens: int
    num_documents: int
    max_tokens: int | None
    text_sha256: str
    tokenizer_sha256: str
    model_context: int | None
    transformers_version: str
    torch_version: str


@dataclass(frozen=True)
class Windows:
    """The stream [S] int64 and how windows move over it.

    Attributes:
        held: tokens of text in a window.   stride: from one window's begin to the next one's.
        bos: the token that each window begins with, or None.
        protocol: all of it, for the record.
    """

    ids: Tensor
    held: int
    stride: int
    bos: int | None
    batch_size: int
    protocol: Protocol

    def __len__(self) -> int:
        """How many windows there are."""
        return _num_windows(len(self.ids), self.held, self.stride)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield windows [B, W] and their labels [B, W], -100 where nothing is scored.

        The last window may be shorter and then comes alone.
        """
        return _batches(self.ids, self.held, self.stride, self.bos, self.batch_size)


def default_window(context: int | None) -> int:
    """W where nobody names one: the model's context, at most 2048."""
    return min(context or DEFAULT_WINDOW, DEFAULT_WINDOW)


def require_a_window(num_tokens: int, held: int) -> None:
    """UserError where a text of `num_tokens` does not fill the `held` places of one window."""
    if num_tokens < held:
        raise UserError(
            f"the text has {num_tokens} tokens, one window needs {held};"
            f" give more text or a smaller window"
        )


def cut_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[str | Path],
    *,
    window: int | None = None,
    stride: int | None = None,
    add_bos: bool | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    text_field: str = "text",
    progress: Progress = silent,
) -> Windows:
    """Read local text and cut it into windows that a model takes.

    Args:
        paths: text files and folders, as read_texts takes them.
        window: W; by default the model's context, at most 2048.
        stride: tokens from one window's begin to the next one's; by default all the text a window
            holds, so that windows do not overlap.
        add_bos: begin each window with bos; by default where the tokenizer does so itself.
        max_tokens: use this many tokens from the beginning of the text instead of all.
        batch_size: windows in one forward pass; changes the speed, not the protocol.
        text_field: the field of a row of jsonl, json and Parquet files that holds the text.
        progress: task "reading text".
    Raises:
        UserError: settings that do not fit the model or the tokenizer, text that cannot be read or
            is shorter than a window, or holds tokens that the model does not have.
    """
    context = _context(model)
    window = default_window(context) if window is None else window
    add_bos = starts_with_bos(tokenizer) if add_bos is None else add_bos
    held = window - add_bos
    stride = held if stride is None else stride
    check_settings(window, stride, held, batch_size, max_tokens, context)
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError("add_bos is asked for, but the tokenizer has no bos token")
    if not paths:
        raise UserError("no text to evaluate on is given; name a text file or a folder")
    text = token_stream(
        paths, tokenizer, max_tokens=max_tokens, text_field=text_field, progress=progress
    )
    require_a_window(len(text.ids), held)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    if int(text.ids.max()) >= vocab_size:
        raise UserError(
            f"the text holds token {int(text.ids.max())}, the model knows {vocab_size} of them: the"
            " tokenizer is another model's"
        )
    # With bos every token is scored, without it not those that have nothing before them.
    unscored = 0 if add_bos else 1 if stride < held else _num_windows(len(text.ids), held, stride)
    protocol = Protocol(
        window=window,
        stride=stride,
        add_bos=add_bos,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        num_tokens=len(text.ids) - unscored,
        num_documents=text.num_documents,
        max_tokens=max_tokens,
        text_sha256=text.sha256,
        tokenizer_sha256=hash_tokenizer(tokenizer),
        model_context=context,
        transformers_version=transformers.__version__,
        torch_version=torch.__version__,
    )
    bos = int(tokenizer.bos_token_id) if add_bos else None
    return Windows(text.ids, held, stride, bos, batch_size, protocol)


@dataclass(frozen=True)
class TokenStream:
    """The stream [S] int64; sha256 over the documents' UTF-8, a zero byte between two."""

    ids: Tensor
    num_documents: int
    sha256: str


def token_stream(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    text_field: str = "text",
    progress: Progress = silent,
) -> TokenStream:
    """Read, hash and tokenize documents, no more of them than max_tokens needs.

    Arguments and errors are those of cut_windows.
    """
    digest = hashlib.sha256()
    ids: list[int] = []
    num_documents = 0
    for document in read_texts(paths, text_field, progress=progress):
        if max_tokens is not None and len(ids) >= max_tokens:
            break
        if num_documents:
            digest.update(b"\0")
            ids.append(separator(tokenizer))
        num_documents += 1
        digest.update(document.encode())
        ids += _first_tokens(document, tokenizer, None if max_tokens is None else max_tokens)
    return TokenStream(
        torch.tensor(ids[:max_tokens], dtype=torch.long), num_documents, digest.hexdigest()
    )


def _first_tokens(
    document: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int | None
) -> list[int]:
    """Tokens of a document; where num_tokens will do, at least so many of them from its start."""
    if num_tokens is None:
        return encode(tokenizer, [document])[0]
    # The last of these tokens may come out otherwise in the whole text: 16 more are asked for.
    num_chars = _CHARS_PER_TOKEN * (num_tokens + 16)
    while num_chars < len(document):
        ids = encode(tokenizer, [document[:num_chars]])[0]
        if len(ids) >= num_tokens + 16:
            return ids
        num_chars *= 2
    return encode(tokenizer, [document])[0]


def _num_windows(num_tokens: int, held: int, stride: int) -> int:
    return math.ceil((num_tokens - held) / stride) + 1


def _batches(
    ids: Tensor, held: int, stride: int, bos: int | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield windows [B, W] and their labels [B, W], -100 where nothing is scored.

    The last window may be shorter and then comes alone.
    """
    full = ids.unfold(0, held, stride)
    end = (len(full) - 1) * stride + held
    parts = [*full.split(batch_size)]
    if end < len(ids):
        parts.append(ids[None, end - (held - stride) :])
    for number, windows in enumerate(parts):
        labels = windows.clone()
        labels[0 if number else 1 :, : held - stride] = -100
        if bos is not None:
            windows = F.pad(windows, (1, 0), value=bos)
            labels = F.pad(labels, (1, 0), value=-100)
        yield windows, labels


def check_settings(
    window: int,
    stride: int,
    held: int,
    batch_size: int,
    max_tokens: int | None,
    context: int | None,
) -> None:
    """Refuse settings by which tokens would be left out or the model would be outrun."""
    if held < 2:
        raise UserError(f"window {window} is too small: it must hold at least 2 tokens of text")
    if context is not None and window > context:
        raise UserError(f"window {window} is longer than the model's context, {context}")
    if not 1 <= stride <= held:
        raise UserError(
            f"stride {stride} is not within 1 to {held}, the tokens of text in a window of {window}"
        )
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is not positive")
    if max_tokens is not None and max_tokens < held:
        raise UserError(
            f"max_tokens {max_tokens} is less than one window holds, {held}; raise it or give a"
            " smaller window"
        )


def _context(model: PreTrainedModel) -> int | None:
    """The most tokens the model takes at a time, where its config says so."""
    value = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None
