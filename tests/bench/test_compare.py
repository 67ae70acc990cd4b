"""One protocol for all methods: cells are shared, budgets equal, weights restored, runs resumed."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from trsp.bench import compare_cells as compare_module
from trsp.bench.cli import app
from trsp.bench.compare import run_compare
from trsp.bench.compare_bench import CompareOptions
from trsp.bench.compare_methods import parse_method
from trsp.bench.compare_record import CompareRecord, read_compare_record, write_compare_record
from trsp.bench.compare_show import (
    cost_rows,
    quality_rows,
    task_columns,
    task_rows,
)
from trsp.bench.compare_summary import summarize
from trsp.bench.compare_tasks import accuracy
from trsp.pruner.calibration import build_calibration
from trsp.pruner.checkpoint import load_model, load_tokenizer, open_checkpoint
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import LayerMap
from trsp.pruner.recipe import Recipe
from trsp.pruner.run import base_model_of
from trsp.pruner.sampling import batch_indices
from trsp.pruner.text_checks import Overlap

RECORDS = Path(__file__).resolve().parents[2] / "bench" / "records"
SENTENCE = """old green small quiet broken tall wet late plain grey lamp house captain morning
window river asked burned seen gone kept the a of in and nobody everyone never always"""


def prose(seed: int, num_words: int = 700) -> str:
    """Words in an order of the seed's own: two seeds share no run of thirteen tokens."""
    chance, words = random.Random(seed), SENTENCE.split()
    return " ".join(chance.choice(words) for _ in range(num_words)) + ". "


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.txt" for name in ("train", "near", "far")}
    paths["train"].write_text(prose(0))
    paths["near"].write_text(prose(5, 300))
    paths["far"].write_text("0123 4567 89ab cdef; " * 60)
    return paths


def options(model: Path, texts: dict[str, Path], folder: Path, **changes: Any) -> CompareOptions:
    recipe = Recipe.model_validate(
        {
            "device": "cpu",
            "calibration": {
                "data": (str(texts["train"]),),
                "num_sequences": 8,
                "sequence_length": 16,
            },
            "selection": {"first_round_steps": 2, "round_steps": 1, "verification_sequences": 4},
            "transfer": {"steps": 6, "batch_size": 2},
        }
    )
    settings: dict[str, Any] = {
        "model": model,
        "recipe": recipe,
        "eval_data": {"near": [texts["near"]], "far": [texts["far"]]},
        "num_removed": (1, 2),
        "seeds": (0,),
        "methods": tuple(map(parse_method, ("gates", "trsp+transfer"))),
        "folder": folder,
        "window": 32,
    }
    return CompareOptions(**{**settings, **changes})


def last(records: Iterator[CompareRecord]) -> CompareRecord:
    return list(records)[-1]


def methods(*names: str) -> tuple[Any, ...]:
    return tuple(map(parse_method, names))


