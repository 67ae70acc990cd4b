"""Two versions of the kernels, one harness, one session; or a run against an older record.

`compare_with_commit` times both in processes of their own, in blocks A B B A. In each the folder
`kernels` of one version stands beside the present bench, pruner and serving. A case that cannot be
compared is named and is never a pass.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trsp.pruner.errors import RunError, UserError

if TYPE_CHECKING:
    from trsp.bench.kernel_plan import Item

MIN_LIMIT = 0.05
NOISE_FACTOR = 3.0
# Beyond it a comparison could not have seen what it is for.
MAX_LIMIT = 0.25
DRY_RUN = "dry run: not a comparison"
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("bench", "pruner", "serving")
_DIRECTIONS = ("forward", "backward", "both")

Verdict = Literal["ok", "SLOWER", "TOO NOISY", "not compared"]
# Median microseconds by case and direction, as "case forward".
Times = Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """One case in one direction: `ratio` is present over past time, above 1 + `limit` is slower."""

    name: str
    verdict: Verdict
    ratio: float | None = None
    noise: float | None = None
    limit: float | None = None
    reason: str = ""


def compare_blocks(past: Sequence[Times], present: Sequence[Times]) -> list[Comparison]:
    """Pooled medians of blocks of both sides; noise is the spread within a side, the larger one."""
    names = dict.fromkeys(name for block in (*past, *present) for name in block)
    compared = []
    for name in names:
        old = [block[name] for block in past if name in block]
        new = [block[name] for block in present if name in block]
        if len(old) < len(past) or len(new) < len(present) or not old or not new:
            lacking = "the past" if len(old) < len(past) or not old else "the present"
            compared.append(Comparison(name, "not compared", reason=f"{lacking} has no time of it"))
            continue
        noise = max((max(side) - min(side)) / min(side) for side in (old, new))
        compared.append(_decide(name, statistics.median(new) / statistics.median(old), noise))
    return compared


def compare_records(past: dict[str, Any], present: dict[str, Any]) -> list[Comparison]:
    """Fused times of two records, by case; noise is half of the wider p20 to p80, of its median."""
    olds, news = _timings(past), _timings(present)
    compared = []
    for name in dict.fromkeys([*olds, *news]):
        if name not in olds or name not in news:
            lacking = "the record" if name not in olds else "this run"
            compared.append(Comparison(name, "not compared", reason=f"{lacking} has no time of it"))
            continue
        old, new = olds[name], news[name]
        noise = max((t["p80_us"] - t["p20_us"]) / (2 * t["median_us"]) for t in (old, new))
        compared.append(_decide(name, new["median_us"] / old["median_us"], noise))
    return compared


def incomparable(past: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """What differs between two records' machines; both as `identity` gives it."""
    return [
        f"{what} is {present[what]!r} here and {past[what]!r} in the record"
        for what in past
        if past[what] != present[what] or past[what] is None
    ]


def identity(record: dict[str, Any]) -> dict[str, Any]:
    """What must agree before two times may be compared."""
    environment = record["environment"]
    versions = environment.get("versions", {})
    return {
        "gpu": (environment.get("gpu") or {}).get("name"),
        "torch": versions.get("torch"),
        "triton": versions.get("triton"),
    }


