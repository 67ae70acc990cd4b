"""`python -m trsp.bench.reproduce`: from text to tables in one command.

Trains a base model, compares every method on it, writes Markdown. What is done is kept: the same
command again goes on where the last one stopped. In the folder: `base`, the model; `compare`, the
cells that are done, shared by all passes; a record for each pass; `tables.md`.
"""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trsp.pruner.console import ErrorsAsExitCodes, progress_bars
from trsp.pruner.errors import UserError
from trsp.pruner.progress import Progress, silent

if TYPE_CHECKING:
    from trsp.bench.compare_record import CompareRecord
    from trsp.pruner.recipe import Recipe

# The whole model is never trained.
SELECTIONS = (
    "random", "last", "block_influence", "angular", "one_shot_loss", "taylor", "sleb",
    "replace_me", "streamline", "laco", "paper_output_gates", "paper_residual_gates",
    "joint_gates", "gates", "gates_once", "influence_verified", "trsp", "trsp+refit", "trsp+local",
)  # fmt: skip
TRAINED = (
    "trsp+transfer", "trsp+refit", "trsp+local", "trsp+distil", "trsp+distil@flops",
    "trsp+finetune", "trsp+finetune@flops", "replace_me+distil@flops", "streamline+distil@flops",
    "block_influence+distil@flops", "paper_output_gates+penalty", "paper_output_gates+penalty_l1",
    "paper_residual_gates+penalty", "paper_residual_gates+penalty_l1",
)  # fmt: skip
# Without: local distillation (distil; in closed form: refit_distil), teacher (labels, half_labels),
# chosen layers (random), verification, rounds; with: gates that close in training, with and without
# the penalty, or never.
ABLATION = (
    "trsp+transfer", "trsp+distil", "trsp+refit_distil", "trsp+labels", "random+transfer",
    "gates_unverified+transfer", "gates_one_shot+transfer", "trsp+linear",
    "trsp+linear_no_penalty", "trsp+progressive", "trsp+penalty_distil", "trsp+half_labels",
)  # fmt: skip

# Part of the layers that goes: the curve of what is cheap, two points of what trains.
CURVE_RATIOS = (0.125, 0.25, 0.375, 0.5)
TABLE_RATIOS = (0.25, 0.5)

# Settings that options of this command say instead; depths are those of the tables.
SETTINGS_BY_OPTION = {
    "seed": ("--seeds",),
    "evaluation.data": ("--eval-data",),
    "evaluation.window": ("--window",),
    "evaluation.max_tokens": ("--max-tokens",),
}

RECORD_NAME = "compare.json"
MAX_TRAIN_RECORD_BYTES = 16 << 20


@dataclass(frozen=True)
class Profile:
    """What a device can carry; each field is an option of the command.

    Attributes:
        minutes, steps: length of the base model's training, one of them.
        sequence_length, window: in tokens, of that training and of evaluation and calibration.
        max_tokens: of each held-out text at most so many.
    """

    layers_of_base: int
    hidden_size: int
    vocab_size: int
    minutes: float | None
    batch_size: int
    sequence_length: int
    learning_rate: float
    compiled: bool
    window: int
    max_tokens: int
    bf16: bool = True
    steps: int | None = None


PROFILES = {
    # 10.8M parameters.
    "cpu": Profile(20, 192, 10_240, 60.0, 8, 256, 5e-3, False, 256, 20_000),
    # 178M parameters.
    "cuda": Profile(24, 768, 10_240, 6.0, 16, 1024, 1e-3, True, 1024, 100_000),
}


