"""Calibration and held-out text: apart from each other, and of a kind the model knows."""

import gzip
import json
import lzma
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from trsp.bench.base_model import train_tokenizer
from trsp.pruner import api, pipeline
from trsp.pruner.cli import app
from trsp.pruner.errors import UserError
from trsp.pruner.text_checks import (
    MAX_BITS_PER_BYTE,
    MAX_BITS_RATIO,
    MAX_CALIBRATION_SHARE,
    MAX_SHARE,
    NGRAM,
    Overlap,
    bits_per_byte,
    bytes_per_token,
    domain_warnings,
    overlap,
    refuse_same_files,
    require_no_overlap,
)
from trsp.pruner.text_files import TextError, unpacked_blocks

FAST = (
    "calibration.num_sequences=8", "calibration.sequence_length=32",
    "selection.first_round_steps=2", "selection.round_steps=2", "selection.batch_size=2",
    "selection.num_candidates=2", "selection.verification_sequences=4",
    "transfer.steps=2", "transfer.batch_size=2", "transfer.closing=at_once",
    "evaluation.window=64",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def distinct(start: int, count: int) -> Tensor:
    """Tokens of which none comes twice."""
    return torch.arange(start, start + count)


def by_sets(calibration: Tensor, held_out: Tensor, n: int) -> tuple[float, float, int]:
    """Both shares and the longest run, by sets of tuples."""
    rows = [
        tuple(row[at : at + n]) for row in calibration.tolist() for at in range(len(row) - n + 1)
    ]
    ids = held_out.tolist()
    grams = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
    shared = [gram in set(rows) for gram in grams]
    longest = max(map(len, "".join(".x"[flag] for flag in shared).split(".")))
    return (
        sum(shared) / len(grams),
        sum(row in set(grams) for row in rows) / len(rows),
        longest + n - 1 if longest else 0,
    )


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, 2), min_size=length + 3, max_size=length + 3),
            min_size=1,
            max_size=5,
        )
    ),
    held_out=st.lists(st.integers(0, 2), min_size=4, max_size=40),
    n=st.integers(1, 4),
)
def test_the_overlap_is_that_of_sets_of_tuples(
    rows: list[list[int]], held_out: list[int], n: int
) -> None:
    calibration, ids = torch.tensor(rows), torch.tensor(held_out)
    found = overlap(calibration, ids, n)
    share, calibration_share, longest = by_sets(calibration, ids, n)
    assert found.n == n
    assert found.num_ngrams == len(held_out) - n + 1
    assert found.share == pytest.approx(share)
    assert found.calibration_share == pytest.approx(calibration_share)
    assert found.longest_run == longest
    run = ids[found.longest_start : found.longest_start + longest]
    assert longest == 0 or by_sets(calibration, run, n)[0] == 1.0


