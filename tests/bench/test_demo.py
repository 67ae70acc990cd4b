"""The demo, made small: it runs from nothing, proves its result and repeats itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trsp.bench import demo
from trsp.bench.direct_removal import ROWS
from trsp.pruner import api
from trsp.pruner.errors import UserError

SMALL = (
    "calibration.num_sequences=8", "calibration.sequence_length=32",
    "selection.first_round_steps=4", "selection.round_steps=2", "selection.batch_size=2",
    "selection.verification_sequences=4", "transfer.steps=4", "transfer.batch_size=2",
)  # fmt: skip


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in {
        "NUM_LAYERS": 8, "HIDDEN_SIZE": 64, "VOCAB_SIZE": 300, "TRAIN_STEPS": 10,
        "TRAIN_CHARS": 100_000, "HELD_OUT_CHARS": 10_000, "SETTINGS": SMALL,
    }.items():  # fmt: skip
        monkeypatch.setattr(demo, name, value)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_seed_gives_the_same_table_twice(small_demo: Any, tmp_path: Path) -> None:
    tables = []
    for name in ("first", "second"):
        record = demo.run_demo(tmp_path / name, seed=3)
        tables.append(
            {
                key: (row["dropped"], {n: p["perplexity"] for n, p in row["perplexity"].items()})
                for key, row in record["rows"].items()
            }
        )
        assert json.loads((tmp_path / name / "demo.json").read_text())["rows"] == record["rows"]
    assert tables[0] == tables[1]
    assert list(tables[0]) == list(ROWS)
    assert [len(dropped) for dropped, _ in tables[0].values()] == [0, 2, 2, 2]
    out = tmp_path / "second"
    for row in record["rows"].values():
        assert Path(row["folder"]).is_dir(), "the record names where the files are"
    assert api.verify(out / "trsp", against=out / "trsp.run" / "transferred", vllm="off").passed


def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        demo.run_demo(tmp_path)


def test_train_and_held_out_text_share_no_file() -> None:
    train, held_out = demo.standard_library_text()
    assert len(train) >= demo.TRAIN_CHARS
    assert len(held_out) >= demo.HELD_OUT_CHARS
    held_lines = {line for line in held_out.splitlines() if len(line) > 60}
    shared = held_lines & set(train.splitlines())
    assert len(shared) < 0.05 * len(held_lines)
