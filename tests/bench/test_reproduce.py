"""From text to tables in one command, which goes on where it was stopped."""

import hashlib
import json
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from trsp.bench import compare_cells as compare_module
from trsp.bench import reproduce, train_base
from trsp.bench.compare_methods import DEFAULT_METHODS, parse_method
from trsp.bench.compare_record import read_compare_record
from trsp.bench.report_chapter import sized
from trsp.pruner.errors import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = """old green small quiet broken tall wet late plain grey lamp house captain morning
window river asked burned seen gone kept the a of in and nobody everyone never always"""
BASE = {
    "--device": "cpu",
    "--layers-of-base": "4",
    "--hidden-size": "64",
    "--vocab-size": "288",
    "--steps": "4",
    "--batch-size": "2",
    "--sequence-length": "16",
    "--window": "16",
    "--max-tokens": "96",
    "--seeds": "1",
}
SETTINGS = (
    "calibration.num_sequences=4", "selection.first_round_steps=1", "selection.round_steps=0",
    "selection.verification_sequences=2", "transfer.steps=2", "transfer.batch_size=1",
)  # fmt: skip


def prose(seed: int, num_words: int) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS.split()) for _ in range(num_words)) + ". "


def shorten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reproduce, "SELECTIONS", ("last", "block_influence"))
    patch.setattr(reproduce, "TRAINED", ("trsp+transfer", "trsp+distil"))
    patch.setattr(reproduce, "ABLATION", ("trsp+half_labels",))


@pytest.fixture(autouse=True)
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    paths = {name: folder / f"{name}.txt" for name in ("train", "near", "far")}
    paths["train"].write_text(prose(0, 900))
    paths["near"].write_text(prose(5, 200))
    paths["far"].write_text("0123 4567 89ab cdef; " * 40)
    return paths


def words(texts: dict[str, Path], out: Path, **changes: str | None) -> list[str]:
    """The command line; `hidden_size="128"` changes an option, None leaves it out."""
    options = BASE | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    line = ["--data", str(texts["train"]), "--out", str(out)]
    for name in ("near", "far"):
        line += ["--eval-data", f"{name}={texts[name]}"]
    for setting in SETTINGS:
        line += ["--set", setting]
    return line + [word for pair in options.items() if pair[1] is not None for word in pair]


def run(line: list[str]) -> Result:
    return CliRunner().invoke(reproduce.app, line)


def cells(out: Path, name: str) -> Any:
    return read_compare_record(out / name / "compare.json").cells


@pytest.fixture
def nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and choosing fail: what passes was there before."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(train_base, "train_checkpoint", refuse)
    monkeypatch.setattr(compare_module, "transfer", refuse)
    monkeypatch.setattr(compare_module, "Chooser", refuse)