def test_large_ids_and_large_texts_are_compared_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond one chunk, across its edges, with ids up to the largest vocabularies."""
    from trsp.pruner import text_checks

    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(0, 300_000, (16, 256), generator=generator)
    held_out = torch.randint(0, 300_000, (5000,), generator=generator)
    held_out[990:1020] = calibration[3, 100:130]
    whole = overlap(calibration, held_out)
    assert (whole.longest_start, whole.longest_run) == (990, 30)
    assert whole.share == pytest.approx(18 / 4988)
    monkeypatch.setattr(text_checks, "_CHUNK", 1000)
    assert overlap(calibration, held_out) == whole
    assert overlap(calibration, held_out) != overlap(calibration, held_out.flip(0))


def test_no_ngram_goes_from_one_sequence_into_the_next() -> None:
    calibration = distinct(0, 40).view(2, 20)
    assert overlap(calibration, distinct(10, 20)).share == 0.0
    assert overlap(calibration, distinct(0, 20)).share == 1.0


def test_a_text_of_fewer_tokens_is_compared_as_a_whole() -> None:
    calibration = distinct(0, 64).view(2, 32)
    short = distinct(5, NGRAM - 3)
    assert overlap(calibration, short) == Overlap(10, 1, 1.0, 2 / 46 / 2, 10, 0)
    with pytest.raises(UserError, match="10-token runs"):
        require_no_overlap(calibration, short)
    assert require_no_overlap(calibration, distinct(60, 10)).share == 0.0
    assert overlap(distinct(0, 16).view(2, 8), distinct(0, 30)).n == 8
    for nothing in (overlap(calibration, short[:0]), overlap(calibration[:0], short)):
        assert nothing == Overlap(0, 0, 0.0, 0.0, 0, 0)


def held_out_of_share(calibration: Tensor, num_shared: int, num_ngrams: int) -> Tensor:
    """A text with so many n-grams, so many of them from the first calibration sequence."""
    shared = calibration[0, : num_shared + NGRAM - 1]
    return torch.cat([shared, distinct(10**6, num_ngrams - num_shared)])


@pytest.mark.parametrize(("num_shared", "refused"), [(99, False), (100, False), (101, True)])
def test_the_share_of_the_held_out_text_has_a_limit(num_shared: int, refused: bool) -> None:
    assert MAX_SHARE == 0.1
    calibration = distinct(0, 4096).view(8, 512)
    held_out = held_out_of_share(calibration, num_shared, 1000)
    found = overlap(calibration, held_out)
    assert found.share == num_shared / 1000
    assert found.too_much == refused
    if refused:
        with pytest.raises(UserError, match=r"10\.1% of the 13-token runs of wiki .*or, wait"):
            require_no_overlap(calibration, held_out, held_out="wiki", remedy="wait")
    else:
        assert require_no_overlap(calibration, held_out) == found


@pytest.mark.parametrize(("num_shared", "refused"), [(50, False), (51, True)])
def test_the_share_of_the_calibration_text_has_a_limit(num_shared: int, refused: bool) -> None:
    """A few sequences out of a large held-out text are a small share of it, and all of them."""
    assert MAX_CALIBRATION_SHARE == 0.5
    calibration = distinct(0, 100 + NGRAM - 1)[None]
    held_out = held_out_of_share(calibration, num_shared, 100_000)
    found = overlap(calibration, held_out)
    assert (found.share < MAX_SHARE, found.too_much) == (True, refused)


def sentences(num_words: int, seed: int) -> str:
    """Words of random letters in random order: hardly any 13 tokens come twice."""
    letters = random.Random(0)
    words = ["".join(letters.choices("etaoinshrdlu", k=5)) for _ in range(300)]
    return " ".join(random.Random(seed + 1).choices(words, k=num_words))


def test_a_pasted_paragraph_is_refused_and_shown() -> None:
    tokenizer = train_tokenizer([sentences(2000, 0)], 288)
    calibration, held_out, clean = sentences(2000, 1), sentences(300, 2), sentences(300, 3)
    paragraph = calibration[1000:1600]
    pasted = held_out[:500] + paragraph + held_out[500:]
    ids = {
        name: torch.tensor(tokenizer(text)["input_ids"])
        for name, text in (("calibration", calibration), ("clean", clean), ("pasted", pasted))
    }
    sequences = ids["calibration"][: len(ids["calibration"]) // 32 * 32].view(-1, 32)
    assert require_no_overlap(sequences, ids["clean"], tokenizer).share < 0.01
    with pytest.raises(UserError, match="stand in the calibration text") as refused:
        require_no_overlap(sequences, ids["pasted"], tokenizer)
    message = str(refused.value)
    assert "\n" not in message
    shown = message.split("such as '")[1].split("'")[0]
    assert 20 < len(shown) <= 60
    assert shown in paragraph
    assert "evaluation.allow_overlap=true" in message
    with pytest.raises(UserError, match=r"such as tokens \d+ \d+"):
        require_no_overlap(sequences, ids["pasted"])


def test_the_same_file_is_refused_by_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one text")
    (folder / "b.txt").write_text("to other")
    (tmp_path / "link.txt").symlink_to(folder / "b.txt")
    (tmp_path / "copy.txt").write_text("one text")
    (tmp_path / "apart.txt").write_text("a third.")
    for same in ("texts/b.txt", "link.txt", "texts", "texts/../texts/a.txt"):
        with pytest.raises(UserError, match="is calibration text too"):
            refuse_same_files([folder], [tmp_path / "apart.txt", tmp_path / same])
    with pytest.raises(UserError, match=r"copy\.txt has the same content as .*a\.txt"):
        refuse_same_files([folder], [tmp_path / "copy.txt"])
    refuse_same_files([folder], [tmp_path / "apart.txt"])


PACKED = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def packed(path: Path, content: bytes) -> Path:
    """Written as the name's ending says."""
    path.write_bytes(PACKED.get(path.suffix, bytes)(content))
    return path


