"""The cost figures are measured by code that runs, and a broken bar shows."""

import json
import sys
from pathlib import Path

import pytest

from trsp.bench import stages


def test_every_figure_is_measured_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stages.json"
    monkeypatch.setattr(
        sys,
        "argv",
        ["stages", "--out", str(out), "--layers", "4", "--hidden-size", "64", "--repeats", "1",
         "--sequence-length", "16", "--batch-size", "2", "--checkpoint-hidden-size", "128",
         "--device", "cpu"],
    )  # fmt: skip
    stages.main()
    record = json.loads(out.read_text())
    assert record["stage_1"]["state_share_of_weights"] < 0.01
    assert record["stage_1"]["saved_activation_bytes"]["frozen model"] > 0
    assert set(record["stage_2"]["step_ratio"]) == {"paper", "trsp", "trsp against labels"}
    assert record["compaction"]["peak_beyond_largest_shard_bytes"] < 300e6
    assert record["start_up"]["layer_map_imports_torch"] is False
    assert "commit" in record["environment"]
    table = capsys.readouterr().out
    assert "stage 2, paper" in table


def test_a_bar_that_is_not_met_says_so() -> None:
    record = {
        "stage_1": {"step_ratio": 1.5, "state_share_of_weights": 0.0},
        "stage_2": {"step_ratio": {"paper": 1.0, "trsp": 1.0}},
        "compaction": {"time_ratio_to_copy": 1.0, "peak_beyond_largest_shard_bytes": 1.0},
        "start_up": {"help_seconds": 0.1, "layer_map_imports_torch": True},
    }
    verdicts = list(stages.results_table(record).columns[3].cells)
    assert verdicts == ["NO", "yes", "yes", "yes", "yes", "yes", "yes", "NO"]
