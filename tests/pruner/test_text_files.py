"""Local text comes out as it was written, or one line says which file is wrong and where."""

import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from trsp.pruner import text_files
from trsp.pruner.text_files import TextError, hash_text_file, read_fragments, read_texts

ROWS = ["first row\n", "zweite Zeile, größer", "", "四行目 \U0001f40d"]
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
}


def parquet_bytes(columns: dict[str, list[object]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def json_lines(rows: list[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


OBJECTS: list[object] = [{"id": number, "text": text} for number, text in enumerate(ROWS)]
CONTENTS = {
    ".jsonl": json_lines(OBJECTS),
    ".json": b" \n" + json.dumps(OBJECTS, indent=1).encode(),
    ".parquet": parquet_bytes({"id": [0, 1, 2, 3], "text": [*ROWS]}),
}


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("extension", CONTENTS)
def test_each_row_is_a_document(tmp_path: Path, extension: str, compression: str) -> None:
    path = tmp_path / f"rows{extension}{compression}"
    path.write_bytes(COMPRESSORS[compression](CONTENTS[extension]))
    assert list(read_texts([path])) == ROWS


@pytest.mark.parametrize("compression", COMPRESSORS)
def test_a_text_file_is_one_document(tmp_path: Path, compression: str) -> None:
    text = "one\r\ntwo\n\nthree é"
    path = tmp_path / f"book.txt{compression}"
    path.write_bytes(COMPRESSORS[compression](text.encode()))
    assert list(read_texts([path])) == [text]


def test_json_lines_under_the_name_json_are_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "c4-train.00000.json"
    path.write_bytes(b"\n" + json_lines(OBJECTS))
    assert list(read_texts([path])) == ROWS


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(json_lines([{"text": 1, "content": "from lines"}]))
    table = tmp_path / "b.parquet"
    table.write_bytes(parquet_bytes({"content": ["from a table"], "text": [1]}))
    assert list(read_texts([lines, table], "content")) == ["from lines", "from a table"]


def test_a_folder_is_read_to_the_bottom_in_order_without_hidden_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found_in_order = Path.rglob
    monkeypatch.setattr(
        Path, "rglob", lambda *arguments: sorted(found_in_order(*arguments), reverse=True)
    )
    for name in ("b/2.txt", "a.txt", "b/1.txt", ".git/config", "b/.cache.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name, "utf-8")
    assert list(read_texts([tmp_path])) == ["a.txt", "b/1.txt", "b/2.txt"]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40), chunk_bytes=st.integers(1, 5))
def test_a_character_across_two_chunks_is_whole(
    tmp_path_factory: pytest.TempPathFactory, text: str, chunk_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK_BYTES", chunk_bytes)
        fragments = list(read_fragments([path]))
    assert "".join(fragment.text for fragment in fragments) == text
    assert [fragment.ends_document for fragment in fragments[-2:]] in ([True], [False, True])


@pytest.mark.parametrize("chunk_bytes", [2, 1 << 20])
@pytest.mark.parametrize(
    ("content", "offset", "byte"),
    [
        (b"abc\xffdef", 3, "ff"),
        ("größe".encode() + b"\xc3", 7, "c3"),
        (b"\xff", 0, "ff"),
        (b"\xe2\x82x", 0, "e2"),
        ("latin é".encode("latin-1") + b" x", 6, "e9"),
    ],
)
def test_bytes_that_are_not_utf_8_are_named_with_their_offset(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    offset: int,
    byte: str,
    chunk_bytes: int,
) -> None:
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "bad.txt.xz"
    path.write_bytes(lzma.compress(content))
    expected = rf"bad\.txt\.xz: is not UTF-8: byte 0x{byte} at offset {offset};"
    with pytest.raises(TextError, match=expected):
        list(read_texts([path]))


def test_the_offset_counts_from_the_start_of_a_file_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "a\xff"}\n')
    with pytest.raises(TextError, match="0xff at offset 28;"):
        list(read_texts([path]))


DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            json_lines([{"text": "a"}, {"b": 1, "c": 2}]),
            "line 2: .*'b', 'c'.*text_field",
        ),
        ("a.jsonl", json_lines([{"text": None}]), "line 1: .*not text but NoneType"),
        ("a.jsonl", json_lines(["only a string"]), "line 1: a row is an object .* not str"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: is not JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "line 1: is not JSON: Exceeds"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: .*half a surrogate pair at character 0"),
        ("a.jsonl", DEEP, "line 1: .*nested too deeply"),
        ("a.json", json.dumps([{"b": 1}]).encode(), "row 1: there is no field 'text'; .* 'b'"),
        ("a.json", b'[{"text": "a"}', "is not JSON"),
        ("a.parquet", parquet_bytes({"b": ["x"]}), "there is no field 'text'; .* 'b'"),
        ("a.parquet", parquet_bytes({"text": ["x", None]}), "row 2: .*not text but NoneType"),
        ("a.parquet", b"PAR1 but no more", "not a readable Parquet file"),
        ("a.parquet", CONTENTS[".parquet"][:-40], "not a readable Parquet file"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-20], "compressed data is broken"),
        ("a.txt.xz", b"no xz at all", "compressed data is broken"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-4], "compressed data is broken"),
        ("a.txt.gz", b"no gzip at all", "compressed data is broken"),
        ("a.csv", b"text\nx", "its extension is not one of .txt, .jsonl, .json, .parquet"),
        ("a.xz", lzma.compress(b"text"), "its extension is not one of"),
        ("a", b"text", "its extension is not one of"),
    ],
)
def test_a_bad_file_is_named_in_one_line(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=expected) as caught:
        list(read_texts([path]))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_file_in_a_folder_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", "utf-8")
    (tmp_path / "README.md").write_text("text", "utf-8")
    with pytest.raises(TextError, match=r"README\.md: its extension"):
        list(read_texts([tmp_path]))


def test_missing_paths_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="nowhere: does not exist"):
        list(read_texts([tmp_path / "nowhere"]))
    (tmp_path / ".hidden.txt").write_text("text", "utf-8")
    with pytest.raises(TextError, match="the folder holds no files"):
        list(read_texts([tmp_path]))


def test_progress_ends_at_the_bytes_of_all_files(tmp_path: Path) -> None:
    contents = {"a.txt": b"text", "b.jsonl": CONTENTS[".jsonl"], "c.parquet": CONTENTS[".parquet"]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    seen: list[tuple[str, int, int]] = []
    list(read_texts([tmp_path], progress=lambda *report: seen.append(report)))
    total = sum(map(len, contents.values()))
    assert {report[0] for report in seen} == {"reading text"}
    assert [report[1] for report in seen] == sorted(report[1] for report in seen)
    assert seen[-1] == ("reading text", total, total)
    assert all(report[2] == total for report in seen)


def test_a_folders_hash_is_that_of_its_names_and_texts(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")
    found = {hash_text_file(folder)}
    assert hash_text_file(folder / "a.txt") == hashlib.sha256(b"one").hexdigest()
    (folder / "b.txt").write_text("too")
    found.add(hash_text_file(folder))
    (folder / "b.txt").rename(folder / "c.txt")
    found.add(hash_text_file(folder))
    assert len(found) == 3
    with pytest.raises(TextError, match="does not exist"):
        hash_text_file(tmp_path / "absent.txt")