LONG = " ".join(map(str, range(3000))).encode()


@pytest.mark.parametrize(
    "names",
    [
        ("a.txt.xz", "b.txt"),
        ("a.txt", "b.txt.gz"),
        ("a.jsonl.gz", "b.jsonl.xz"),
        ("a.txt", "b.txt"),
    ],
)
@pytest.mark.parametrize(
    ("calibration", "held_out", "how"),
    [
        (LONG, LONG, "has the same content as"),
        (LONG, LONG + b"\n", "has the same content as"),
        (LONG + b"\n" * 9000, LONG + b"\r\n", "has the same content as"),
        (LONG, LONG + b"\nand more", "begins with all of"),
        (LONG + b"\n", LONG + b" and more", "begins with all of"),
        (LONG, LONG[:4096], "is the beginning of"),
        (LONG * 200, LONG * 199 + b"\n\n", "is the beginning of"),
        (b"short", b"short\n", "has the same content as"),
        (b"x" * 4095, b"x" * 4095 + b"\n", "has the same content as"),
        (LONG, LONG[:4000], None),
        (b"short", b"short and more", None),
        (b" \n", b" \n", None),
        (LONG, LONG[:-1] + b"?", None),
        (LONG, b"?" + LONG, None),
        (LONG, LONG[:5000] + b"and more", None),
        (LONG, LONG[:5000] + b"\n" * 9000 + b"and more", None),
        (LONG * 200, LONG * 199 + b"?" + LONG, None),
    ],
)  # fmt: skip
def test_the_same_text_is_refused_however_it_is_packed(
    tmp_path: Path, names: tuple[str, str], calibration: bytes, held_out: bytes, how: str | None
) -> None:
    one, two = packed(tmp_path / names[0], calibration), packed(tmp_path / names[1], held_out)
    if how is None:
        refuse_same_files([one], [two])
        return
    with pytest.raises(UserError, match=f"{two} {how} the calibration text {one}: a perplexity"):
        refuse_same_files([one], [two])


def test_parquet_is_the_same_by_its_bytes_alone(tmp_path: Path) -> None:
    one, two, other = (tmp_path / f"{name}.parquet" for name in ("one", "two", "other"))
    one.write_bytes(LONG)
    two.write_bytes(LONG)
    with pytest.raises(UserError, match=r"two\.parquet has the same content as"):
        refuse_same_files([one], [two])
    for content in (LONG[:-1] + b"?", LONG[:-1] + b"\n", LONG[:-2], LONG + b"\n"):
        other.write_bytes(content)
        refuse_same_files([one], [other])
    refuse_same_files([one], [packed(tmp_path / "three.parquet.gz", LONG)])


