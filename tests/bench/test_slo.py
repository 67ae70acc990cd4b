"""Layers for a speed target: against a machine whose cost is known exactly."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trsp.bench import slo
from trsp.bench.cli import app
from trsp.bench.model_shapes import write_shape
from trsp.bench.serve_design import ServeOptions
from trsp.bench.serve_record import Arm, Cell, Load, ServeRecord, Workload, write_serve_record
from trsp.bench.slo import plan_for_slo
from trsp.bench.slo_answer import SloPlan
from trsp.bench.slo_target import Target, parse_target
from trsp.pruner.errors import UserError

LAYERS = 8
# Of the shape "pico" in float32.
PARAMETERS = 4_229_248
KV_BYTES = 8192
NOISE = (0.99, 1.01, 1.0)


def arm(name: str, layers: int, role: Any) -> Arm:
    return Arm(
        name=name,
        role=role,
        model="pico",
        num_hidden_layers=layers,
        weights="dummy",
        fingerprint=None,
        disk_bytes=None,
        num_parameters=PARAMETERS,
        weight_bytes=4 * PARAMETERS,
        kv_bytes_per_token=KV_BYTES,
        quality=[],
    )


def cell(name: str, block: int, position: int, load: str, tpot_ms: float) -> Cell:
    return Cell(
        block=block,
        position=position,
        memory="equal-kv",
        arm=name,
        load=load,
        started_at="2026-01-01",
        completed=1,
        failed=0,
        total_input_tokens=1,
        total_output_tokens=1,
        metrics={"median_tpot_ms": tpot_ms, "output_throughput": 1000 / tpot_ms},
        prompts_sha256=None,
        client_cpu_share=None,
        prefix_cache_hits=None,
        num_preemptions=None,
        notes=[],
        invalid=[],
    )


def measured(
    depths: list[int], cost: Callable[[int], float], *, load: str = "closed 1"
) -> ServeRecord:
    """A record of these depths, the first of them dense, on a machine with a known cost."""
    names = {"dense": depths[0], "dense again": depths[0]}
    names |= {f"minus-{depths[0] - n}": n for n in depths[1:]}
    roles = {"dense": "dense", "dense again": "control"}
    cells = [
        cell(name, block, position, load, noise * cost(layers))
        for block, noise in enumerate(NOISE)
        for name, layers in names.items()
        for position in (0, 1)
    ]
    return ServeRecord(
        backend="serve",
        engine="vllm 0",
        label=None,
        partial=False,
        num_blocks=len(NOISE),
        confidence=0.95,
        arms=[arm(name, n, roles.get(name, "pruned")) for name, n in names.items()],
        loads=[Load(name=load, kind="closed", concurrency=1, num_requests=1)],
        workload=Workload(
            input_len=1, output_len=2, dtype="float32", seed=0, ttft_slo_ms=1.0, tpot_slo_ms=1.0
        ),
        memories=["equal-kv"],
        starts=[],
        cells=cells,
        ratios=[],
        invalid=[],
        explained=[],
        not_measured=[],
        commands=[],
        hashes={},
        environment={},
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_shape("pico", tmp_path / "model")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Measures 2 ms + 1 ms a layer; the numbers of removals it was asked for, in order."""
    asked: list[tuple[int, ...]] = []

    def run(options: ServeOptions, *, tell: Callable[[str], None]) -> ServeRecord:
        asked.append(options.remove)
        assert options.load_format == "dummy"
        assert options.concurrencies == (1,)
        return measured([LAYERS, *(LAYERS - n for n in options.remove)], lambda n: 2.0 + n)

    monkeypatch.setattr(slo, "run_serve", run)
    return asked


def planned(model: Path, target: str, tmp_path: Path, **words: Any) -> SloPlan:
    given: dict[str, Any] = {"records": (), "verify": True, "concurrency": 1, **words}
    blocks = given.pop("num_blocks", 5)
    return plan_for_slo(
        model,
        parse_target(target),
        options=ServeOptions(out=tmp_path / "work", num_blocks=blocks),
        tell=lambda line: None,
        **given,
    )


