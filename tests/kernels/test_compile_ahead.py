"""Every kernel variant compiles for sm_80 and sm_90 without a GPU, and what the result shows.

D = 4096. It shows the absence of known defects, not speed.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
KERNELS = {
    "_gated_branch_forward_kernel",
    "_gated_branch_backward_kernel",
    "_gated_difference_forward_kernel",
    "_gated_difference_backward_kernel",
}


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """The records of compile_ahead.py, from a process whose Triton compiles."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_ahead.py")
    result = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    return list(json.loads(result.stdout))


def test_every_variant_compiles(records: list[dict[str, Any]]) -> None:
    assert {record["kernel"] for record in records} == KERNELS
    # Two targets, eight variants: two of one branch as well, the mixed one without a difference.
    assert len(records) == 2 * (8 * 4 + 2 - 2)


def test_no_kernel_spills(records: list[dict[str, Any]]) -> None:
    assert [record for record in records if record["stack"] or record["local"]] == []


def test_row_offsets_are_multiplied_in_64_bits(records: list[dict[str, Any]]) -> None:
    assert [record for record in records if record["multiplied"] != ["i64"]] == []


def test_no_kernel_adds_in_an_undefined_order(records: list[dict[str, Any]]) -> None:
    assert [record for record in records if record["atomics"]] == []