@dataclass(frozen=True)
class Pass:
    """Methods at depths (how many layers go, ascending), in a record of their own."""

    name: str
    title: str
    methods: tuple[str, ...]
    num_removed: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All that decides the numbers; `settings` are `section.name=value`, over the defaults."""

    data: tuple[Path, ...]
    eval_data: Mapping[str, list[Path]]
    out: Path
    device: str
    profile: Profile
    seeds: tuple[int, ...]
    settings: tuple[str, ...] = ()

    @property
    def base(self) -> Path:
        """Folder of the base model."""
        return self.out / "base"

    @property
    def num_parameters(self) -> int:
        """Of the base model, as it counts itself: embeddings (tied), layers, the last norm."""
        width = self.profile.hidden_size
        inner = 32 * -(-width // 12)
        layer = 4 * width**2 + 3 * width * inner + 2 * width
        return self.profile.vocab_size * width + self.profile.layers_of_base * layer + width

    def training(self) -> dict[str, Any]:
        """Keywords of train_checkpoint."""
        profile = self.profile
        alike = (
            "hidden_size", "vocab_size", "minutes", "batch_size", "sequence_length",
            "learning_rate",
        )  # fmt: skip
        return {
            "num_hidden_layers": profile.layers_of_base,
            **{name: getattr(profile, name) for name in alike},
            "context": max(1024, profile.sequence_length, profile.window),
            "num_steps": profile.steps,
            "seed": 0,
            "precision": "bf16" if profile.bf16 else "fp32",
            "compile_layers": profile.compiled,
            "device": self.device,
        }

    def recipe(self) -> "Recipe":
        """TRSP's settings.   UserError: one that does not exist or is out of range."""
        from trsp.pruner.recipe import build_recipe

        text = {"data": tuple(map(str, self.data)), "sequence_length": self.profile.window}
        return build_recipe(
            flags={"device": self.device, "calibration": text}, settings=self.settings
        )

    def passes(self) -> tuple[Pass, ...]:
        """What is compared; a list without methods is left out."""
        wanted = (
            ("selections", "Without training the whole model", SELECTIONS, CURVE_RATIOS),
            ("trained", "Trained", TRAINED, TABLE_RATIOS),
            ("ablation", "What the parts are worth", ABLATION, TABLE_RATIOS),
        )
        return tuple(
            Pass(name, title, methods, self._depths(ratios))
            for name, title, methods, ratios in wanted
            if methods
        )

    def _depths(self, ratios: tuple[float, ...]) -> tuple[int, ...]:
        # In a shallow model two ratios may mean the same.
        return tuple(sorted({max(1, round(r * self.profile.layers_of_base)) for r in ratios}))

    def command(self) -> str:
        """The command that gives these tables again, whatever the defaults are by then."""
        words: list[object] = ["python", "-m", "trsp.bench.reproduce"]
        words += [word for path in self.data for word in ("--data", path)]
        for name, paths in self.eval_data.items():
            words += [word for path in paths for word in ("--eval-data", f"{name}={path}")]
        words += ["--out", self.out, "--device", self.device, "--seeds", len(self.seeds)]
        for field in fields(Profile):
            value, option = getattr(self.profile, field.name), field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            elif value is not None:
                words += [f"--{option}", value]
        words += [word for setting in self.settings for word in ("--set", setting)]
        return shlex.join(map(str, words))


def check_plan(plan: Plan) -> None:
    """Find a mistake before an hour of training rather than after it.

    Raises:
        UserError: a text that is not there or in both places, a method or setting that does not
            exist, a shape that cannot be, or a folder that holds another base model.
    """
    from trsp.bench.base_model import HEAD_DIM
    from trsp.bench.compare_methods import parse_method
    from trsp.bench.compare_settings import check_settings
    from trsp.pruner.text_checks import refuse_same_files

    check_settings(plan.recipe(), plan.settings, (), SETTINGS_BY_OPTION)
    for paths in plan.eval_data.values():
        refuse_same_files(plan.data, paths, remedy="name other files with --eval-data")
    if plan.profile.hidden_size % HEAD_DIM:
        raise UserError(f"--hidden-size {plan.profile.hidden_size} is no multiple of {HEAD_DIM}")
    for name in (name for one in plan.passes() for name in one.methods):
        parse_method(name)
    plan.recipe().protected_layers(plan.profile.layers_of_base)
    if plan.out.is_file():
        raise UserError(f"--out {plan.out}: is a file; name a folder")
    if plan.base.exists():
        read_base(plan)