def test_of_different_texts_only_the_beginning_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of those that begin alike, nothing behind the block that differs."""
    from trsp.pruner import text_checks

    read: dict[str, int] = {}

    def counted(path: Path, block_bytes: int = 4096) -> Iterator[bytes]:
        for block in unpacked_blocks(path, block_bytes):
            read[path.name] = read.get(path.name, 0) + len(block)
            yield block

    monkeypatch.setattr(text_checks, "unpacked_blocks", counted)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):
        packed(folder / f"{number}.txt.xz", b"%d " % number + LONG)
    held_out = packed(tmp_path / "held_out.txt", b"? " + LONG)
    refuse_same_files([folder], [held_out])
    assert set(read.values()) == {8192}
    read.clear()
    later = packed(tmp_path / "later.txt", b"3 " + LONG[:6000] + b"?" + LONG[6000:])
    refuse_same_files([folder], [later])
    assert read["3.txt.xz"] == read["later.txt"] == 8192 + 8192


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    whole = packed(tmp_path / "whole.txt", LONG)
    broken = tmp_path / "broken.txt.xz"
    broken.write_bytes(lzma.compress(LONG)[:-40])
    for pair in ((whole, broken), (broken, whole)):
        with pytest.raises(TextError, match=r"broken\.txt\.xz: the compressed data is broken"):
            refuse_same_files(*([path] for path in pair))


def test_empty_files_are_no_common_text(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("")
    refuse_same_files([tmp_path / "a.txt"], [tmp_path / "b.txt"])


def test_bytes_per_token_are_those_of_the_text() -> None:
    text = "the wörld " * 3000
    tokenizer = train_tokenizer([text], 262)
    ids = tokenizer(text)["input_ids"]
    assert bytes_per_token(tokenizer, torch.tensor(ids)) == pytest.approx(
        len(text.encode()) / len(ids), rel=1e-3
    )
    eos = [tokenizer.eos_token_id] * 4
    assert bytes_per_token(tokenizer, torch.tensor([eos, eos])) == 0.0
    assert bytes_per_token(tokenizer, torch.tensor([], dtype=torch.long)) == 0.0
    assert bits_per_byte(1.0, 0.0) is None
    assert bits_per_byte(torch.log(torch.tensor(256.0)).item(), 1.0) == pytest.approx(8.0)


def test_a_text_is_warned_of_from_the_limits_on() -> None:
    assert domain_warnings(None, None) == domain_warnings(None, 9.0) == []
    assert domain_warnings(MAX_BITS_PER_BYTE) == []
    assert "hardly knows such text" in domain_warnings(MAX_BITS_PER_BYTE + 0.01)[0]
    assert domain_warnings(1.0, MAX_BITS_RATIO) == domain_warnings(MAX_BITS_RATIO, 1.0) == []
    for pair in ((1.0, MAX_BITS_RATIO + 0.01), (MAX_BITS_RATIO + 0.01, 1.0)):
        (warning,) = domain_warnings(*pair)
        assert "different kinds" in warning
    assert len(domain_warnings(6.0, 1.0)) == 2


@pytest.fixture
def words() -> dict[str, Any]:
    return {"layers": 2, "settings": FAST, "vllm": "off"}


def forbidden(*_args: Any, **_options: Any) -> Any:
    raise AssertionError("it must not come to this")


@pytest.mark.parametrize("way", ["same file", "copy", "packed", "pasted"])
def test_a_run_is_refused_before_anything_is_trained_or_written(
    pico_llama: Path, text_file: Path, tmp_path: Path, words: dict[str, Any], way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data, held_out = tmp_path / "data.txt", tmp_path / "copy.txt"
    shutil.copy(text_file, data)
    message = "stand in the calibration text"
    if way == "same file":
        held_out, message = data, "is calibration text too"
    elif way == "copy":
        shutil.copy(data, held_out)
        message = "has the same content as"
    elif way == "packed":
        message = "has the same content as"
        held_out = tmp_path / "copy.txt.gz"
        held_out.write_bytes(gzip.compress(data.read_bytes()))
    else:
        held_out.write_text("hex " * 20 + data.read_text() + " and more")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(pipeline.Run, "select", forbidden)
    if way != "pasted":
        monkeypatch.setattr(pipeline.Run, "tokenizer", forbidden)
    words = {**words, "data": [data], "eval_data": [held_out]}
    with pytest.raises(UserError, match=message):
        api.prune(pico_llama, tmp_path / "out", **words)
    words.pop("vllm")
    with pytest.raises(UserError, match=message):
        api.describe(pico_llama, out=tmp_path / "out", **words)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_only_the_tokens_that_are_evaluated_count(
    pico_llama: Path, text_file: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    """The calibration text stands behind the first 128 tokens of the held-out text."""
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(f"{sentences(400, 5)} {text_file.read_text()}")
    words = {**words, "data": [text_file], "eval_data": [held_out]}
    words.pop("vllm")
    with pytest.raises(UserError, match="stand in the calibration text"):
        api.describe(pico_llama, out=tmp_path / "out", **words)
    words["settings"] = (*FAST, "evaluation.max_tokens=128")
    api.describe(pico_llama, out=tmp_path / "out", **words)


def test_overlap_is_allowed_to_those_who_ask_for_it_and_reported(
    pico_llama: Path, text_file: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    words["settings"] = (*FAST, "evaluation.allow_overlap=true")
    report = api.prune(
        pico_llama, tmp_path / "out", data=[text_file], eval_data=[text_file], **words
    )
    assert report["texts"]["overlap"]["calibration_share"] > 0.9
    assert len(report["warnings"]) == 1
    assert "stand in the calibration text" in report["warnings"][0]


def test_texts_of_the_models_kind_are_not_warned_of(
    pico_llama: Path, text_file: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    """The held-out words are those of the text the model was trained on, in another order."""
    shuffled = text_file.read_text().split()
    random.Random(0).shuffle(shuffled)
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(" ".join(shuffled[:600]))
    report = api.prune(
        pico_llama, tmp_path / "out", data=[text_file], eval_data=[held_out], **words
    )
    bits = report["texts"]["bits_per_byte"]
    assert report["warnings"] == []
    assert report["texts"]["overlap"]["share"] < 0.01
    assert 0 < bits["calibration"] < MAX_BITS_PER_BYTE
    assert bits["held_out"] < MAX_BITS_RATIO * bits["calibration"]
    assert (
        json.loads((tmp_path / "out" / "trsp_report.json").read_text())["texts"] == report["texts"]
    )


@pytest.mark.parametrize("stage", ["both", "selection", "transfer"])
def test_text_of_another_kind_is_warned_of(
    pico_llama: Path, held_out_file: Path, tmp_path: Path, words: dict[str, Any], stage: str
) -> None:
    """Whichever stage has run the dense model over the text."""
    digits = tmp_path / "digits.txt"
    chance = random.Random(0)
    digits.write_text("".join(chance.choice("0123456789abcdef") for _ in range(4000)))
    if stage == "selection":
        method = "selection.method=block_influence"
        words["settings"] = (*FAST, method, "transfer.enabled=false")
    elif stage == "transfer":
        words = {**words, "layers": None, "keep": [0, 1, 4, 5]}
    report = api.prune(
        pico_llama, tmp_path / "out", data=[digits], eval_data=[held_out_file], **words
    )
    known, of_two_kinds = report["warnings"]
    assert "hardly knows such text" in known
    assert "of different kinds" in of_two_kinds
    assert report["texts"]["bits_per_byte"]["calibration"] > 6


def test_a_resumed_run_says_the_same_of_its_texts(
    pico_llama: Path, text_file: Path, held_out_file: Path, tmp_path: Path, words: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = {**words, "data": [text_file], "eval_data": [held_out_file]}
    whole = api.prune(pico_llama, tmp_path / "whole", **words)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_publish", forbidden)
        with pytest.raises(AssertionError):
            api.prune(pico_llama, tmp_path / "out", **words)
    resumed = api.prune(pico_llama, tmp_path / "out", resume=True, **words)
    assert resumed["texts"] == whole["texts"]
    assert resumed["warnings"] == whole["warnings"]


def test_nothing_is_said_of_texts_that_nothing_was_learned_from(
    pico_llama: Path, held_out_file: Path, tmp_path: Path
) -> None:
    report = api.prune(
        pico_llama, tmp_path / "out", keep=[0, 1, 4], eval_data=[held_out_file],
        settings=("evaluation.window=64",), vllm="off",
    )  # fmt: skip
    assert report["texts"]["overlap"] is None
    assert set(report["texts"]["bits_per_byte"].values()) == {None}
    assert report["warnings"] == []


def test_the_command_line_shows_warnings_on_stderr(
    pico_llama: Path, held_out_file: Path, tmp_path: Path
) -> None:
    digits = tmp_path / "digits.txt"
    chance = random.Random(0)
    digits.write_text("".join(chance.choice("0123456789abcdef") for _ in range(4000)))
    words = ["prune", pico_llama, "--out", tmp_path / "out", "--layers", 2, "--data", digits]
    words += ["--eval-data", held_out_file, "--vllm", "off", "--json"]
    words += [word for setting in FAST for word in ("--set", setting)]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert len(report["warnings"]) == 2
    for warning in report["warnings"]:
        assert f"warning: {warning}" in result.stderr