def run_comparison(
    against: str,
    *,
    ops: Sequence[str] | None = None,
    dtype: str | None = None,
    minutes: float | None = None,
    dry_run: bool = False,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare with a record (a path that ends in .json) or a commit; written to `out` if given.

    Raises:
        UserError: what is asked for does not exist, or cannot be measured here.
    """
    from trsp.bench.kernel_plan import check_selection
    from trsp.bench.kernel_run import DEFAULT_MINUTES, refuse_as_record
    from trsp.bench.record import write_record

    check_selection(ops=ops, dtype=dtype, minutes=minutes)
    if dry_run:
        refuse_as_record(out)
    if Path(against).suffix == ".json":
        document = compare_with_record(
            Path(against), minutes=minutes or DEFAULT_MINUTES, dry_run=dry_run, progress=progress
        )
    else:
        document = compare_with_commit(
            against, ops=ops, dtype=dtype, dry_run=dry_run, progress=progress
        )
    if out is not None:
        write_record(out, document)
    return document


def compare_with_record(
    path: Path,
    *,
    minutes: float,
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time the record's own cases here and compare; a record from elsewhere is not comparable.

    Raises:
        UserError: the file is no record of this benchmark, or there is no CUDA device.
    """
    past, items = _read_record(path)
    from trsp.bench.kernel_run import require_fused_kernels
    from trsp.bench.kernel_speed import failures, measure
    from trsp.bench.record import environment

    if not dry_run:
        require_fused_kernels()
    differing = incomparable(identity(past), identity({"environment": environment()}))
    if past.get("dry_run") is not False:
        differing.append("the record is of a dry run")
    document = _document(f"record {path}", dry_run)
    # A dry run has no times: it ends where a comparison would begin.
    if differing or dry_run:
        document["failed"] = [f"not comparable: {reason}" for reason in differing]
        return document
    results, left = measure(items, device="cuda", seconds=60 * minutes, progress=progress)
    compared = compare_records(past, {"results": results})
    return _finish(document, compared, failures(results) + [f"left out: {i.name}" for i in left])


def compare_with_commit(
    commit: str,
    *,
    ops: Sequence[str] | None = None,
    dtype: str | None = None,
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time the fused ops of `commit` and of the working tree in blocks A B B A.

    Raises:
        UserError: there is no CUDA device, no git, or no such commit. RunError: a block failed.
    """
    from trsp.bench.kernel_plan import plan_comparison
    from trsp.bench.kernel_run import require_fused_kernels

    if not dry_run:
        require_fused_kernels()
    items = plan_comparison(ops=ops, dtype=dtype, dry_run=dry_run)
    with _kernels_of(commit) as (full_commit, past_kernels):
        document = _document(f"commit {full_commit}", dry_run)
        sides = {"past": past_kernels, "present": _ROOT / "kernels"}
        blocks: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for turn, side in enumerate(("past", "present", "present", "past")):
            progress(f"block {turn + 1}/4: {side}")
            with tempfile.TemporaryDirectory(prefix="trsp-block-") as folder:
                present = [item.to_document() for item in items]
                blocks[side].append(_run_block(Path(folder), sides[side], present, dry_run))
    document["blocks"] = blocks
    times = {side: [block["times"] for block in ran] for side, ran in blocks.items()}
    problems = [
        f"{side}: {line}" for side, ran in blocks.items() for line in ran[0]["not_compared"]
    ]
    if dry_run:
        document["failed"] = [f"not compared: {line}" for line in problems]
        return document
    return _finish(document, compare_blocks(times["past"], times["present"]), problems)


def show_comparison(document: dict[str, Any], *, as_json: bool) -> None:
    """Print the comparison as JSON, or its table."""
    if as_json:
        print(json.dumps(document, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    table = Table("case", "present / past", "noise", "limit", "result")
    for row in document["compared"]:
        figures = [
            "" if row[name] is None else f"{row[name]:.3f}" for name in ("ratio", "noise", "limit")
        ]
        table.add_row(row["name"], *figures, f"{row['verdict']} {row['reason']}".strip())
    if document["compared"]:
        console.print(table)
    for side, ran in document.get("blocks", {}).items():
        console.print(f"{side}: {ran[0]['num_cases']} cases, {ran[0]['kernels']}")
    for line in document["failed"]:
        console.print(f"FAILED: {line}")
    if document["dry_run"]:
        console.print(DRY_RUN)


def _decide(name: str, ratio: float, noise: float) -> Comparison:
    limit = max(MIN_LIMIT, NOISE_FACTOR * noise)
    if limit > MAX_LIMIT and ratio <= 1 + limit:
        reason = f"noise of {noise:.0%} hides anything below {limit:.0%}"
        return Comparison(name, "TOO NOISY", ratio, noise, limit, reason)
    return Comparison(name, "SLOWER" if ratio > 1 + limit else "ok", ratio, noise, limit)


def _document(against: str, dry_run: bool) -> dict[str, Any]:
    document: dict[str, Any] = {"benchmark": "kernels-compare", "against": against}
    return {**document, "dry_run": dry_run, "compared": [], "failed": []}


def _finish(
    document: dict[str, Any], compared: Sequence[Comparison], problems: Sequence[str]
) -> dict[str, Any]:
    document["compared"] = [asdict(row) for row in compared]
    document["failed"] = [f"not compared: {line}" for line in problems]
    document["failed"] += [
        f"{row.name}: {row.verdict} {row.reason}".strip() for row in compared if row.verdict != "ok"
    ]
    if not compared:
        document["failed"].append("nothing was compared")
    return document


def _timings(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        f"{result['name']} {direction}": result["arms"]["fused"][direction]
        for result in record["results"]
        for direction in _DIRECTIONS
        if direction in result["arms"].get("fused", {})
    }


def _read_record(path: Path) -> tuple[dict[str, Any], list["Item"]]:
    """The record, and the fused op alone of every case that it has times of."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a record: {error}") from error
    if not isinstance(record, dict) or record.get("benchmark") != "kernels":
        raise UserError(f"{path}: is no record of `trsp bench kernels`")
    if record.get("schema_version") != 1:
        raise UserError(f"{path}: schema_version is {record.get('schema_version')!r}, expected 1")
    from trsp.bench.kernel_cases import KernelCase
    from trsp.bench.kernel_plan import Item

    try:
        # All that a comparison reads is read here once, before minutes of measuring.
        identity(record)
        compare_records(record, record)
        return record, [
            Item(KernelCase(**result["case"]), result["tokens"], ("fused",))
            for result in record["results"]
            if "forward" in result["arms"].get("fused", {})
        ]
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: is no whole record of `trsp bench kernels`: {error!r}") from error


@contextmanager
def _kernels_of(commit: str) -> Iterator[tuple[str, Path]]:
    """The commit's full name, and its kernels/ in a worktree that goes with the block."""
    full = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="trsp-commit-") as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", "--quiet", str(tree), full)
        try:
            yield full, tree / "kernels"
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except OSError as error:
        raise UserError(f"--compare COMMIT needs git: {error}; or give a record's path") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip() or "no such commit here"
        raise UserError(f"git {' '.join(arguments)}: {said}") from error
    return done.stdout.strip()