@pytest.fixture(scope="module")
def done(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished run; read only."""
    out = tmp_path_factory.mktemp("done") / "runs" / "out"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return out, run(words(texts, out))


def test_one_command_goes_from_text_to_tables(done: tuple[Path, Result]) -> None:
    out, result = done
    assert result.exit_code == 0, result.output
    for name in ("selections", "trained", "ablation"):
        record = read_compare_record(out / name / "compare.json")
        assert record.complete
        assert record.seeds == (0,)
        assert str(out / name / "compare.json") in result.stdout
    assert [(cell.method, cell.num_removed) for cell in cells(out, "selections")] == [
        ("last", 1), ("block_influence", 1), ("last", 2), ("block_influence", 2),
    ]  # fmt: skip
    assert {cell.method for cell in cells(out, "trained")} == {"trsp+transfer", "trsp+distil"}
    tables = (out / "tables.md").read_text("utf-8")
    assert str(out / "tables.md") in result.stdout
    assert tables.count("| --- | ---: |") == 3 * (1 + 2 * 2)
    assert "### 2 of 4 layers gone (50.0%)\n" in tables
    last = next(cell for cell in cells(out, "selections") if cell.num_removed == 2)
    assert f"| {sized(last.quality['far'].perplexity)} |" in tables
    warnings = read_compare_record(out / "trained" / "compare.json").warnings
    assert len(warnings) == 1, "no text is known to a model of 4 steps"
    assert tables.count(f"- Warning: {warnings[0]}.\n") == 3
    record = json.loads((out / "base" / "train_record.json").read_text())
    assert f"to a loss of {record['final_loss']:.3f}" in tables


def test_the_passes_share_what_they_choose(done: tuple[Path, Result]) -> None:
    stored = (done[0] / "compare" / "done").glob("*.json")
    keys = [json.loads(path.read_text("utf-8"))["key"] for path in stored]
    chosen = [key["selection"] for key in keys if "selection" in key]
    assert sorted(chosen) == ["block_influence", "last", "trsp"]


def test_the_command_in_the_tables_is_the_one_that_was_run(
    done: tuple[Path, Result], nothing_new: None
) -> None:
    out, _ = done
    before = (out / "tables.md").read_text("utf-8")
    found = [cells(out, name) for name in ("selections", "trained", "ablation")]
    command = next(line for line in before.splitlines() if line.startswith("python -m"))
    again = run(shlex.split(command)[3:])
    assert again.exit_code == 0, again.output
    assert [cells(out, name) for name in ("selections", "trained", "ablation")] == found
    assert (out / "tables.md").read_text("utf-8") == before


def test_an_interrupted_run_goes_on(
    texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = compare_module.transfer, []

    def once(*arguments: Any, **keywords: Any) -> Any:
        asked.append(keywords["dropped"])
        if len(asked) == 2:
            raise RunError("the machine went away")
        return original(*arguments, **keywords)

    monkeypatch.setattr(compare_module, "transfer", once)
    out = tmp_path / "out"
    stopped = run(words(texts, out))
    assert stopped.exit_code == 1
    assert "went away" in stopped.stderr
    assert "## Without training the whole model" in (out / "tables.md").read_text("utf-8")
    assert not read_compare_record(out / "trained" / "compare.json").complete
    weights = (out / "base" / "model.safetensors").stat().st_mtime_ns
    again = run(words(texts, out))
    assert again.exit_code == 0, again.output
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == weights
    # Six trainings, and the second of them twice.
    assert len(asked) == 7
    assert read_compare_record(out / "ablation" / "compare.json").complete


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers_of_base": "5"}, "num_hidden_layers is 4 there and 5 here"),
        ({"hidden_size": "128"}, "hidden_size is 64 there and 128 here"),
        ({"steps": "5"}, "num_steps is 4 there and 5 here"),
        ({"steps": None, "minutes": "60"}, "minutes are 60 here"),
        ({"learning_rate": "1e-3"}, "learning_rate is 0.005 there and 0.001 here"),
        ({"window": "2048"}, "context is 1024 there and 2048 here"),
    ],
)
def test_another_base_model_in_the_folder_is_refused(
    done: tuple[Path, Result],
    texts: dict[str, Path],
    nothing_new: None,
    changes: dict[str, str | None],
    problem: str,
) -> None:
    for more in ([], ["--dry-run"]):
        result = run([*words(texts, done[0], **changes), *more])
        assert result.exit_code == 2
        assert problem in result.stderr
        assert "name another --out" in result.stderr


def test_another_text_of_the_same_name_is_another_base_model(
    texts: dict[str, Path], tmp_path: Path, done: tuple[Path, Result], nothing_new: None
) -> None:
    """By the hash in the record; an older record without one is known by the names alone."""
    folder = tmp_path / "other"
    folder.mkdir()
    moved = {**texts, "train": folder / "train.txt"}
    content = texts["train"].read_text()
    moved["train"].write_text(content)
    out = tmp_path / "out"
    shutil.copytree(done[0] / "base", out / "base")
    assert run([*words(moved, out), "--dry-run"]).exit_code == 0
    moved["train"].write_text(content.replace("captain", "sailors"))
    for more in ([], ["--dry-run"]):
        result = run([*words(moved, out), *more])
        assert result.exit_code == 2
        assert "train.txt has the sha256 " in result.stderr
        assert "name another --out" in result.stderr
    path = out / "base" / "train_record.json"
    record = json.loads(path.read_text("utf-8"))
    assert record.pop("text_sha256") == [hashlib.sha256(content.encode()).hexdigest()]
    path.write_text(json.dumps(record))
    assert run([*words(moved, out), "--dry-run"]).exit_code == 0


def test_a_training_by_the_clock_is_known_again() -> None:
    curve = [{"elapsed_s": 55.0}, {"elapsed_s": 61.0}]
    record: dict[str, Any] = {"loss_curve": curve, "wall_s": 61.0}
    assert reproduce._took(record, 1.0)
    assert not reproduce._took(record, 0.9)
    assert not reproduce._took(record, 1.1)
    assert reproduce._took({"loss_curve": curve[1:], "wall_s": 61.0}, 0.5)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    done: tuple[Path, Result], texts: dict[str, Path], tmp_path: Path, nothing_new: None
) -> None:
    out = tmp_path / "out"
    result = run([*words(texts, out, seeds="3"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert not out.exists()
    made = json.loads((done[0] / "base" / "train_record.json").read_text("utf-8"))
    assert f"({made['num_parameters']:,}): to train, 4 steps" in result.stdout
    assert "selections  12 cells: 2 methods, 3 seeds, 1, 2 layers gone" in result.stdout
    assert "ablation    6 cells: 1 methods, 3 seeds, 1, 2 layers gone" in result.stdout
    assert "is there" in run([*words(texts, done[0]), "--dry-run"]).stdout


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--set", "transfer.batch_size=0"), "transfer.batch_size"),
        (("--set", "selection.protected=[9]"), "names layer 9"),
        (("--set", "layers=2"), "--set layers=2 has no effect on a comparison: leave it out"),
        (("--set", "evaluation.window=32"), "no effect on a comparison: use --window"),
        (("--set", "transfer.enabled=false"), "transfer.enabled=false has no effect"),
        (("--eval-data", "far"), "NAME=PATH"),
        (("--eval-data", "more=absent.txt"), "absent.txt: does not exist"),
        (("--minutes", "3"), "as --minutes above 0, or as --steps"),
        (("--hidden-size", "100"), "no multiple of 64"),
        (("--device", "tpu"), "choose auto, cpu, cuda"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    texts: dict[str, Path], tmp_path: Path, nothing_new: None, more: tuple[str, ...], problem: str
) -> None:
    result = run([*words(texts, tmp_path / "out"), *more])
    assert result.exit_code == 2, result.output
    assert problem in result.stderr
    assert not (tmp_path / "out").exists()


def test_text_that_is_trained_on_is_not_held_out(texts: dict[str, Path], tmp_path: Path) -> None:
    result = run(words({**texts, "near": texts["train"]}, tmp_path / "out"))
    assert result.exit_code == 2
    assert "is calibration text too" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_base_model_is_left_alone(
    texts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    result = run(words(texts, tmp_path))
    assert result.exit_code == 2
    assert "holds no train_record.json" in result.stderr
    (tmp_path / "file").write_text("")
    assert "is a file" in run(words(texts, tmp_path / "file")).stderr


def test_the_lists_name_methods_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for names in (reproduce.SELECTIONS, reproduce.TRAINED, reproduce.ABLATION):
        methods = [parse_method(name) for name in names]
        assert len(set(methods)) == len(names)
    assert {parse_method(name).recovery for name in reproduce.SELECTIONS} == {
        None,
        "refit",
        "local",
    }
    assert all(parse_method(name).recovery for name in (*reproduce.TRAINED, *reproduce.ABLATION))
    alone = {name for name in DEFAULT_METHODS if parse_method(name).recovery is None}
    assert alone <= set(reproduce.SELECTIONS)
    assert "trsp+half_labels" in reproduce.ABLATION


@pytest.mark.parametrize(("device", "millions"), [("cpu", (10, 12)), ("cuda", (100, 350))])
def test_the_base_models_are_as_large_as_promised(device: str, millions: tuple[int, int]) -> None:
    profile = reproduce.PROFILES[device]
    plan = reproduce.Plan((), {}, Path(), device, profile, (0,))
    assert millions[0] < plan.num_parameters / 1e6 < millions[1]
    assert profile.layers_of_base >= {"cpu": 12, "cuda": 24}[device]


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from trsp.bench.reproduce import app; app(['--help'], standalone_mode=False);"
        "print(sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "[]"
    assert "--layers-of-base" in found.stdout
