"""What `trsp audit` finds of its texts: refused, drawn again, warned of, or not to be known."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from trsp.bench.audit import AuditOptions, audit
from trsp.bench.audit_record import AuditRecord, read_audit_record, write_audit_record
from trsp.bench.audit_texts import calibration_bits, refuse_calibration_text, seen_text
from trsp.bench.cli import app
from trsp.pruner.api import compact, prune
from trsp.pruner.checkpoint import load_tokenizer, open_checkpoint
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import LayerMap, read_layer_map, write_layer_map
from trsp.pruner.run import base_model_of
from trsp.pruner.token_ids import hash_ids


def audited(dense: Path, pruned: Path, text: Path) -> AuditRecord:
    """Of the losses alone."""
    return audit(
        AuditOptions(dense=dense, pruned=pruned, data={"held": [text]}, window=32, prompts=0)
    )


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["audit", *words])


@pytest.fixture(scope="module")
def calibrated(
    pico_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model pruned by `trsp prune`, and the file that it learned from."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "texts").mkdir()
    data = shutil.copy(text_file, folder / "texts" / "data.txt")
    settings = ("calibration.num_sequences=8", "calibration.sequence_length=32",
                "selection.method=block_influence", "transfer.enabled=false")  # fmt: skip
    prune(
        pico_llama, folder / "out", data=[folder / "texts"], layers=1, settings=settings, vllm="off"
    )
    return folder / "out", data


@pytest.mark.parametrize("way", ["same file", "copy"])
def test_the_text_that_was_calibrated_on_is_refused(
    way: str, pico_llama: Path, calibrated: tuple[Path, Path], held_out_file: Path, tmp_path: Path
) -> None:
    pruned, data = calibrated
    if way == "copy":
        data = shutil.copy(data, tmp_path / "another.txt")
    words = ("--data", f"mine={held_out_file}", "--data", f"theirs={data}")
    found = run(str(pico_llama), str(pruned), *words)
    assert found.exit_code == 2
    message = " ".join(f"{found.exception} {found.stderr}".split())
    assert f"the held-out text {data}" in message
    assert "calibration text" in message
    assert "name other files with --data" in message


@pytest.fixture
def told_of(calibrated: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder `runs/out` of a layer map with those sources, and of a report."""
    whole = read_layer_map(calibrated[0] / "layer_map.json")
    assert whole.calibration is not None

    def make(source: Any, report: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / "runs" / "out"
        folder.mkdir(parents=True, exist_ok=True)
        about = {**(whole.calibration or {}), "source": source}
        write_layer_map(replace(whole, calibration=about), folder / "layer_map.json")
        (folder / "trsp_report.json").write_text(json.dumps(report or {}))
        return folder

    return make


def test_calibration_text_that_is_not_there_any_more_is_not_judged(
    told_of: Callable[..., Path], tmp_path: Path
) -> None:
    moved = tmp_path / "moved.txt"
    moved.write_text("one two three")
    with pytest.raises(UserError, match="is calibration text too"):
        refuse_calibration_text(told_of([str(tmp_path / "gone"), str(moved)]), {"a": [moved]})
    unreadable = [tmp_path / "odd.pdf", tmp_path / "broken.txt.xz", tmp_path / "gone"]
    for path in unreadable[:2]:
        path.write_bytes(b"no text")
    for source in (list(map(str, unreadable)), ["self"], 3):
        refuse_calibration_text(told_of(source), {"a": [moved]})
    (told_of([str(moved)]) / "layer_map.json").unlink()
    refuse_calibration_text(tmp_path / "runs" / "out", {"a": [moved]})


def test_a_relative_path_starts_where_the_model_was_pruned(
    told_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of that name in the folder of the audit is another one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    here, there = Path("train.txt"), tmp_path / "train.txt"
    here.write_text("another text")
    there.write_text("the calibration text")
    folder = told_of(["train.txt"], {"out": "runs/out"})
    refuse_calibration_text(folder, {"a": [here]})
    with pytest.raises(UserError, match="is calibration text too"):
        refuse_calibration_text(folder, {"a": [here], "b": [there]})
    with pytest.raises(UserError, match="is calibration text too"):
        refuse_calibration_text(Path("../runs/out"), {"b": [there]})
    for out in ("elsewhere/out", str(folder), "../out", ".", 3):
        refuse_calibration_text(told_of(["train.txt"], {"out": out}), {"a": [here], "b": [there]})


def test_the_calibration_sequences_are_drawn_again(
    calibrated: tuple[Path, Path], told_of: Callable[..., Path], tmp_path: Path
) -> None:
    pruned, data = calibrated
    tokenizer = load_tokenizer(open_checkpoint(pruned))
    told = read_layer_map(pruned / "layer_map.json").calibration
    assert told is not None
    seen = seen_text(pruned, tokenizer)
    assert seen.unknown is None
    assert seen.input_ids is not None
    assert hash_ids(seen.input_ids) == told["sha256"]
    here = shutil.copy(data, tmp_path / "data.txt")
    again = seen_text(told_of([str(here)]), tokenizer).input_ids
    assert again is not None
    assert torch.equal(again, seen.input_ids)


def test_what_a_search_trained_on_is_drawn_again_from_the_field_that_was_read(
    pico_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """It held out a part for itself, and rows have two fields."""
    data, lines = tmp_path / "rows.jsonl", text_file.read_text().splitlines()
    rows = (json.dumps({"text": "other words", "body": line}) for line in lines if line.strip())
    data.write_text("\n".join(rows))
    settings = ("calibration.num_sequences=16", "calibration.sequence_length=32",
                "calibration.text_field=body", "auto.max_transfers=1", "transfer.steps=1",
                "transfer.batch_size=1")  # fmt: skip
    prune(pico_llama, tmp_path / "out", data=[data], layers=1, auto=True, settings=settings,
          vllm="off")  # fmt: skip
    told = read_layer_map(tmp_path / "out" / "layer_map.json").calibration
    seen = seen_text(tmp_path / "out", load_tokenizer(open_checkpoint(tmp_path / "out")))
    assert seen.unknown is None
    assert seen.input_ids is not None
    assert len(seen.input_ids) < 16
    assert told is not None
    assert hash_ids(seen.input_ids) == told["sha256"]


def test_calibration_text_that_cannot_be_drawn_again_is_not_compared_and_why(
    told_of: Callable[..., Path], calibrated: tuple[Path, Path], tmp_path: Path
) -> None:
    here = Path(shutil.copy(calibrated[1], tmp_path / "data.txt"))
    tokenizer = load_tokenizer(open_checkpoint(calibrated[0]))

    def unknown(source: Any) -> str:
        seen = seen_text(told_of(source), tokenizer)
        assert seen.input_ids is None
        return str(seen.unknown)

    assert "is not to be read here" in unknown([str(here), str(tmp_path / "gone")])
    assert "is not to be read here" in unknown(["relative.txt"])
    assert "wrote" in unknown(["self"])
    here.write_text("other words " * 2000)
    assert "hold another text by now" in unknown([str(here)])
    here.write_text("too short")
    assert "could not be drawn again: the calibration text has" in unknown([str(here)])
    recipe = told_of([str(here)]) / "recipe.yaml"
    recipe.write_text("calibration: 3")
    assert "could not be drawn again: " in unknown([str(here)])
    assert "calibration" in unknown([str(here)])
    recipe.unlink()
    (told_of([str(here)]) / "layer_map.json").unlink()
    assert "no layer map" in str(seen_text(tmp_path / "runs" / "out", tokenizer).unknown)


def test_text_with_much_of_the_calibration_text_is_refused_and_some_is_warned_of(
    pico_llama: Path, calibrated: tuple[Path, Path], held_out_file: Path, tmp_path: Path
) -> None:
    """No file of it is a calibration file, only sentences are."""
    pruned = calibrated[0]
    tokenizer = load_tokenizer(open_checkpoint(pruned))
    ids = seen_text(pruned, tokenizer).input_ids
    assert ids is not None
    held, seen = held_out_file.read_text(), str(tokenizer.decode(ids[0].tolist()))
    mixed = tmp_path / "mixed.txt"
    mixed.write_text(held[:200] + seen + held[200:400])
    with pytest.raises(UserError, match="runs of the text held stand in the calibration text"):
        audited(pico_llama, pruned, mixed)
    allowed = tmp_path / "allowed"
    shutil.copytree(pruned, allowed)
    recipe = (allowed / "recipe.yaml").read_text()
    (allowed / "recipe.yaml").write_text(
        recipe.replace("allow_overlap: false", "allow_overlap: true")
    )
    record = audited(pico_llama, allowed, mixed)
    assert record.domains[0].overlap is not None
    assert record.domains[0].overlap.share > 0.1
    assert "runs of the text held stand in the calibration text" in record.warnings[0]
    mixed.write_text(held[:2000] + seen + held[2000:4000])
    record = audited(pico_llama, pruned, mixed)
    overlap = record.domains[0].overlap
    assert overlap is not None
    assert 0.01 < overlap.share < 0.1
    assert "runs of the text held stand in the calibration text" in record.warnings[0]
    (line,) = record.overlap_lines()
    assert line.startswith(f"held: {100 * overlap.share:.2g} % of its 13-token runs stand in")
    write_audit_record(tmp_path / "audit.json", record)
    assert read_audit_record(tmp_path / "audit.json") == record
    mixed.write_text("".join(random.Random(0).choices("abcdefgh ", k=2000)))
    record = audited(pico_llama, pruned, mixed)
    assert record.domains[0].overlap is not None
    assert record.domains[0].overlap.share == 0
    assert not any("stand in" in warning for warning in record.warnings)


def test_an_overlap_that_could_not_be_measured_is_said(
    pico_llama: Path, held_out_file: Path, tmp_path: Path
) -> None:
    base = base_model_of(open_checkpoint(pico_llama))
    layer_map = LayerMap.from_keep(base, (0, 1, 2, 4, 5))
    shallow = compact(pico_llama, layer_map, tmp_path / "shallow")
    record = audited(pico_llama, shallow, held_out_file)
    assert record.domains[0].overlap is None
    (line,) = record.overlap_lines()
    assert line.endswith(
        "not measured: the pruned folder has no layer map that names calibration text."
    )


def test_text_that_the_dense_model_hardly_knows_is_warned_of(
    pico_llama: Path, calibrated: tuple[Path, Path], held_out_file: Path, tmp_path: Path
) -> None:
    chance, digits = random.Random(0), tmp_path / "digits.txt"
    digits.write_text("".join(chance.choice("0123456789abcdef") for _ in range(2000)))
    found = run(
        str(pico_llama), str(calibrated[0]), "--data", f"known={held_out_file}",
        "--data", f"hex={digits}", "--window", "32", "--prompts", "0", "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    record = json.loads(found.stdout)
    known, of_hex = (domain["bits_per_byte"] for domain in record["domains"])
    assert known < 2.5 < of_hex
    told = [warning for warning in record["warnings"] if "stand in" not in warning]
    assert len(told) == 1 + (of_hex > 1.6 * known)
    unknown = told[0]
    assert unknown.startswith(f"the dense model needs {of_hex:.2f} bits per byte of the text hex")
    for warning in record["warnings"]:
        assert f"warning: {warning}" in found.stderr


def test_text_of_another_kind_than_the_calibration_text_is_warned_of(
    pico_llama: Path, calibrated: tuple[Path, Path], held_out_file: Path, tmp_path: Path
) -> None:
    """By what the folder's report says of that text; without a report nothing is said."""
    path = tmp_path / "trsp_report.json"
    report = json.loads((calibrated[0] / path.name).read_text())
    report["texts"]["bits_per_byte"]["calibration"] = 99.0
    shutil.copytree(calibrated[0], tmp_path, dirs_exist_ok=True)
    path.write_text(json.dumps(report))
    warnings = audited(pico_llama, tmp_path, held_out_file).warnings
    (warning,) = (one for one in warnings if "stand in" not in one)
    assert warning.startswith("calibration and the text held are of different kinds")
    for content in ({"texts": 1}, {"texts": {"bits_per_byte": {"calibration": None}}}, {}):
        path.write_text(json.dumps(content))
        assert calibration_bits(tmp_path) is None
    path.unlink()
    assert calibration_bits(tmp_path) is None