def _run_block(
    folder: Path, kernels: Path, items: list[dict[str, Any]], dry_run: bool
) -> dict[str, Any]:
    """One process that finds `kernels` as trsp.kernels and the rest of trsp as it is now."""
    package = folder / "overlay" / "trsp"
    package.mkdir(parents=True)
    # A regular package: a namespace would be merged with the installed trsp, and a module that
    # the commit lacks would be found there.
    (package / "__init__.py").touch()
    (package / "kernels").symlink_to(kernels, target_is_directory=True)
    for name in _PACKAGES:
        (package / name).symlink_to(_ROOT / name, target_is_directory=True)
    asked, answered = folder / "asked.json", folder / "answered.json"
    asked.write_text(json.dumps({"items": items, "dry_run": dry_run, "kernels": str(kernels)}))
    done = subprocess.run(
        [sys.executable, "-m", "trsp.bench.kernel_compare", str(asked), str(answered)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not answered.is_file():
        raise RunError(f"a block of the comparison failed: {done.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(answered.read_text())
    return answer


def _time_block(asked: dict[str, Any]) -> dict[str, Any]:
    """In the block's process: medians of every case that these kernels have."""
    # An editable install answers for modules that the overlay lacks: the present ones.
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if not getattr(finder, "__module__", "").startswith("__editable___trsp")
    ]
    answer: dict[str, Any] = {"kernels": asked["kernels"], "times": {}, "not_compared": []}
    items, lacking = [], set()
    for document in asked["items"]:
        op = document["case"]["op"]
        if importlib.util.find_spec(f"trsp.kernels.{op}") is None:
            lacking.add(f"these kernels have no {op}")
        else:
            items.append(document)
    answer["not_compared"] = sorted(lacking)
    answer["num_cases"] = 0
    try:
        from trsp.bench.kernel_plan import Item
        from trsp.bench.kernel_speed import failures, measure
    except ImportError as error:
        answer["not_compared"].append(f"the harness does not import with these kernels: {error}")
        return answer
    device = "cpu" if asked["dry_run"] else "cuda"
    results, _ = measure([Item.from_document(document) for document in items], device=device)
    refuse_other_kernels(Path(asked["kernels"]))
    answer["not_compared"] += failures(results)
    answer["num_cases"] = len(results)
    answer["times"] = {
        name: timing["median_us"] for name, timing in _timings({"results": results}).items()
    }
    return answer


def refuse_other_kernels(kernels: Path) -> None:
    """Check that every module of trsp.kernels in this process was loaded from `kernels`.

    Raises:
        RunError: names one that was not.
    """
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.startswith("trsp.kernels.") and file is not None:
            found = Path(file).resolve()
            if not found.is_relative_to(kernels.resolve()):
                raise RunError(f"{name} was loaded from {found}, expected {kernels}")


if __name__ == "__main__":
    question, reply = (Path(argument) for argument in sys.argv[1:3])
    reply.write_text(json.dumps(_time_block(json.loads(question.read_text()))))
