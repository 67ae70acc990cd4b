"""The calibration set: which tokens are drawn from which text, and what is refused."""

import hashlib
import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trsp.pruner import calibration
from trsp.pruner.calibration import CalibrationError, build_calibration
from trsp.pruner.errors import UserError
from trsp.pruner.text_files import Fragment

EOS, BOS, UNKNOWN = 0, 1, 2
NUM_WORDS = 4000


def make_tokenizer(*, bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word: `w7` has id 10, so that tokens tell where in a text they stood."""
    words = {f"w{number}": number + 3 for number in range(NUM_WORDS)}
    vocabulary = {"<eos>": EOS, "<bos>": BOS, "<unk>": UNKNOWN, **words}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    names = {"bos_token": "<bos>"} | ({"eos_token": "<eos>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def words(start: int, end: int) -> str:
    return " ".join(f"w{number}" for number in range(start, end))


def write_counting_text(path: Path, num_words: int = NUM_WORDS) -> Path:
    path.write_text(words(0, num_words), "utf-8")
    return path


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def test_sequences_are_stretches_of_the_text_that_do_not_overlap(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_counting_text(tmp_path / "a.txt")
    drawn = build_calibration([path], tokenizer, num_sequences=60, sequence_length=50)
    assert drawn.input_ids.shape == (60, 50)
    assert drawn.input_ids.dtype == torch.int64
    # Consecutive words everywhere but at an eos: at a seam of the sample or behind the last word.
    steps = drawn.input_ids.diff(dim=1)
    at_eos = (drawn.input_ids[:, 1:] == EOS) | (drawn.input_ids[:, :-1] == EOS)
    assert (steps[~at_eos] == 1).all()
    text_tokens = drawn.input_ids[drawn.input_ids != EOS]
    assert len(text_tokens.unique()) == len(text_tokens)


def test_the_same_seed_draws_the_same_and_another_seed_others(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_counting_text(tmp_path / "a.txt")
    drawn = [
        build_calibration([path], tokenizer, num_sequences=8, sequence_length=20, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert torch.equal(drawn[0].input_ids, drawn[1].input_ids)
    assert drawn[0].sha256 == drawn[1].sha256 != drawn[2].sha256
    assert not torch.equal(drawn[0].input_ids, drawn[2].input_ids)


def test_the_drawn_tokens_are_pinned(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    # A change here changes every calibration set that a recipe and a seed stand for.
    path = write_counting_text(tmp_path / "a.txt")
    drawn = build_calibration([path], tokenizer, num_sequences=4, sequence_length=8, seed=1)
    assert drawn.input_ids[:, 0].tolist() == [3436, 3445, 2184, EOS]


def test_the_hash_is_over_shape_and_ids(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_counting_text(tmp_path / "a.txt")
    drawn = build_calibration([path], tokenizer, num_sequences=3, sequence_length=5)
    numbers = [3, 5, *drawn.input_ids.flatten().tolist()]
    assert drawn.sha256 == hashlib.sha256(struct.pack("<17q", *numbers)).hexdigest()
    assert drawn.as_record() == {
        "source": [str(path)],
        "sha256": drawn.sha256,
        "num_sequences": 3,
        "sequence_length": 5,
        "num_tokens": 15,
        "seed": 0,
        "add_bos": False,
    }


def test_documents_are_packed_with_eos_between_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["w0 w1 w2", "w3", "w4 w5"])
    drawn = build_calibration([path], tokenizer, num_sequences=1, sequence_length=9)
    assert drawn.input_ids.tolist() == [[3, 4, 5, EOS, 6, EOS, 7, 8, EOS]]


def test_a_tokenizer_that_begins_with_bos_begins_each_sequence_with_it(tmp_path: Path) -> None:
    path = write_counting_text(tmp_path / "a.txt", 100)
    drawn = build_calibration(
        [path], make_tokenizer(bos=True), num_sequences=11, sequence_length=10
    )
    assert drawn.add_bos
    assert (drawn.input_ids[:, 0] == BOS).all()
    assert BOS not in drawn.input_ids[:, 1:]
    assert len(drawn.input_ids[:, 1:].unique()) == 99


def test_a_large_corpus_is_sampled_from_all_over_and_tokenized_in_part(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "a.jsonl", [words(start, start + 40) for start in range(0, 3960, 2)])
    tokenized: list[int] = []

    def counting_encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
        tokenized.append(sum(map(len, texts)))
        return [tokenizer(text)["input_ids"] for text in texts]

    monkeypatch.setattr(calibration, "encode", counting_encode)
    drawn = build_calibration([tmp_path], tokenizer, num_sequences=32, sequence_length=32)
    corpus_chars = (tmp_path / "a.jsonl").stat().st_size
    assert sum(tokenized) <= 32 * 16 * 32 < corpus_chars / 20
    # Every quarter of the corpus has a share: 256 tokens expected, 60 seen in the smallest.
    quarters = (drawn.input_ids[drawn.input_ids != EOS] - 3) // (NUM_WORDS // 4)
    assert quarters.bincount(minlength=4).min() > 30


def test_a_stretch_never_joins_text_from_two_places_without_eos(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_counting_text(tmp_path / "a.txt")
    # Two blocks of 160 characters are kept out of about 140.
    drawn = build_calibration([path], tokenizer, num_sequences=2, sequence_length=10, seed=5)
    for sequence in drawn.input_ids.tolist():
        assert all(b == a + 1 or EOS in (a, b) for a, b in pairwise(sequence))


def test_more_is_read_where_characters_give_few_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    spaced = (" " * 60).join(f"w{number}" for number in range(NUM_WORDS))
    path = tmp_path / "a.txt"
    path.write_text(spaced, "utf-8")
    drawn = build_calibration([path], tokenizer, num_sequences=10, sequence_length=20)
    # At 62 characters a word the first sample, of 10 blocks of 320 characters, has 60 tokens.
    text_tokens = drawn.input_ids[drawn.input_ids != EOS]
    assert len(text_tokens.unique()) == len(text_tokens) > 150


def test_all_of_the_text_can_be_used_and_no_token_more(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_counting_text(tmp_path / "a.txt", 99)
    drawn = build_calibration([path], tokenizer, num_sequences=10, sequence_length=10)
    assert sorted(drawn.input_ids.flatten().tolist()) == [EOS, *range(3, 102)]
    with pytest.raises(
        CalibrationError, match=r"has 100 tokens, 11 sequences of 10 need 110; give"
    ):
        build_calibration([path], tokenizer, num_sequences=11, sequence_length=10)


def test_an_empty_text_is_too_little(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"")
    with pytest.raises(CalibrationError, match="has 0 tokens"):
        build_calibration([path], tokenizer, num_sequences=1, sequence_length=2)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    path = write_counting_text(tmp_path / "a.txt", 50)
    tokenizer = make_tokenizer()
    with pytest.raises(CalibrationError, match="0 sequences of 10 tokens"):
        build_calibration([path], tokenizer, num_sequences=0, sequence_length=10)
    with pytest.raises(CalibrationError, match="4 sequences of 1 tokens"):
        build_calibration([path], tokenizer, num_sequences=4, sequence_length=1)
    with pytest.raises(CalibrationError, match="no calibration text"):
        build_calibration([], tokenizer)
    with pytest.raises(UserError, match="no eos token"):
        build_calibration([path], make_tokenizer(eos=False), num_sequences=1, sequence_length=4)
    with pytest.raises(UserError, match="does not exist"):
        build_calibration([tmp_path / "b.txt"], tokenizer)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), num_windows=st.integers(1, 9), length=st.integers(1, 9))
def test_windows_lie_apart_within_the_stream(
    data: st.DataObject, num_windows: int, length: int
) -> None:
    num_tokens = num_windows * length + data.draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    starts = calibration._draw_starts(num_tokens, num_windows, length, generator)
    covered = (starts[:, None] + torch.arange(length)).flatten()
    assert len(covered.unique()) == num_windows * length
    assert covered.min() >= 0
    assert covered.max() < num_tokens


def test_every_placement_of_windows_has_the_same_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(3000):
        starts = tuple(calibration._draw_starts(7, 2, 3, generator).tolist())
        counts[starts] = counts.get(starts, 0) + 1
    assert set(counts) == {(0, 3), (0, 4), (1, 4), (3, 0), (4, 0), (4, 1)}
    # 500 each expected; the standard deviation is 20.
    assert all(400 < count < 600 for count in counts.values())


@settings(max_examples=100, deadline=None)
@given(
    documents=st.lists(st.text(alphabet="ab \n", max_size=30), max_size=6),
    block_chars=st.integers(1, 12),
    fragment_chars=st.integers(1, 12),
)
def test_blocks_hold_all_the_text_in_order_and_are_bounded(
    documents: list[str], block_chars: int, fragment_chars: int
) -> None:
    fragments = []
    for text in documents:
        cuts = range(0, len(text), fragment_chars)
        fragments += [Fragment(text[cut : cut + fragment_chars], False) for cut in cuts]
        fragments.append(Fragment("", True))
    blocks = list(calibration._cut_into_blocks(fragments, block_chars))
    pieces = [piece for block in blocks for piece in block.pieces]
    joined = "".join(piece.text + ("|" if piece.ends_document else "") for piece in pieces)
    assert joined == "".join(f"{text}|" for text in documents)
    # A document is one piece of a block, so that no word is tokenized in two.
    assert all(piece.ends_document for block in blocks for piece in block.pieces[:-1])
    assert [block.number for block in blocks] == list(range(len(blocks)))
    assert all(0 < sum(len(p.text) for p in block.pieces) <= block_chars for block in blocks[:-1])
