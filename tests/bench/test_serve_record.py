"""A record comes back as it was written, and what is none is refused in one line."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from trsp.bench.serve_record import read_serve_record, write_serve_record
from trsp.pruner.errors import UserError


def test_a_record_comes_back(report_records: ModuleType, tmp_path: Path) -> None:
    record = report_records.build(num_blocks=2)
    write_serve_record(tmp_path / "deep" / "record.json", record)
    assert read_serve_record(tmp_path / "deep" / "record.json") == record
    assert record.arm("dense").num_hidden_layers == 32


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "kernels"}, "kind 'kernels'"),
        ({"schema_version": 2}, "schema_version 2"),
        ({"extra": 1}, "extra: Extra inputs"),
        ({"partial": "no"}, "partial: "),
        ({"num_blocks": -1}, "num_blocks: "),
        ({"confidence": float("nan")}, "confidence: "),
        ({"cells": [{}]}, r"cells\.0\."),
    ],
)
def test_another_document_is_one_line(
    change: dict[str, object], told: str, report_records: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    document = json.loads(report_records.build(num_blocks=1).model_dump_json())
    path.write_text(json.dumps(document | change))
    with pytest.raises(UserError, match=rf"record\.json: .*{told}") as raised:
        read_serve_record(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_no_document_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(UserError, match=r"record\.json"):
        read_serve_record(tmp_path / "record.json")