def test_every_method_gives_a_cell(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    names = (
        "random", "last", "block_influence", "angular", "sleb", "one_shot_loss", "taylor", "trsp",
        "joint_gates",
        "gates", "gates_unverified", "gates_one_shot", "paper_output_gates", "paper_residual_gates",
        "laco", "replace_me", "streamline", "trsp+refit", "paper_output_gates+penalty",
        "trsp+transfer", "sleb+distil",
    )  # fmt: skip
    asked = options(pico_llama, texts, tmp_path / "out", methods=methods(*names), num_removed=(2,))
    records = list(run_compare(asked))
    assert [record.complete for record in records] == [False] * (len(names) - 1) + [True]
    record = records[-1]
    for cell in record.cells:
        assert len(set(cell.removal_order)) == 2, cell.method
        assert cell.quality is not None
        assert set(cell.quality) == {"near", "far"}
        assert cell.total_flops > 0 or cell.method in ("random", "last")
        assert (cell.training is not None) == ("+" in cell.method)
    write_compare_record(tmp_path / "record.json", record)
    assert read_compare_record(tmp_path / "record.json") == record
    assert len(quality_rows(record, 2, "near")) == len(names) + 1
    transfer = next(cell for cell in record.cells if cell.method == "trsp+transfer")
    assert transfer.jump == 0.0
    assert transfer.training is not None
    assert transfer.training.tokens == 6 * 2 * 16


@pytest.mark.parametrize("name", ["random", "joint_gates"])
def test_chance_and_joint_gates_leave_protected_layers(
    name: str, pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    asked = options(pico_llama, texts, tmp_path, methods=methods(name), num_removed=(2,))
    selection = asked.recipe.selection.model_copy(update={"protected": (0, 1, 2, 5)})
    recipe = asked.recipe.model_copy(update={"selection": selection})
    (cell,) = last(run_compare(replace(asked, recipe=recipe))).cells
    assert set(cell.removal_order) == {3, 4}


def test_no_cell_leaves_a_trace_on_the_next(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    """A cell alone is the cell after others that change weights, bit for bit."""
    names = ("laco", "streamline", "replace_me", "trsp+finetune", "sleb")
    together = last(
        run_compare(options(pico_llama, texts, tmp_path / "all", methods=methods(*names)))
    )
    for name in ("sleb", "streamline"):
        alone = last(
            run_compare(options(pico_llama, texts, tmp_path / name, methods=methods(name)))
        )
        found = [cell.quality for cell in together.cells if cell.method == name]
        assert found == [cell.quality for cell in alone.cells]


def test_equal_operations_are_nearly_equal_and_not_more(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    names = ("trsp+transfer", "last+distil", "last+distil@flops")
    record = last(
        run_compare(options(pico_llama, texts, tmp_path / "out", methods=methods(*names)))
    )
    for count in (1, 2):
        reference, tokens, flops = (
            next(c for c in record.cells if (c.method, c.num_removed) == (name, count))
            for name in names
        )
        assert flops.training is not None
        assert tokens.training is not None
        a_step = (flops.training.flops - tokens.training.flops) / (
            flops.training.steps - tokens.training.steps
        )
        assert 0 <= reference.total_flops - flops.total_flops < a_step
        assert flops.training.steps > tokens.training.steps


def test_a_choice_that_costs_more_than_all_of_trsp_leaves_nothing_to_train_with(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    asked = options(pico_llama, texts, tmp_path / "out", methods=methods("sleb+distil@flops"))
    dear = {"verification_sequences": 8, "num_candidates": 1}
    cheap = {"steps": 1, "batch_size": 1}
    recipe = asked.recipe.model_copy(
        update={
            "selection": asked.recipe.selection.model_copy(update=dear),
            "transfer": asked.recipe.transfer.model_copy(update=cheap),
        }
    )
    asked = options(
        pico_llama,
        texts,
        tmp_path / "out",
        methods=methods("sleb+distil@flops"),
        num_removed=(2,),
        recipe=recipe,
    )
    record = last(run_compare(asked))
    (cell,) = record.cells
    assert cell.quality is None
    assert cell.note is not None
    assert "choosing alone takes" in cell.note
    assert summarize(record)[0].texts is None
    assert "-" in quality_rows(record, 2, "near")[1]


def test_what_is_done_is_not_done_again(
    pico_llama: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = options(pico_llama, texts, tmp_path / "out")
    first = last(run_compare(asked))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained or chosen again")

    monkeypatch.setattr(compare_module, "transfer", refuse)
    monkeypatch.setattr(compare_module, "Chooser", refuse)
    second = last(run_compare(asked))
    assert second.cells == first.cells
    changed = asked.recipe.model_copy(
        update={"transfer": asked.recipe.transfer.model_copy(update={"steps": 5})}
    )
    with pytest.raises(AssertionError, match="again"):
        last(run_compare(options(pico_llama, texts, tmp_path / "out", recipe=changed)))


def test_methods_that_agree_share_what_they_train(
    pico_llama: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    original = compare_module.transfer

    def counted(*arguments: Any, **words: Any) -> Any:
        calls.append(words["dropped"])
        return original(*arguments, **words)

    monkeypatch.setattr(compare_module, "transfer", counted)
    names = ("random+distil", "random+distil@flops", "trsp+transfer", "random+progressive")
    asked = options(pico_llama, texts, tmp_path / "out", methods=methods(*names), num_removed=(2,))
    last(run_compare(asked))
    assert len(calls) == 4
    last(run_compare(asked))
    assert len(calls) == 4


def test_seeds_give_intervals_and_the_reference_is_paired(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    asked = options(
        pico_llama,
        texts,
        tmp_path / "out",
        seeds=(0, 1),
        methods=methods("trsp+transfer", "last"),
    )
    record = last(run_compare(asked))
    rows = {(row.method, row.num_removed): row for row in summarize(record)}
    reference, other = rows["trsp+transfer", 1], rows["last", 1]
    assert reference.texts is not None
    assert other.texts is not None
    assert reference.texts["near"].to_reference is not None
    assert reference.texts["near"].to_reference.estimate == 1.0
    beside = other.texts["near"].to_reference
    assert beside is not None
    assert beside.low is not None
    ratio = other.texts["near"].perplexity / reference.texts["near"].perplexity
    assert beside.estimate == pytest.approx(ratio)
    assert other.num_choices == 1
    assert len(cost_rows(record, 1)) == 2
    assert record.calibrations["0"]["sha256"] != record.calibrations["1"]["sha256"]


@pytest.mark.parametrize("count", [0, 6])
def test_a_depth_that_is_no_pruning_is_refused(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path, count: int
) -> None:
    with pytest.raises(UserError, match="not pruning"):
        last(run_compare(options(pico_llama, texts, tmp_path / "out", num_removed=(count,))))


def command(model: Path, texts: dict[str, Path], out: Path, *more: str) -> Any:
    words = ["compare", str(model), "--out", str(out), "--data", str(texts["train"])]
    words += ["--eval-data", f"near={texts['near']}", "--window", "32", "--device", "cpu"]
    for setting in (
        "calibration.num_sequences=8",
        "calibration.sequence_length=16",
        "transfer.steps=2",
        "transfer.batch_size=2",
    ):
        words += ["--set", setting]
    return CliRunner().invoke(app, [*words, *more])


def test_the_command_shows_tables_and_leaves_a_record(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("--method", "last", "--method", "last+distil", "--ratio", "0.34", "--seed", "0")
    result = command(pico_llama, texts, out, *words)
    assert result.exit_code == 0, result.output
    assert "2 of 6 layers gone" in result.output
    assert "last layers + distil" in " ".join(result.output.split())
    record = read_compare_record(out / "compare.json")
    assert [cell.method for cell in record.cells] == ["last", "last+distil"]
    assert command(pico_llama, texts, out, *words).exit_code == 2
    again = command(pico_llama, texts, out, *words, "--resume")
    assert again.exit_code == 0
    assert read_compare_record(out / "compare.json").cells == record.cells


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--method", "slub"), "did you mean sleb"),
        (("--method", "laco+transfer"), "already folded into"),
        (("--method", "replace_me+refit"), "already folded into"),
        (("--task-limit", "0"), "--task-limit 0"),
        (("--method", "last", "--method", "last"), "twice"),
        (("--ratio", "0.3", "--layers", "2"), "choose one"),
        (("--ratio", "1.5"), "not within"),
        (("--ratio", "0.3", "--ratio", "0.34"), "same number of layers"),
        (("--eval-data", "far"), "NAME=PATH"),
        (("--set", "transfer.steps=-1"), "transfer.steps"),
        (("--set", "transfer.steps=0"), "no steps with closing"),
        (("--seed", "-1"), "--seed -1 is not within 0 and 2147483647"),
        (("--seed", str(2**31)), "--seed 2147483648 is not within"),
        (("--seed", "10000000000000000"), "is not within"),
        (("--seed", "1", "--seed", "0", "--seed", "1"), "--seed 1 is given twice"),
        (("--set", "layers=2"), "--set layers=2 has no effect on a comparison: use --layers or"),
        (("--layers", "2", "--set", "layers=3"), "--set layers=3 has no effect"),
        (("--set", "ratio=0.5"), "ratio=0.5 has no effect on a comparison: use --ratio or"),
        (("--set", "keep=[0, 5]"), "keep=[0,5] has no effect on a comparison: use --layers or"),
        (("--set", "seed=3"), "seed=3 has no effect on a comparison: use --seed"),
        (("--set", f"seed={2**31}"), "seed: Input should be less than"),
        (("--set", "evaluation.window=64"), "evaluation.window=64 has no effect on a comparison:"),
        (("--set", "evaluation={max_tokens: 64}"), "evaluation.max_tokens=64 has no effect"),
        (("--set", "evaluation.data=[a.txt]"), "[a.txt] has no effect on a comparison: use --eval"),
        (("--set", "evaluation.stride=16"), "evaluation.stride=16 has no effect"),
        (("--set", "evaluation.allow_overlap=true"), "allow_overlap=true has no effect"),
        (("--set", "transfer.enabled=false"), "transfer.enabled=false has no effect"),
        (("--set", "auto.max_transfers=2"), "auto={...} has no effect"),
        (("--set", "state_every_seconds=1"), "state_every_seconds=1.0 has no effect"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path, words: tuple[str, ...], problem: str
) -> None:
    result = command(pico_llama, texts, tmp_path / "out", *words)
    assert result.exit_code == 2
    assert problem in result.output
    assert not (tmp_path / "out" / "compare.json").exists()


@pytest.mark.parametrize(
    ("section", "option"),
    [
        ({"ratio": 0.5}, ("--layers", "2")),
        ({"keep": [0, 1, 2, 5]}, ("--ratio", "0.34")),
        ({"seed": 7}, ("--seed", "7")),
        ({"evaluation": {"window": 64}}, ("--window", "32")),
        ({"evaluation": {"max_tokens": 64}}, ("--max-tokens", "64")),
        ({"transfer": {"enabled": False}}, None),
        ({"evaluation": {"stride": 16}}, None),
        ({"auto": {"max_transfers": 2}}, None),
    ],
)
def test_what_a_recipe_carries_beside_a_comparisons_settings_is_never_passed_over(
    texts: dict[str, Path],
    tmp_path: Path,
    section: dict[str, Any],
    option: tuple[str, str] | None,
) -> None:
    """Refused where an option says it, but not with that option; told where none does."""
    recipe, absent = tmp_path / "recipe.yaml", tmp_path / "absent"
    recipe.write_text(json.dumps({"calibration": {"data": [str(texts["train"])]}, **section}))
    words = ["compare", str(absent), "--out", str(tmp_path / "out"), "--recipe", str(recipe)]
    (name, value), *_ = section.items()
    if isinstance(value, dict):
        name = f"{name}.{next(iter(value))}" if name != "auto" else name
    alone = CliRunner().invoke(app, words)
    assert alone.exit_code == 2
    assert f"the recipe's {name}=" in alone.stderr
    if option is None:
        assert alone.stderr.startswith("note: the recipe's")
        assert "absent" in alone.stderr.splitlines()[-1], "it went on to the model"
        return
    assert alone.stderr.startswith("error: the recipe's")
    assert option[0] in alone.stderr
    both = CliRunner().invoke(app, [*words, *option])
    assert "the recipe's" not in both.stderr
    assert "absent" in both.stderr


def test_a_recipes_calibration_text_is_used_where_no_data_is_given(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    calibration = {"data": [str(texts["train"])], "num_sequences": 8, "sequence_length": 16}
    recipe.write_text(json.dumps({"device": "cpu", "calibration": calibration}))
    words = ["compare", str(pico_llama), "--out", str(tmp_path / "out"), "--recipe", str(recipe)]
    words += ["--eval-data", f"near={texts['near']}", "--window", "32", "--method", "last"]
    result = CliRunner().invoke(app, [*words, "--layers", "1", "--seed", str(2**31 - 1)])
    assert result.exit_code == 0, result.output
    record = read_compare_record(tmp_path / "out" / "compare.json")
    assert record.calibrations[str(2**31 - 1)]["source"] == [str(texts["train"])]


def test_the_largest_seed_orders_the_batches() -> None:
    wanted = {"num_sequences": 4, "batch_size": 4, "seed": 2**31 - 1}
    assert sorted(batch_indices(10**6, **wanted)) == [0, 1, 2, 3]


def densely(asked: CompareOptions) -> CompareOptions:
    """With nearly all of the text in the calibration sequences."""
    calibration = asked.recipe.calibration.model_copy(
        update={"num_sequences": 28, "sequence_length": 64}
    )
    return replace(asked, recipe=asked.recipe.model_copy(update={"calibration": calibration}))


@pytest.mark.parametrize(("num_words", "outcome"), [(0, "apart"), (20, "warned"), (250, "refused")])
def test_a_paragraph_in_common_is_kept_in_the_record_and_warned_of(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path, num_words: int, outcome: str
) -> None:
    shared = " ".join(prose(0).split()[200 : 200 + num_words])
    chance = random.Random(1)
    own = [" ".join("".join(chance.choices("etaoinshrdlu", k=5)) for _ in range(200)) for _ in "ab"]
    texts["near"].write_text(f"{own[0]} {shared} {own[1]}")
    asked = options(
        pico_llama, texts, tmp_path / "out", methods=methods("last"), seeds=(0, 1), num_removed=(1,)
    )
    if outcome == "refused":
        with pytest.raises(UserError, match="of the text near stand in the calibration text"):
            last(run_compare(densely(asked)))
        return
    record = last(run_compare(densely(asked)))
    assert record.fitness is not None
    assert set(record.fitness.overlaps) == {"near", "far"}
    assert set(record.fitness.overlaps["near"]) == {"0", "1"}
    shares = [found.share for found in record.fitness.overlaps["near"].values()]
    said = [line for line in record.warnings if "stand in the calibration text" in line]
    if outcome == "apart":
        assert max(shares) < 0.01
        assert said == []
    else:
        assert 0.01 < max(shares) < 0.1
        (warning,) = said
        assert warning.startswith(f"{max(shares):.1%} of the 13-token runs of the text near stand")
    write_compare_record(tmp_path / "record.json", record)
    assert read_compare_record(tmp_path / "record.json") == record


@pytest.mark.parametrize("digits_in", ["nothing", "far", "train"])
def test_text_of_another_kind_is_warned_of(
    pico_llama: Path,
    text_file: Path,
    held_out_file: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    digits_in: str,
) -> None:
    chance = random.Random(0)
    digits = tmp_path / "digits.txt"
    digits.write_text("".join(chance.choice("0123456789abcdef") for _ in range(4000)))
    texts = {"train": text_file, "near": held_out_file, "far": held_out_file}
    if digits_in != "nothing":
        texts[digits_in] = digits
    out = tmp_path / "out"
    words = ("--method", "last", "--layers", "1", "--seed", "0", "--json")
    result = command(pico_llama, texts, out, *words, "--eval-data", f"far={texts['far']}")
    assert result.exit_code == 0, result.stderr
    record = read_compare_record(out / "compare.json")
    assert json.loads(result.stdout)["fitness"]["warnings"] == list(record.warnings)
    for warning in record.warnings:
        assert f"warning: {warning}" in result.stderr
    beginnings = [warning.split(":")[0] for warning in record.warnings]
    if digits_in == "nothing":
        assert beginnings == []
        assert "warning" not in result.stderr
    elif digits_in == "far":
        assert beginnings == ["calibration and held-out text far are of different kinds"]
    else:
        assert "hardly knows such text" in record.warnings[0]
        assert beginnings[1:] == [
            f"calibration and held-out text {name} are of different kinds"
            for name in ("near", "far")
        ]
    assert record.fitness is not None
    bits = record.fitness.calibration_bits
    assert bits is not None
    assert (bits > 2.5) == (digits_in == "train")


def test_text_that_the_model_wrote_is_not_refused_and_not_called_unknown(
    pico_llama: Path, held_out_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is the held-out text word by word, that is said."""
    texts = {"train": Path("self"), "near": held_out_file, "far": held_out_file}
    asked = options(pico_llama, texts, tmp_path / "out", methods=methods("last"), num_removed=(1,))
    record = last(run_compare(asked))
    assert not any("hardly knows" in warning for warning in record.warnings)
    whole = Overlap(13, 100, 0.5, 0.9, 50, 0)
    monkeypatch.setattr("trsp.bench.compare_texts.overlap", lambda *_: whole)
    record = last(run_compare(asked))
    assert record.fitness is not None
    assert record.fitness.overlaps["near"]["0"] == whole
    assert record.warnings[0].startswith("50.0% of the 13-token runs of the text near")


def test_records_of_before_the_texts_were_judged_are_read() -> None:
    records = sorted(RECORDS.glob("compare-*.json"))
    assert len(records) >= 5
    for path in records:
        assert read_compare_record(path).cells


def test_a_refit_that_could_not_be_is_said(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trsp.pruner.refit.last_projection", lambda *_: None)
    asked = options(
        pico_llama, texts, tmp_path / "out", methods=methods("last+refit"), num_removed=(2,)
    )
    (cell,) = last(run_compare(asked)).cells
    assert cell.note is not None
    assert "nothing takes over the work of layers 4 to 5 before the training: layer 3's MLP" in (
        cell.note
    )


def test_methods_are_listed_without_a_model() -> None:
    result = CliRunner().invoke(app, ["compare", "--list"])
    assert result.exit_code == 0
    assert "sleb" in result.output
    assert "progressive" in result.output


def test_training_behind_a_fold_starts_from_it_and_learns_from_the_dense_model(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to no learning rate it is the fold; its teacher is the model before the fold."""
    taught: list[torch.Tensor] = []
    original = compare_module.transfer

    def watched(*arguments: Any, **words: Any) -> Any:
        taught.append(words["teacher"].logits([0, 1]))
        return original(*arguments, **words)

    monkeypatch.setattr(compare_module, "transfer", watched)
    asked = options(
        pico_llama,
        texts,
        tmp_path / "out",
        methods=methods("replace_me", "last", "replace_me+distil"),
        num_removed=(2,),
    )
    still = asked.recipe.transfer.model_copy(update={"learning_rate": 1e-12, "weight_decay": 0.0})
    recipe = asked.recipe.model_copy(update={"transfer": still})
    record = last(run_compare(replace(asked, recipe=recipe)))
    fold, plain, trained = record.cells
    assert fold.quality is not None
    assert plain.quality is not None
    assert trained.quality is not None
    for text, quality in fold.quality.items():
        assert trained.quality[text].loss == pytest.approx(quality.loss, abs=1e-6)
        assert abs(plain.quality[text].loss - quality.loss) > 1e-4
    assert trained.training is not None
    assert trained.selection == fold.selection
    model = load_model(open_checkpoint(pico_llama), dtype=torch.float32, device="cpu")
    calibration = build_calibration(
        recipe.calibration.data,
        load_tokenizer(open_checkpoint(pico_llama)),
        num_sequences=8,
        sequence_length=16,
        seed=0,
    )
    with torch.no_grad():
        dense = model(input_ids=calibration.input_ids[:2], use_cache=False).logits
    assert torch.allclose(taught[0], dense, atol=1e-4)


def test_a_method_that_the_model_does_not_allow_leaves_the_others(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trsp.bench.baseline_merge.last_projection", lambda *_: None)
    names = ("replace_me", "replace_me+distil@flops", "last")
    asked = options(pico_llama, texts, tmp_path / "out", methods=methods(*names), num_removed=(2,))
    fold, trained, plain = last(run_compare(asked)).cells
    for cell in (fold, trained):
        assert cell.quality is None
        assert cell.removal_order == ()
        assert cell.note is not None
        assert "cannot be folded" in " ".join(cell.note.split())
    assert plain.quality is not None


def choice_file(folder: Path) -> Path:
    path = folder / "words.jsonl"
    words = SENTENCE.split()
    lines = [
        {"context": f"the {a} {b}", "choices": [c, f"{c} {a}", d], "label": place % 3}
        for place, (a, b, c, d) in enumerate(
            zip(words, words[3:], words[5:], words[7:], strict=False)
        )
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tasks_are_scored_as_the_finished_checkpoint_would_score(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'trsp[eval]'")
    from trsp.bench.zero_shot import zero_shot
    from trsp.pruner.api import compact

    task = choice_file(tmp_path)
    asked = options(
        pico_llama,
        texts,
        tmp_path / "out",
        methods=methods("last", "replace_me", "last+distil"),
        num_removed=(2,),
        tasks=(str(task),),
        task_limit=12,
    )
    record = last(run_compare(asked))
    cell, *others = record.cells
    layer_map = LayerMap.from_removal_order(
        base_model_of(open_checkpoint(pico_llama)), cell.removal_order, method={"name": "last"}
    )
    compact(pico_llama, layer_map, tmp_path / "pruned")
    checkpoint = open_checkpoint(tmp_path / "pruned")
    alone = zero_shot(
        load_model(checkpoint, dtype=torch.float32, device="cpu"),
        load_tokenizer(checkpoint),
        [],
        task_files=[task],
        limit=12,
        batch_size=asked.batch_size,
    )
    assert cell.tasks == alone
    assert alone["words.jsonl"].num_samples == 12
    assert all(set(other.tasks) == {"words.jsonl"} for other in others)
    assert record.dense.tasks["words.jsonl"] != alone["words.jsonl"]
    assert task_columns(record) == ("words.jsonl, acc_norm", "mean")
    dense, row, *_ = task_rows(record, 2)
    assert dense[0] == "dense"
    assert row[1].startswith(f"{accuracy(alone['words.jsonl']).value:.1%} ± ")
    assert row[2] == row[1].partition(" ")[0]
    again = read_compare_record(write_and_name(tmp_path, record))
    assert again.cells == record.cells


def write_and_name(folder: Path, record: CompareRecord) -> Path:
    write_compare_record(folder / "again.json", record)
    return folder / "again.json"


def test_a_task_with_written_answers_is_refused(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'trsp[eval]'")
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": "old green", "answer": "small"}) + "\n")
    with pytest.raises(UserError, match="scores choices"):
        last(run_compare(options(pico_llama, texts, tmp_path / "out", tasks=(str(path),))))


def test_held_out_text_that_was_trained_on_is_refused(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    same = {**texts, "near": texts["train"]}
    with pytest.raises(UserError, match="--eval-data"):
        last(run_compare(options(pico_llama, same, tmp_path / "out")))
    texts["near"].write_text(texts["train"].read_text() + "And so it went on.")
    with pytest.raises(UserError, match="the text near"):
        last(run_compare(options(pico_llama, texts, tmp_path / "out")))


def test_chance_does_not_take_what_no_other_choice_may(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    asked = options(
        pico_llama, texts, tmp_path / "out", methods=methods("random"), num_removed=(2,),
        seeds=tuple(range(12)),
    )  # fmt: skip
    taken = {layer for cell in last(run_compare(asked)).cells for layer in cell.removal_order}
    assert asked.recipe.selection.protected == (0,)
    assert taken == {1, 2, 3, 4, 5}


def test_merges_are_tried_on_the_sequences_that_masked_loss_is_taken_on(
    pico_llama: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    """LaCo runs the model once for each merge it tries: its cost goes with the sequences."""
    flops = {}
    for number in (2, 4):
        asked = options(pico_llama, texts, tmp_path / str(number), methods=methods("laco"))
        selection = asked.recipe.selection.model_copy(update={"verification_sequences": number})
        asked = replace(asked, recipe=asked.recipe.model_copy(update={"selection": selection}))
        flops[number] = last(run_compare(asked)).cells[0].selection.flops
    assert 1.8 < flops[4] / flops[2] <= 2
