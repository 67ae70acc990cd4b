"""The calibration set: N sequences of T tokens drawn from local text by a seed.

How they are drawn, so that a corpus of any size costs one reading and a bounded tokenization:
the text is cut into blocks of 16 T characters (about four sequences of English each); N blocks are
kept, each block of the corpus with the same chance; the kept ones are tokenized and packed in the
order of the corpus, with eos between documents and where text between blocks was left out; N
windows that do not overlap are drawn from that stream, every placement with the same chance. A
corpus of at most N blocks is thus packed whole. Where the tokens do not suffice, the number of
blocks doubles and the corpus is read again.

N: sequences, T: tokens of one sequence.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trsp.pruner.checkpoint import Checkpoint
from trsp.pruner.errors import UserError
from trsp.pruner.progress import Progress, silent
from trsp.pruner.text_files import Fragment, read_fragments
from trsp.pruner.token_ids import encode, hash_ids, separator, starts_with_bos

_BLOCK_CHARS_PER_TOKEN = 16


class CalibrationError(UserError):
    """The text cannot give the calibration set that was asked for."""


@dataclass(frozen=True)
class CalibrationSet:
    """What both stages learn from.

    Attributes:
        input_ids: [N, T] int64.
        source: the paths it was drawn from, as they were given.
        sha256: over the shape and the ids, see hash_ids.
        seed: what it was drawn with.
        add_bos: whether each sequence begins with the bos token, as the tokenizer's texts do.
    """

    input_ids: Tensor
    source: tuple[str, ...]
    sha256: str
    seed: int
    add_bos: bool

    @property
    def num_tokens(self) -> int:
        """N * T."""
        return self.input_ids.numel()

    def as_record(self) -> dict[str, Any]:
        """What the layer map says of it: all but the tokens themselves."""
        num_sequences, sequence_length = self.input_ids.shape
        return {
            "source": list(self.source),
            "sha256": self.sha256,
            "num_sequences": num_sequences,
            "sequence_length": sequence_length,
            "num_tokens": self.num_tokens,
            "seed": self.seed,
            "add_bos": self.add_bos,
        }


def build_calibration(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int = 128,
    sequence_length: int = 2048,
    seed: int = 0,
    text_field: str = "text",
    progress: Progress = silent,
) -> CalibrationSet:
    """Draw a calibration set; the same files, tokenizer and numbers always give the same one.

    Args:
        paths: text files and folders, as read_texts takes them.
        num_sequences, sequence_length: N and T, bos included; both positive.
        seed: chooses the blocks, the windows and their order.
        text_field: the field of a row of jsonl, json and Parquet files that holds the text.
        progress: tasks "reading text" (bytes on disk) and "tokenizing" (blocks).
    Raises:
        TextError: a file cannot be read.
        CalibrationError: there is too little text.
        UserError: the tokenizer has no token to put between documents.
    """
    if num_sequences < 1 or sequence_length < 2:
        raise CalibrationError(
            f"{num_sequences} sequences of {sequence_length} tokens: at least 1 of at least 2 is"
            " needed"
        )
    if not paths:
        raise CalibrationError("no calibration text is given; name a text file or a folder")
    add_bos = starts_with_bos(tokenizer)
    length = sequence_length - add_bos
    stream = _packed_sample(
        paths, tokenizer, num_sequences, length, seed, text_field, progress=progress
    )
    generator = torch.Generator().manual_seed(seed)
    starts = _draw_starts(len(stream), num_sequences, length, generator)
    input_ids = stream[starts[:, None] + torch.arange(length)]
    if add_bos:
        bos = torch.full((num_sequences, 1), tokenizer.bos_token_id, dtype=torch.long)
        input_ids = torch.cat([bos, input_ids], dim=1)
    return CalibrationSet(
        input_ids=input_ids,
        source=tuple(str(path) for path in paths),
        sha256=hash_ids(input_ids),
        seed=seed,
        add_bos=add_bos,
    )


def stated_context(checkpoint: Checkpoint) -> int | None:
    """The most tokens the model takes at a time, where config.json says so."""
    config = checkpoint.config.get("text_config", checkpoint.config)
    stated = (config.get(name) for name in ("max_position_embeddings", "n_positions"))
    return next((int(value) for value in stated if isinstance(value, int)), None)


def sequence_length(checkpoint: Checkpoint, asked: int | None = None) -> int:
    """Tokens of a calibration sequence: as many as asked for, or the context's, at most 2048.

    Raises:
        UserError: the context is shorter, or config.json states none and nothing is asked for.
    """
    context = stated_context(checkpoint)
    if context is None and asked is None:
        raise UserError(
            f"{checkpoint.path}: config.json states no context length; set "
            "calibration.sequence_length"
        )
    if context is None or asked is None:
        return asked or min(2048, context or 2048)
    if asked > context:
        raise UserError(
            f"calibration.sequence_length {asked} is longer than the model's context, "
            f"{context} tokens"
        )
    return asked


@dataclass
class _Block:
    """About 16 T characters of consecutive text; `number` counts blocks through the corpus."""

    number: int
    num_chars: int = 0
    pieces: list[Fragment] = field(default_factory=list)

    def add(self, text: str, *, ends_document: bool) -> None:
        """Append text, to the last piece where that one's document goes on."""
        self.num_chars += len(text)
        if self.pieces and not self.pieces[-1].ends_document:
            text = self.pieces.pop().text + text
        self.pieces.append(Fragment(text, ends_document))