def read_base(plan: Plan) -> dict[str, Any]:
    """The record of the base model that is in the folder.

    Raises:
        UserError: it was trained in another way than is asked for, or has no record.
    """
    from trsp.pruner.bounded_json import read_json_object

    path = plan.base / "train_record.json"
    if not path.is_file():
        raise UserError(f"{plan.base}: is there and holds no {path.name}; name another --out")
    record = read_json_object(path, max_bytes=MAX_TRAIN_RECORD_BYTES)
    wanted = {**plan.training(), "text_files": [path.name for path in plan.data]}
    wanted["compiled"] = wanted.pop("compile_layers")
    # Where it was trained does not matter; how long it was to take is not in the record.
    del wanted["device"]
    minutes = wanted.pop("minutes")
    if minutes is not None:
        del wanted["num_steps"]
    different = [
        f"{name} is {record.get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if record.get(name) != value
    ]
    if minutes is not None and not _took(record, minutes):
        different.append(f"minutes are {minutes:g} here and not what that training took")
    different += _other_texts(plan, record.get("text_sha256"))
    if different:
        raise UserError(
            f"{plan.base}: is another base model: {'; '.join(different)}; name another --out, or "
            "ask for that model"
        )
    return record


def _other_texts(plan: Plan, there: list[str] | None) -> list[str]:
    """Which text files hold something else than those of the record; older ones have no hashes."""
    from trsp.pruner.text_files import hash_text_file

    if there is None:
        return []
    here = [hash_text_file(path) for path in plan.data]
    if len(here) != len(there):
        return []  # their names differ too
    return [
        f"{path} has the sha256 {new[:12]} and the text of that name there {old[:12]}"
        for path, old, new in zip(plan.data, there, here, strict=True)
        if old != new
    ]


def _took(record: dict[str, Any], minutes: float) -> bool:
    """Whether a training by the clock would have ended between the record's last two points."""
    earlier = [point["elapsed_s"] for point in record["loss_curve"][:-1]]
    return bool((earlier or [0.0])[-1] < 60 * minutes <= record["wall_s"])


def reproduce(plan: Plan, progress: Progress = silent) -> Path:
    """Do all of the plan that is not done yet; the file of tables.

    Raises:
        UserError: see check_plan; the text is too short for the shape, or the held-out text has
            too much in common with it.
        RunError: a loss is not finite.
    """
    from trsp.bench import train_base
    from trsp.bench.compare import run_compare
    from trsp.bench.compare_bench import CompareOptions
    from trsp.bench.compare_methods import parse_method
    from trsp.bench.compare_record import write_compare_record
    from trsp.bench.reproduce_tables import tables_markdown
    from trsp.pruner.durable import atomic_write, run_lock

    check_plan(plan)
    plan.out.mkdir(parents=True, exist_ok=True)
    tables = plan.out / "tables.md"
    with run_lock(plan.out):
        if not plan.base.exists():
            train_base.train_checkpoint(
                list(plan.data), plan.base, **plan.training(), log_every=100, progress=progress
            )
        trained = read_base(plan)
        records: list[tuple[Pass, CompareRecord]] = []
        for one in plan.passes():
            options = CompareOptions(
                model=plan.base,
                recipe=plan.recipe(),
                eval_data=plan.eval_data,
                num_removed=one.num_removed,
                seeds=plan.seeds,
                methods=tuple(map(parse_method, one.methods)),
                folder=plan.out / "compare",
                window=plan.profile.window,
                max_tokens=plan.profile.max_tokens,
            )
            path = plan.out / one.name / RECORD_NAME
            path.parent.mkdir(exist_ok=True)
            record: CompareRecord | None = None
            for record in run_compare(options, progress):
                write_compare_record(path, record)
            assert record is not None, "a pass has methods, depths and seeds"
            records.append((one, record))
            atomic_write(tables, tables_markdown(plan, trained, records))
    return tables


