"""Two commits or two records: slower is found, noise is not, the incomparable is named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trsp.bench import kernel_compare
from trsp.bench.kernel_cases import KernelCase
from trsp.bench.kernel_compare import (
    compare_blocks,
    compare_records,
    compare_with_commit,
    identity,
    incomparable,
    run_comparison,
)
from trsp.bench.kernel_plan import Item
from trsp.pruner.errors import RunError, UserError

ROOT = Path(kernel_compare.__file__).resolve().parent.parent


def verdicts(past: list[dict[str, float]], present: list[dict[str, float]]) -> list[str]:
    return [row.verdict for row in compare_blocks(past, present)]


def test_a_regressed_block_trips_and_a_faster_one_does_not() -> None:
    past = [{"a": 100.0}, {"a": 101.0}]
    assert verdicts(past, [{"a": 107.0}, {"a": 107.0}]) == ["SLOWER"]
    assert verdicts(past, [{"a": 104.0}, {"a": 104.0}]) == ["ok"]
    assert verdicts(past, [{"a": 50.0}, {"a": 50.0}]) == ["ok"]


def test_noise_widens_the_limit_to_three_times_itself() -> None:
    noisy = [{"a": 100.0}, {"a": 104.0}]
    (row,) = compare_blocks(noisy, [{"a": 112.0}, {"a": 112.0}])
    assert row.verdict == "ok"
    assert row.limit == pytest.approx(3 * 0.04)
    assert verdicts(noisy, [{"a": 120.0}, {"a": 120.0}]) == ["SLOWER"]


def test_noise_that_hides_what_is_looked_for_is_no_pass() -> None:
    noisy = [{"a": 100.0}, {"a": 110.0}]
    (row,) = compare_blocks(noisy, [{"a": 105.0}, {"a": 105.0}])
    assert (row.verdict, row.limit) == ("TOO NOISY", pytest.approx(0.3))
    assert row.reason == "noise of 10% hides anything below 30%"
    document: dict[str, Any] = kernel_compare._document("commit x", dry_run=False)
    (failed,) = kernel_compare._finish(document, [row], [])["failed"]
    assert failed.startswith("a: TOO NOISY noise of 10%")
    # Beyond even that noise it is slower all the same.
    assert verdicts(noisy, [{"a": 140.0}, {"a": 140.0}]) == ["SLOWER"]


def test_a_case_that_one_side_lacks_is_not_compared() -> None:
    rows = compare_blocks([{"a": 1.0}] * 2, [{"a": 1.0, "b": 1.0}] * 2)
    assert [(row.name, row.verdict) for row in rows] == [("a", "ok"), ("b", "not compared")]
    assert "the past has no time" in rows[1].reason


def record(median: float, **machine: str) -> dict[str, Any]:
    timing = {"median_us": median, "p20_us": 0.99 * median, "p80_us": 1.01 * median}
    case = {"op": "gated_branch", "hidden_size": 64}
    results = [{"name": "a", "case": case, "tokens": 5, "arms": {"fused": {"forward": timing}}}]
    named = {"gpu": "NVIDIA H200", "torch": "2.13.0", "triton": "3.7.1"} | machine
    versions = {"torch": named["torch"], "triton": named["triton"]}
    environment = {"gpu": {"name": named["gpu"]}, "versions": versions}
    whole = {"schema_version": 1, "benchmark": "kernels", "dry_run": False}
    return {**whole, "results": results, "environment": environment}


def test_records_are_compared_by_their_own_spread() -> None:
    assert compare_records(record(100), record(104))[0].verdict == "ok"
    assert compare_records(record(100), record(106))[0].verdict == "SLOWER"
    lacking = {**record(100), "results": []}
    assert compare_records(record(100), lacking)[0].verdict == "not compared"


@pytest.mark.parametrize(
    ("what", "other"), [("gpu", "NVIDIA A100"), ("triton", "3.6.0"), ("torch", "2.12.1")]
)
def test_a_record_of_another_machine_is_not_comparable(what: str, other: str) -> None:
    ours = identity(record(100))
    assert incomparable(ours, ours) == []
    (reason,) = incomparable(identity(record(100, **{what: other})), ours)
    assert what in reason


def test_a_record_from_elsewhere_fails_and_never_passes(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record(100, gpu="NVIDIA A100")))
    document = run_comparison(str(path), dry_run=True)
    assert any(line.startswith("not comparable: gpu is") for line in document["failed"])


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "stages"}'])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"record\.json"):
        run_comparison(str(path), dry_run=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"environment": None}, "environment"),
        ({"results": None}, "results"),
        ({"environment": {"versions": []}}, "no attribute 'get'"),
        ({"results": [{"name": "a"}]}, "arms"),
        ({"results": [{"name": "a", "arms": {"fused": {"forward": {}}}}]}, "p80_us"),
    ],
)
def test_a_record_that_lacks_something_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = tmp_path / "record.json"
    whole = {name: value for name, value in (record(100) | change).items() if value is not None}
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=rf"record\.json: is no whole record .*{said}"):
        run_comparison(str(path), dry_run=True)


def test_a_record_of_a_case_that_is_no_longer_measured_is_refused(tmp_path: Path) -> None:
    path, mixed = tmp_path / "record.json", record(100)
    mixed["results"][0]["case"] = {"op": "gated_difference", "dtype": "mixed"}
    path.write_text(json.dumps(mixed))
    with pytest.raises(UserError, match=r"record\.json.*gated_difference is not measured in mixed"):
        run_comparison(str(path), dry_run=True)


def test_nothing_compared_is_a_failure() -> None:
    document: dict[str, Any] = kernel_compare._document("commit x", dry_run=False)
    assert kernel_compare._finish(document, [], [])["failed"] == ["nothing was compared"]


def planted_kernels(folder: Path, **changed: str) -> Path:
    """A copy of kernels/, some files replaced; an empty text leaves the file out."""
    kernels = folder / "kernels"
    kernels.mkdir(parents=True)
    for file in (ROOT / "kernels").glob("*.py"):
        text = changed.get(file.stem, file.read_text(encoding="utf-8"))
        if text:
            (kernels / file.name).write_text(text, encoding="utf-8")
    return kernels


def block(folder: Path, kernels: Path) -> dict[str, Any]:
    item = Item(KernelCase("gated_branch", hidden_size=64), 5, ("fused",))
    return kernel_compare._run_block(folder, kernels, [item.to_document()], dry_run=True)


def test_a_block_runs_the_kernels_it_was_given(tmp_path: Path) -> None:
    source = (ROOT / "kernels" / "reference.py").read_text(encoding="utf-8")
    wrong = source.replace("x_wide + s * (y_wide - x_wide)", "x_wide - s * (y_wide - x_wide)")
    assert wrong != source
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    good = block(tmp_path / "a", planted_kernels(tmp_path / "good"))
    bad = block(tmp_path / "b", planted_kernels(tmp_path / "bad", reference=wrong))
    assert good["not_compared"] == []
    assert "incorrect: z" in bad["not_compared"][0]


def test_an_op_that_the_kernels_lack_is_not_found_in_the_present(tmp_path: Path) -> None:
    (tmp_path / "block").mkdir()
    answer = block(tmp_path / "block", planted_kernels(tmp_path / "old", gated_branch=""))
    assert "these kernels have no gated_branch" in answer["not_compared"]
    assert answer["times"] == {}


def test_kernels_from_elsewhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"trsp\.kernels\.\w+ was loaded from"):
        kernel_compare.refuse_other_kernels(tmp_path)


@pytest.mark.slow
def test_a_commit_is_run_in_four_blocks_and_its_worktree_goes() -> None:
    git = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, check=False
    )
    assert git.returncode == 0, "this test compares with HEAD and needs the git checkout"
    told: list[str] = []
    document = compare_with_commit("HEAD", ops=["gated_branch"], dry_run=True, progress=told.append)
    assert [line.rpartition(" ")[2] for line in told] == ["past", "present", "present", "past"]
    assert document["compared"] == []
    past, present = (document["blocks"][side][0] for side in ("past", "present"))
    assert past["kernels"] != present["kernels"] == str(ROOT / "kernels")
    assert past["num_cases"] == present["num_cases"] == 2
    assert not Path(past["kernels"]).exists()


def test_an_unknown_commit_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="no such commit"):
        compare_with_commit("no-such-commit", dry_run=True)


def test_the_harness_starts_without_torch() -> None:
    probe = "import sys, trsp.bench.kernel_compare; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