def _packed_sample(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    num_sequences: int,
    length: int,
    seed: int,
    text_field: str,
    *,
    progress: Progress,
) -> Tensor:
    """Tokens of a sample of the corpus, at least num_sequences * length of them."""
    num_needed = num_sequences * length
    num_kept = num_sequences
    while True:
        fragments = read_fragments(paths, text_field, progress=progress)
        blocks = _cut_into_blocks(fragments, _BLOCK_CHARS_PER_TOKEN * length)
        kept, num_blocks = _sample(blocks, num_kept, seed)
        stream = _pack(kept, tokenizer, progress=progress)
        if len(stream) >= num_needed:
            return stream
        if num_blocks <= num_kept:
            raise CalibrationError(
                f"the calibration text has {len(stream)} tokens, {num_sequences} sequences of"
                f" {length} need {num_needed}; give more text, fewer sequences"
                " (--set calibration.num_sequences=N) or shorter ones"
                " (--set calibration.sequence_length=N)"
            )
        num_kept *= 2


def _cut_into_blocks(fragments: Iterable[Fragment], block_chars: int) -> Iterator[_Block]:
    """Cut text into blocks of block_chars characters, or a little less where a line ends."""
    block = _Block(number=0)
    for fragment in fragments:
        text = fragment.text
        while block.num_chars + len(text) > block_chars:
            end = _last_break(text, block_chars - block.num_chars)
            block.add(text[:end], ends_document=False)
            yield block
            block = _Block(number=block.number + 1)
            text = text[end:]
        block.add(text, ends_document=fragment.ends_document)
    if block.pieces:
        yield block


def _last_break(text: str, limit: int) -> int:
    """Where to cut text[:limit]: after its last line end or else space, near its end, or there."""
    for character in "\n ":
        end = text.rfind(character, limit - limit // 4, limit)
        if end >= 0:
            return end + 1
    return limit


def _sample(blocks: Iterable[_Block], num_kept: int, seed: int) -> tuple[list[_Block], int]:
    """Keep num_kept blocks, each with the same chance, in order; and the number of all blocks.

    Source: algorithm R (Vitter 1985).
    """
    chance = random.Random(seed)
    kept: list[_Block] = []
    num_blocks = 0
    for block in blocks:
        num_blocks += 1
        if len(kept) < num_kept:
            kept.append(block)
        elif (place := int(chance.random() * num_blocks)) < num_kept:
            kept[place] = block
    return sorted(kept, key=lambda block: block.number), num_blocks


def _pack(
    blocks: list[_Block], tokenizer: PreTrainedTokenizerBase, *, progress: Progress
) -> Tensor:
    """One stream of the blocks' tokens, eos where a document ends and where blocks are missing."""
    ids: list[int] = []
    eos = separator(tokenizer)
    for done, block in enumerate(blocks):
        progress("tokenizing", done, len(blocks))
        if done and blocks[done - 1].number != block.number - 1 and ids[-1:] != [eos]:
            ids.append(eos)
        texts = [piece.text for piece in block.pieces]
        for piece, piece_ids in zip(block.pieces, encode(tokenizer, texts), strict=True):
            ids += piece_ids
            if piece.ends_document:
                ids.append(eos)
    progress("tokenizing", len(blocks), len(blocks))
    return torch.tensor(ids, dtype=torch.long)


def _draw_starts(
    num_tokens: int, num_windows: int, length: int, generator: torch.Generator
) -> Tensor:
    """Starts [num_windows] of windows that do not overlap, in random order."""
    # Windows shrunk to one token each lie apart when their places differ; each then grows to the
    # right and pushes on those behind it.
    places = torch.randperm(num_tokens - num_windows * (length - 1), generator=generator)
    places = places[:num_windows]
    return places + (length - 1) * places.argsort().argsort()