@pytest.mark.parametrize("target", ["median_tpot_ms<=7.2", "output_throughput>=139"])
def test_the_line_names_the_depth_and_the_depth_is_measured(
    model: Path, machine: list[tuple[int, ...]], tmp_path: Path, target: str
) -> None:
    plan = planned(model, target, tmp_path)
    # 2 + 5 = 7 ms meets 7.2 ms, 6 layers would be 8 ms.
    assert machine == [(2, 4), (3,)]
    assert plan.num_to_remove == 3
    assert plan.verified is True
    assert plan.slope == pytest.approx(1.0 if "ms" in target else 1e-3)
    assert plan.intercept == pytest.approx(2.0 if "ms" in target else 2e-3)
    assert f"remove {plan.num_to_remove} layers, measured, met" in plan.lines()[-1]


def test_a_depth_that_misses_when_measured_is_not_given_as_the_answer(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Measured alone, five layers cost 9 ms instead of the 7 ms that the line says."""
    asked: list[tuple[int, ...]] = []

    def run(options: ServeOptions, *, tell: Callable[[str], None]) -> ServeRecord:
        asked.append(options.remove)
        bump = {5: 2.0}
        depths = [LAYERS, *(LAYERS - n for n in options.remove)]
        return measured(depths, lambda n: 2.0 + n + bump.get(n, 0.0))

    monkeypatch.setattr(slo, "run_serve", run)
    plan = planned(model, "median_tpot_ms<=7.5", tmp_path)
    assert asked == [(2, 4), (3,)]
    assert plan.num_to_remove == 4
    assert plan.verified is True
    assert any("5 layers were named" in remark for remark in plan.remarks)


def test_a_target_beyond_reach_gets_the_best_and_a_clear_no(
    model: Path, machine: list[tuple[int, ...]], tmp_path: Path
) -> None:
    plan = planned(model, "median_tpot_ms<=2.5", tmp_path)
    assert plan.num_to_remove is None
    assert plan.verified is None
    assert plan.best.num_hidden_layers == 1
    assert plan.best.predicted == pytest.approx(3.0)
    assert plan.lines()[-1] == "NO: no number of layers meets median_tpot_ms<=2.5"
    assert any("the best possible, 1 of 8 layers, would be at median_tpot_ms 3" in remark
               for remark in plan.remarks)  # fmt: skip


def test_a_target_that_is_met_already_takes_no_layer(
    model: Path, machine: list[tuple[int, ...]], tmp_path: Path
) -> None:
    plan = planned(model, "median_tpot_ms<=20", tmp_path)
    assert plan.num_to_remove == 0
    assert "nothing has to go" in plan.lines()[-1]
    assert machine == [(2, 4)]


def test_more_than_half_of_the_layers_comes_with_a_warning(
    model: Path, machine: list[tuple[int, ...]], tmp_path: Path
) -> None:
    plan = planned(model, "median_tpot_ms<=5.2", tmp_path)
    assert plan.num_to_remove is not None
    assert plan.num_to_remove > LAYERS / 2
    assert any("more than half" in remark for remark in plan.remarks)


def test_records_are_used_instead_of_measuring(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_serve_record(path, measured([8, 6, 4], lambda n: 2.0 + n))
    plan = planned(model, "median_tpot_ms<=6.5", tmp_path, records=[path], verify=False)
    assert plan.num_to_remove == 4
    assert plan.verified is None
    assert plan.records == [str(path)]
    assert plan.relative_residual == pytest.approx(0.0, abs=1e-9)


def test_a_cost_that_is_no_line_says_so(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_serve_record(path, measured([8, 6, 4], {8: 10.0, 6: 9.9, 4: 4.0}.__getitem__))
    plan = planned(model, "median_tpot_ms<=8", tmp_path, records=[path], verify=False)
    assert any("no line" in remark for remark in plan.remarks)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (measured([8, 6], lambda n: 1.0 + n, load="closed 4"), "0 depths were measured"),
        (measured([12, 9], lambda n: 1.0 + n), "12 layers, this one has 8"),
        (measured([8], lambda n: 1.0 + n), "1 depths were measured"),
    ],
)
def test_records_of_something_else_are_refused(
    model: Path, tmp_path: Path, record: ServeRecord, message: str
) -> None:
    path = tmp_path / "record.json"
    write_serve_record(path, record)
    with pytest.raises(UserError, match=message):
        planned(model, "median_tpot_ms<=8", tmp_path, records=[path], verify=False)


def test_invalid_cells_do_not_count(model: Path, tmp_path: Path) -> None:
    record = measured([8, 6], lambda n: 1.0 + n)
    cells = [
        one.model_copy(update={"invalid": ["planted"]}) if one.arm == "minus-2" else one
        for one in record.cells
    ]
    path = tmp_path / "record.json"
    write_serve_record(path, record.model_copy(update={"cells": cells}))
    with pytest.raises(UserError, match="1 depths"):
        planned(model, "median_tpot_ms<=8", tmp_path, records=[path], verify=False)


def test_a_metric_that_was_not_measured_is_named_with_those_that_were(
    model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    write_serve_record(path, measured([8, 6], lambda n: 1.0 + n))
    with pytest.raises(UserError, match=r"p99_itl_ms was not measured; .*median_tpot_ms"):
        planned(model, "p99_itl_ms<=8", tmp_path, records=[path], verify=False)


def test_targets_are_read() -> None:
    assert parse_target("median_tpot_ms<=20") == Target("median_tpot_ms", 20.0)
    assert parse_target(" output_throughput >= 5e2 ") == Target("output_throughput", 500.0)
    assert Target("output_throughput", 500.0).cost_limit == pytest.approx(0.002)
    assert str(Target("output_throughput", 500.0)) == "output_throughput>=500"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("20", "write a metric"),
        ("median_tpot_ms<20", "write a metric"),
        ("median_tpot_ms<=0", "positive number"),
        ("median_tpot_ms<=-3", "positive number"),
        ("median_tpot_ms<=1e", "positive number"),
        ("median_tpot_ms<=inf", "write a metric"),
        ("median_tpot_ms>=20", "at most"),
        ("output_throughput<=20", "at least"),
    ],
)
def test_targets_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_target(text)


def test_the_command_answers_and_exits_by_the_answer(model: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "record.json", tmp_path / "slo.json"
    write_serve_record(path, measured([8, 6, 4], lambda n: 2.0 + n))
    words = ["plan", str(model), "--record", str(path), "--no-verify", "--out", str(out)]
    met = CliRunner().invoke(app, [*words, "--slo", "median_tpot_ms<=6.5"])
    assert met.exit_code == 0, met.output
    assert "remove 4 layers, not verified" in met.stdout
    assert '"kind": "slo"' in out.read_text()
    missed = CliRunner().invoke(app, [*words, "--slo", "median_tpot_ms<=1"])
    assert missed.exit_code == 1
    assert "NO: no number of layers meets" in missed.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slo", "median_tpot_ms<=1", "--data", "x.txt"], "--data means nothing with --slo"),
        (["--slo", "median_tpot_ms<=1", "--ratio", "0.5"], "--ratio means nothing with --slo"),
        (["--record", "r.json", "--data", "x.txt"], "--record means nothing without --slo"),
        (["--concurrency", "4"], "--concurrency means nothing without --slo"),
        (["--work", "w"], "--work means nothing without --slo"),
        (["--slo", "median_tpot_ms<=1", "--preset", "paper"], "--preset means nothing with --slo"),
        (
            ["--slo", "median_tpot_ms<=1", "--record", "r.json", "--input-len", "9"],
            "--input-len means nothing with --record",
        ),
    ],
)
def test_settings_of_the_other_question_are_refused(
    model: Path, words: list[str], message: str
) -> None:
    found = CliRunner().invoke(app, ["plan", str(model), *words])
    assert found.exit_code == 2
    assert message in found.stderr


def test_a_model_without_layers_to_spare_is_refused(tmp_path: Path) -> None:
    shallow = write_shape("pico", tmp_path / "shallow", num_layers=3)
    with pytest.raises(UserError, match="has 3 layers"):
        planned(shallow, "median_tpot_ms<=8", tmp_path)


def test_options_of_the_measurement_are_passed_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[ServeOptions] = []

    def run(options: ServeOptions, *, tell: Callable[[str], None]) -> ServeRecord:
        seen.append(options)
        return measured([LAYERS, *(LAYERS - n for n in options.remove)], lambda n: 2.0 + n)

    monkeypatch.setattr(slo, "run_serve", run)
    options = replace(ServeOptions(out=tmp_path / "work"), num_blocks=7, input_len=9)
    plan_for_slo(
        model,
        parse_target("median_tpot_ms<=50"),
        concurrency=1,
        records=(),
        options=options,
        verify=True,
        tell=lambda line: None,
    )
    assert [one.num_blocks for one in seen] == [7]
    assert seen[0].input_len == 9
    assert seen[0].shares == ()
    assert seen[0].memories == ("equal-kv",)


# Records that belong together


def written(folder: Path, name: str, record: ServeRecord) -> Path:
    write_serve_record(folder / name, record)
    return folder / name


GPU = {"gpu": {"name": "H200", "driver_version": "580.1"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "vllm 1"}, "engine is vllm 1, in .*a.json vllm 0"),
        ({"environment": {"gpu": {**GPU["gpu"], "name": "A100"}}}, "GPU is A100, in .* H200"),
        ({"environment": {"gpu": {**GPU["gpu"], "driver_version": "1"}}}, "driver of the GPU is 1"),
        (
            {
                "workload": Workload(
                    input_len=9, output_len=2, dtype="float32", seed=0, ttft_slo_ms=1.0,
                    tpot_slo_ms=1.0,
                )
            },
            "workload's input_len is 9, in .* 1",
        ),
        (
            {"loads": [Load(name="closed 1", kind="closed", concurrency=1, num_requests=7)]},
            "number of requests of 'closed 1' is 7",
        ),
    ],
)  # fmt: skip
def test_records_that_differ_in_more_than_depth_are_refused(
    model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    first = measured([8, 6], lambda n: 2.0 + n).model_copy(update={"environment": GPU})
    second = measured([8, 4], lambda n: 2.0 + n).model_copy(update={"environment": GPU, **change})
    paths = [written(tmp_path, "a.json", first), written(tmp_path, "b.json", second)]
    with pytest.raises(UserError, match=message):
        planned(model, "median_tpot_ms<=6.5", tmp_path, records=paths, verify=False)


def test_a_fingerprint_counts_where_both_records_have_one(model: Path, tmp_path: Path) -> None:
    def with_print(record: ServeRecord, text: str | None) -> ServeRecord:
        arms = [one.model_copy(update={"fingerprint": text}) for one in record.arms]
        return record.model_copy(update={"arms": arms})

    first = with_print(measured([8, 6], lambda n: 2.0 + n), "aa")
    for other, refused in (("aa", False), (None, False), ("bb", True)):
        second = with_print(measured([8, 4], lambda n: 2.0 + n), other)
        paths = [written(tmp_path, "a.json", first), written(tmp_path, "b.json", second)]
        if refused:
            with pytest.raises(UserError, match="fingerprint of the dense model is bb"):
                planned(model, "median_tpot_ms<=6.5", tmp_path, records=paths, verify=False)
        else:
            plan = planned(model, "median_tpot_ms<=6.5", tmp_path, records=paths, verify=False)
            assert plan.num_to_remove == 4


def test_a_record_of_another_model_of_that_depth_is_refused(model: Path, tmp_path: Path) -> None:
    record = measured([8, 6], lambda n: 2.0 + n)
    arms = [one.model_copy(update={"num_parameters": 5}) for one in record.arms]
    path = written(tmp_path, "a.json", record.model_copy(update={"arms": arms}))
    with pytest.raises(UserError, match="is of a model with 5 parameters"):
        planned(model, "median_tpot_ms<=6.5", tmp_path, records=[path], verify=False)


def test_nothing_is_measured_beside_a_record_of_another_machine(
    model: Path, tmp_path: Path, machine: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trsp.serving.vllm_versions.installed_vllm", lambda: ("vllm", "9"))
    path = written(tmp_path, "a.json", measured([8, 6, 4], lambda n: 2.0 + n))
    with pytest.raises(UserError, match=r"engine is vllm 0, here vllm 9: .*--no-verify"):
        planned(model, "median_tpot_ms<=7.2", tmp_path, records=[path])
    assert machine == []


def test_a_named_depth_is_measured_under_the_load_of_the_record(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ServeOptions] = []

    def run(options: ServeOptions, *, tell: Callable[[str], None]) -> ServeRecord:
        seen.append(options)
        return measured([LAYERS, *(LAYERS - n for n in options.remove)], lambda n: 2.0 + n)

    monkeypatch.setattr(slo, "run_serve", run)
    monkeypatch.setattr(slo, "require_same_machine", lambda record, name: None)
    path = written(tmp_path, "a.json", measured([8, 6, 4], lambda n: 2.0 + n))
    plan = planned(model, "median_tpot_ms<=7.2", tmp_path, records=[path])
    assert plan.verified is True
    assert [(one.input_len, one.output_len, one.dtype, one.num_requests) for one in seen] == [
        (1, 2, "float32", 1)
    ]


def test_a_block_that_one_depth_lost_counts_for_none(model: Path, tmp_path: Path) -> None:
    """Blocks drift together: were they paired by place, the line would be bent."""
    record = measured([8, 6, 4], lambda n: 2.0 + n)
    factors = (1.0, 5.0, 1.0)
    cells = [
        one.model_copy(
            update={
                "metrics": {
                    name: value * factors[one.block] for name, value in one.metrics.items()
                },
                "invalid": ["late"] if (one.arm, one.block) == ("minus-2", 1) else [],
            }
        )
        for one in record.cells
    ]
    path = written(tmp_path, "a.json", record.model_copy(update={"cells": cells}))
    plan = planned(model, "median_tpot_ms<=6.5", tmp_path, records=[path], verify=False)
    assert plan.slope == pytest.approx(1.0, rel=0.02)
    assert plan.intercept == pytest.approx(2.0, rel=0.02)


# The folder of the measurements


def test_the_same_question_goes_on_and_another_is_refused(
    model: Path, machine: list[tuple[int, ...]], tmp_path: Path
) -> None:
    first = planned(model, "median_tpot_ms<=7.2", tmp_path)
    again = planned(model, "median_tpot_ms<=7.2", tmp_path)
    assert again.depths == first.depths
    with pytest.raises(UserError, match=r"another question \(target differ\); .*--record .*depths"):
        planned(model, "median_tpot_ms<=6.2", tmp_path)
    with pytest.raises(UserError, match=r"another question \(num_blocks differ\)"):
        planned(model, "median_tpot_ms<=7.2", tmp_path, num_blocks=6)
    assert len(machine) == 4


def test_a_started_experiment_is_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed: list[bool] = []

    def run(options: ServeOptions, *, tell: Callable[[str], None]) -> ServeRecord:
        resumed.append(options.resume)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "plan.json").write_text("{}")
        return measured([LAYERS, *(LAYERS - n for n in options.remove)], lambda n: 2.0 + n)

    monkeypatch.setattr(slo, "run_serve", run)
    for _ in range(2):
        planned(model, "median_tpot_ms<=7.2", tmp_path)
    assert resumed == [False, False, True, True]


def test_a_folder_of_something_else_is_left_alone(
    model: Path, machine: list[tuple[int, ...]], tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no measurements of trsp plan --slo"):
        planned(model, "median_tpot_ms<=7.2", tmp_path)
    assert machine == []


# What is claimed


def test_the_line_has_its_interval(model: Path, machine: list[Any], tmp_path: Path) -> None:
    plan = planned(model, "median_tpot_ms<=7.2", tmp_path)
    assert plan.slope_low is not None
    assert plan.slope_high is not None
    assert plan.intercept_low is not None
    assert plan.intercept_high is not None
    assert plan.slope_low < plan.slope < plan.slope_high
    assert plan.intercept_low < plan.intercept < plan.intercept_high
    assert any(line.startswith("line: 2 (") and "x layers, ms" in line for line in plan.lines())
    for depth in plan.depths:
        assert depth.predicted_low is not None
        assert depth.predicted is not None
        assert depth.predicted_low < depth.predicted


def test_three_misses_are_no_answer(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every depth that is measured alone costs more than the line says."""

    def run(options: ServeOptions, *, tell: Callable[[str], None]) -> ServeRecord:
        bump = 0.0 if len(options.remove) > 1 else 6.0
        depths = [LAYERS, *(LAYERS - n for n in options.remove)]
        return measured(depths, lambda n: 2.0 + n + (0.0 if n == LAYERS else bump))

    monkeypatch.setattr(slo, "run_serve", run)
    plan = planned(model, "median_tpot_ms<=7.5", tmp_path)
    assert plan.verified is not True
    assert plan.lines()[-1].startswith("NO")
    assert "trsp prune" not in plan.lines()[-1]


def test_cost_that_falls_with_depth_makes_dense_the_best(model: Path, tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", measured([8, 6, 4], lambda n: 20.0 - n))
    plan = planned(model, "median_tpot_ms<=5", tmp_path, records=[path], verify=False)
    assert plan.num_to_remove is None
    assert plan.best.num_hidden_layers == LAYERS
    assert any("removing layers gains nothing" in remark for remark in plan.remarks)


@pytest.mark.parametrize(
    ("target", "words", "message"),
    [
        ("foo_ms<=3", {}, "measures no foo_ms; choose median_ttft_ms"),
        ("p99_ttft_ms<=3", {}, "a p99 needs --num-requests 1000"),
        ("median_tpot_ms<=3", {"num_blocks": 1}, "one block has no interval"),
        ("median_tpot_ms<=3", {"concurrency": 0}, "expected at least 1"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_hours_of_measuring(
    model: Path, machine: list[Any], tmp_path: Path, target: str, words: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        planned(model, target, tmp_path, **words)
    assert machine == []


def test_only_an_answer_is_replaced(model: Path, tmp_path: Path) -> None:
    path = written(tmp_path, "record.json", measured([8, 6, 4], lambda n: 2.0 + n))
    before = path.read_bytes()
    words = ["plan", str(model), "--record", str(path), "--no-verify", "--slo"]
    result = CliRunner().invoke(app, [*words, "median_tpot_ms<=6.5", "--out", str(path)])
    assert result.exit_code == 2
    assert "is no answer of trsp plan --slo" in result.stderr
    assert path.read_bytes() == before
    for _ in range(2):
        out = str(tmp_path / "slo.json")
        assert CliRunner().invoke(app, [*words, "median_tpot_ms<=6.5", "--out", out]).exit_code == 0


@pytest.mark.parametrize(("depths", "whose"), [([8, 7, 5], "what was measured"), ([8, 6], "line")])
def test_an_unverified_answer_says_where_its_interval_ends(
    model: Path, tmp_path: Path, depths: list[int], whose: str
) -> None:
    path = written(tmp_path, "a.json", measured(depths, lambda n: 2.0 + n))
    plan = planned(model, "median_tpot_ms<=7.01", tmp_path, records=[path], verify=False)
    assert plan.num_to_remove == 3
    assert any(whose in one and "does not meet the target" in one for one in plan.remarks)