def describe(plan: Plan) -> str:
    """What the plan would do, one line each."""
    profile = plan.profile
    length = f"{profile.minutes:g} min" if profile.steps is None else f"{profile.steps} steps"
    state = "is there" if plan.base.exists() else f"to train, {length} on {plan.device}"
    lines = [
        f"base        {profile.layers_of_base} layers of width {profile.hidden_size}, "
        f"{plan.num_parameters / 1e6:.1f}M parameters ({plan.num_parameters:,}): {state}"
    ]
    for one in plan.passes():
        num_cells = len(one.methods) * len(one.num_removed) * len(plan.seeds)
        depths = ", ".join(map(str, one.num_removed))
        lines.append(
            f"{one.name:<11} {num_cells} cells: {len(one.methods)} methods, {len(plan.seeds)} "
            f"seeds, {depths} layers gone"
        )
    return "\n".join([*lines, f"command     {plan.command()}"])


# Plain help: a table would cut the longer names of options.
app = typer.Typer(
    cls=ErrorsAsExitCodes,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


# A group's only action rather than a command: groups are what turns errors into exit codes.
@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    data: Annotated[list[Path], typer.Option(help="text to train and calibrate on; repeatable")],
    eval_data: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="held-out text; repeatable")
    ],
    out: Annotated[Path, typer.Option(help="folder for everything; repeat the command to go on")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda; decides the defaults")] = "auto",
    minutes: Annotated[float | None, typer.Option(help="of training the base model")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="steps instead of minutes")] = None,
    layers_of_base: Annotated[int | None, typer.Option(min=2, help="how many")] = None,
    hidden_size: Annotated[int | None, typer.Option(min=64, help="a multiple of 64")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=257, help="of its tokenizer")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="of training the base")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=8, help="of training it")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="of training it")] = None,
    bf16: Annotated[bool | None, typer.Option(help="train it in bf16")] = None,
    compiled: Annotated[bool | None, typer.Option(help="its layers, to train")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="how many: 0, 1, ...")] = 3,
    window: Annotated[
        int | None, typer.Option(min=8, help="of evaluation and calibration, in tokens")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="of each held-out text")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.name=value; repeatable")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would do")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """From text to tables: train a base model, prune it in every way, compare."""
    from trsp.bench.compare_cli import named_texts
    from trsp.pruner.run import resolve_device

    if minutes is not None and (steps is not None or minutes <= 0):
        raise UserError("give the length of the training as --minutes above 0, or as --steps")
    device = resolve_device(device)
    if device.partition(":")[0] not in PROFILES:
        raise UserError(f"--device {device}: choose auto, {', '.join(PROFILES)}")
    profile = PROFILES[device.partition(":")[0]]
    if steps is not None:
        profile = replace(profile, minutes=None)
    given = {field.name: context.params[field.name] for field in fields(Profile)}
    given = {name: value for name, value in given.items() if value is not None}
    plan = Plan(
        data=tuple(data),
        eval_data=named_texts(eval_data),
        out=out,
        device=device,
        profile=replace(profile, **given),
        seeds=tuple(range(seeds)),
        settings=tuple(settings or ()),
    )
    if dry_run:
        check_plan(plan)
        print(describe(plan))
        return
    import transformers

    transformers.utils.logging.disable_progress_bar()
    print(describe(plan), file=sys.stderr)
    with progress_bars() as progress:
        tables = reproduce(plan, progress)
    print(f"base     {plan.base}")
    for one in plan.passes():
        print(f"record   {out / one.name / RECORD_NAME}")
    print(f"tables   {tables}")


if __name__ == "__main__":
    app()
