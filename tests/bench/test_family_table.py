"""The table of families: outcomes come from real runs, and a failure is told as one."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trsp.bench import family_table
from trsp.bench.family_table import app, measure_family, table_markdown
from trsp.pruner import api
from trsp.pruner.errors import RunError


def test_a_family_is_cut_pruned_and_loaded() -> None:
    row = measure_family("llama", ["compaction", "stages", "reload"])
    assert row["model_class"] == "LlamaForCausalLM"
    assert {row[name]["status"] for name in ("compaction", "stages", "reload")} == {"passed"}
    assert "differ from the masked reference's by 0" in row["compaction"]["detail"]


def test_a_family_that_cannot_be_cut_is_refused_with_the_reason() -> None:
    row = measure_family("gpt2_scaled_by_depth", ["compaction"])
    assert row["compaction"]["status"] == "refused"
    assert "scale_attn_by_inverse_layer_idx" in row["compaction"]["detail"]
    lines = table_markdown({"families": {"gpt2_scaled_by_depth": row}}).splitlines()
    assert lines[-1].startswith("- `gpt2_scaled_by_depth`: ")
    assert "scale_attn_by_inverse_layer_idx" in lines[-1]
    assert not [line for line in lines if line.startswith("| gpt2")]


def test_a_run_that_fails_is_a_failure_and_the_record_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = api.prune

    def failing(*words: Any, **named: Any) -> Any:
        if "data" in named:
            raise RunError("the stage 2 loss is nan")
        return honest(*words, **named)

    monkeypatch.setattr(api, "prune", failing)
    out = tmp_path / "families.json"
    words = ["--out", str(out), "--family", "llama", "--column", "stages", "--column", "reload"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    row = json.loads(out.read_text())["families"]["llama"]
    assert row["stages"] == {"status": "failed", "detail": "the stage 2 loss is nan"}
    assert row["reload"]["status"] == "passed"
    assert "| **no** | yes | not run |" in table_markdown(json.loads(out.read_text()))


def test_what_a_record_holds_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "families.json"
    asked: list[list[str]] = []

    def measure(name: str, columns: list[str]) -> dict[str, Any]:
        asked.append(columns)
        passed = {column: {"status": "passed", "detail": ""} for column in columns}
        return {"model_class": "L", **passed}

    monkeypatch.setattr(family_table, "measure_family", measure)
    words = ["--out", str(out), "--family", "llama", "--column", "reload"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert CliRunner().invoke(app, [*words, "--column", "stages"]).exit_code == 0
    assert asked == [["reload"], ["stages"]]
    assert set(json.loads(out.read_text())["environments"]) == {"reload", "stages"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--family", "lama"], "'lama' is unknown"),
        (["--column", "speed"], "'speed' is unknown"),
    ],
)
def test_unknown_words_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "record.json"), *words])
    assert result.exit_code == 2
    assert said in result.output


def test_another_record_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "other.json"
    out.write_text('{"kind": "trsp compare"}')
    result = CliRunner().invoke(app, ["--out", str(out)])
    assert result.exit_code == 2
    assert "is no record of this command" in result.output
    assert json.loads(out.read_text()) == {"kind": "trsp compare"}
