"""`python -m trsp.bench.reproduce`: from text to tables in one command.

Trains a base model, compares every method on it, writes Markdown. What is done is kept: the same
command again goes on where the last one stopped. In the folder: `base`, the model; `compare`, the
cells that are done, shared by all passes; a record for each pass; `tables.md`.
"""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trsp.pruner.console import ErrorsAsExitCodes, progress_bars
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.progress import Progress, silent

if TYPE_CHECKING:
    from trsp.bench.compare_record import CompareRecord
    from trsp.pruner.recipe import Recipe

# Removed directly, nothing trained.
SELECTIONS = (
    "gates", "gates_once", "influence_verified", "paper_output_gates", "paper_residual_gates",
    "random", "last", "block_influence", "angular", "sleb", "one_shot_loss", "taylor",
    "laco", "replace_me", "streamline",
)  # fmt: skip
TRAINED = (
    "gates+transfer", "gates+distil", "gates+distil@flops", "gates+finetune",
    "gates+finetune@flops", "paper_output_gates+penalty",
)  # fmt: skip
ABLATION = ("gates+anneal_only", "gates+half_labels", "gates+progressive")

# Part of the layers that goes: the curve of what is cheap, two points of what trains.
CURVE_RATIOS = (0.125, 0.25, 0.375, 0.5)
TABLE_RATIOS = (0.25, 0.5)

RECORD_NAME = "compare.json"
TABLES_NAME = "tables.md"
MAX_TRAIN_RECORD_BYTES = 16 << 20


@dataclass(frozen=True)
class Profile:
    """What a device can carry: the base model's shape and training, and the evaluation's length.

    Attributes:
        minutes: wall time of the training.
        sequence_length, window: in tokens, of the training and of the evaluation.
        max_tokens: of each held-out text at most so many.
    """

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    minutes: float
    batch_size: int
    sequence_length: int
    learning_rate: float
    compile_layers: bool
    window: int
    max_tokens: int


PROFILES = {
    # 10.8M parameters.
    "cpu": Profile(20, 192, 10_240, 60.0, 8, 256, 5e-3, False, 256, 20_000),
    # 178M parameters.
    "cuda": Profile(24, 768, 10_240, 6.0, 16, 1024, 1e-3, True, 1024, 100_000),
}


@dataclass(frozen=True)
class Pass:
    """Methods at depths, in a record of their own.

    Attributes:
        num_removed: how many layers go, ascending, each once.
    """

    name: str
    title: str
    methods: tuple[str, ...]
    num_removed: tuple[int, ...]

    def num_cells(self, seeds: tuple[int, ...]) -> int:
        """Methods times depths times seeds."""
        return len(self.methods) * len(self.num_removed) * len(seeds)


@dataclass(frozen=True)
class Plan:
    """All that decides the numbers.

    Attributes:
        base: keywords of train_checkpoint.
        settings: `section.name=value`, over the recipe's defaults.
    """

    data: tuple[Path, ...]
    eval_data: Mapping[str, list[Path]]
    out: Path
    device: str
    base: dict[str, Any]
    seeds: tuple[int, ...]
    window: int
    max_tokens: int
    settings: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Of the base model."""
        return int(self.base["num_hidden_layers"])

    @property
    def num_parameters(self) -> int:
        """Of the base model: tied embeddings; in a layer four square matrices, a SwiGLU, two norms.

        The same as the trained model's own count.
        """
        width = int(self.base["hidden_size"])
        inner = 32 * -(-width // 12)
        layer = 4 * width**2 + 3 * width * inner + 2 * width
        return int(self.base["vocab_size"]) * width + self.num_layers * layer + width

    def recipe(self) -> "Recipe":
        """TRSP's settings.   UserError: one that does not exist or is out of range."""
        from trsp.pruner.recipe import build_recipe

        calibration = {"data": tuple(map(str, self.data)), "sequence_length": self.window}
        return build_recipe(
            flags={"device": self.device, "calibration": calibration}, settings=self.settings
        )

    def passes(self) -> tuple[Pass, ...]:
        """What is compared; a list without methods is left out."""
        wanted = (
            ("selections", "Removed directly, nothing trained", SELECTIONS, CURVE_RATIOS),
            ("trained", "Trained", TRAINED, TABLE_RATIOS),
            ("ablation", "What the parts are worth", ABLATION, TABLE_RATIOS),
        )
        return tuple(
            Pass(name, title, methods, self._counts(ratios))
            for name, title, methods, ratios in wanted
            if methods
        )

    def command(self) -> str:
        """The command that gives these tables again, whatever the defaults are by then."""
        words: list[object] = ["python", "-m", "trsp.bench.reproduce"]
        for path in self.data:
            words += ["--data", path]
        for name, paths in self.eval_data.items():
            for path in paths:
                words += ["--eval-data", f"{name}={path}"]
        base = self.base
        length = "steps" if base["minutes"] is None else "minutes"
        words += ["--out", self.out, "--device", self.device]
        words += [f"--{length}", base["num_steps" if length == "steps" else "minutes"]]
        words += ["--layers-of-base", self.num_layers]
        for name in ("hidden_size", "vocab_size", "batch_size", "sequence_length", "learning_rate"):
            words += [f"--{name.replace('_', '-')}", base[name]]
        words += ["--bf16" if base["precision"] == "bf16" else "--no-bf16"]
        words += ["--compile" if base["compile_layers"] else "--no-compile"]
        words += ["--seeds", len(self.seeds), "--window", self.window]
        words += ["--max-tokens", self.max_tokens]
        for setting in self.settings:
            words += ["--set", setting]
        return shlex.join(map(str, words))

    def _counts(self, ratios: tuple[float, ...]) -> tuple[int, ...]:
        # In a shallow model two ratios may mean the same depth.
        return tuple(sorted({max(1, round(ratio * self.num_layers)) for ratio in ratios}))


def check_plan(plan: Plan) -> None:
    """Find a mistake before an hour of training rather than after it.

    Raises:
        UserError: a text that is not there or in both places, a method or setting that does not
            exist, a shape that cannot be, or a folder that holds another base model.
    """
    from trsp.bench.base_model import HEAD_DIM
    from trsp.bench.compare_methods import parse_method
    from trsp.pruner.text_checks import refuse_same_files

    if not plan.eval_data:
        raise UserError("no held-out text is given: --eval-data NAME=PATH")
    for paths in plan.eval_data.values():
        refuse_same_files(plan.data, paths, remedy="name other files with --eval-data")
    if plan.base["hidden_size"] % HEAD_DIM:
        raise UserError(f"--hidden-size {plan.base['hidden_size']} is no multiple of {HEAD_DIM}")
    for one in plan.passes():
        for name in one.methods:
            parse_method(name)
    plan.recipe().protected_layers(plan.num_layers)
    if plan.out.is_file():
        raise UserError(f"--out {plan.out}: is a file; name a folder")
    if _base_folder(plan).exists():
        read_base(plan)


def read_base(plan: Plan) -> dict[str, Any]:
    """The record of the base model that is in the folder.

    Raises:
        UserError: it was trained in another way than is asked for, or has no record.
    """
    from trsp.pruner.bounded_json import read_json_object

    folder = _base_folder(plan)
    path = folder / "train_record.json"
    if not path.is_file():
        raise UserError(f"{folder}: is there and holds no {path.name}; name another --out")
    record = read_json_object(path, max_bytes=MAX_TRAIN_RECORD_BYTES)
    base = plan.base
    wanted = {name: value for name, value in base.items() if name not in ("num_steps", "minutes")}
    wanted["compiled"] = wanted.pop("compile_layers")
    wanted["text_files"] = [path.name for path in plan.data]
    if base["num_steps"] is not None:
        wanted["num_steps"] = base["num_steps"]
    different = [
        f"{name} is {record.get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if record.get(name) != value
    ]
    if base["minutes"] is not None and not _took(record, base["minutes"]):
        different.append(f"minutes are {base['minutes']:g} here and not what that training took")
    if different:
        raise UserError(
            f"{folder}: is another base model: {'; '.join(different)}; name another --out, or ask "
            "for that model"
        )
    return record


def _took(record: dict[str, Any], minutes: float) -> bool:
    """Whether a training by the clock would have ended between the record's last two points."""
    try:
        earlier = [point["elapsed_s"] for point in record["loss_curve"][:-1]]
        return bool((earlier or [0.0])[-1] < 60 * minutes <= record["wall_s"])
    except (KeyError, TypeError) as error:
        raise UserError(f"the base model's train_record.json is damaged: no {error}") from error


def _base_folder(plan: Plan) -> Path:
    return plan.out / "base"


def train_base(plan: Plan, progress: Progress = silent) -> dict[str, Any]:
    """Train the base model unless it is there; its record.

    Raises:
        UserError: another one is there, or the text is too short for the shape.
        RunError: the loss is not finite, or memory is short.
    """
    import torch

    from trsp.bench import train_base as base_training

    folder = _base_folder(plan)
    if not folder.exists():
        # The CPU is where it trains when nothing is said.
        place = {} if plan.device == "cpu" else {"device": plan.device}
        try:
            base_training.train_checkpoint(
                list(plan.data), folder, **plan.base, **place, log_every=100, progress=progress
            )
        except torch.OutOfMemoryError as error:
            raise RunError(
                "out of memory in training the base model: choose a smaller --batch-size, or a "
                "smaller --hidden-size"
            ) from error
    return read_base(plan)


def reproduce(plan: Plan, progress: Progress = silent) -> Path:
    """Do all of the plan that is not done yet; the file of tables.

    Raises:
        UserError: see check_plan; or held-out text overlaps the calibration text.
        RunError: a loss is not finite.
    """
    from trsp.bench.compare import CompareOptions, run_compare
    from trsp.bench.compare_methods import parse_method
    from trsp.bench.compare_record import write_compare_record
    from trsp.pruner.durable import atomic_write, run_lock

    check_plan(plan)
    plan.out.mkdir(parents=True, exist_ok=True)
    tables = plan.out / TABLES_NAME
    with run_lock(plan.out):
        trained = train_base(plan, progress)
        records: list[tuple[Pass, CompareRecord]] = []
        for one in plan.passes():
            options = CompareOptions(
                model=_base_folder(plan),
                recipe=plan.recipe(),
                eval_data=plan.eval_data,
                num_removed=one.num_removed,
                seeds=plan.seeds,
                methods=tuple(map(parse_method, one.methods)),
                folder=plan.out / "compare",
                window=plan.window,
                max_tokens=plan.max_tokens,
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


def tables_markdown(
    plan: Plan, trained: dict[str, Any], records: "list[tuple[Pass, CompareRecord]]"
) -> str:
    """The base model's facts, then a table for each pass, depth and text."""
    from trsp.bench.compare_show import EXPLANATION, markdown

    num_layers = plan.num_layers
    blocks = [f"# Depth pruning compared on a model of {num_layers} layers\n"]
    blocks += [*_facts(plan, trained, records[0][1]), EXPLANATION + "\n"]
    for one, record in records:
        blocks.append(f"## {one.title}\n")
        for count in one.num_removed:
            for text in plan.eval_data:
                gone = f"{count} of {num_layers} layers gone ({count / num_layers:.1%})"
                blocks += [f"### {gone}, {text}\n", markdown(record, count, text)]
        notes = {
            f"- {cell.label}, {cell.num_removed} layers, seed {cell.seed}: {cell.note}": None
            for cell in record.cells
            if cell.note
        }
        if notes:
            blocks.append("\n".join(notes) + "\n")
    return "\n".join(blocks)


def _facts(plan: Plan, trained: dict[str, Any], record: "CompareRecord") -> list[str]:
    """What was trained on what, what the perplexities hold for, and how to get them again."""
    here, there = record.environment, trained["environment"]
    passes = trained["num_tokens_trained"] / trained["num_tokens_in_text"]
    lines = [
        f"- Base model: {trained['num_parameters'] / 1e6:.1f}M parameters, {plan.num_layers} "
        f"layers of width {trained['hidden_size']}, {trained['vocab_size']:,} tokens in the "
        f"vocabulary, weights {record.dense.weights_sha256[:12]}.",
        f"- Trained on {', '.join(trained['text_files'])}: {trained['num_steps']:,} steps, "
        f"{trained['num_tokens_trained'] / 1e6:.4g}M tokens, {passes:.2g} of the text, to a loss "
        f"of {trained['final_loss']:.3f}, in {trained['wall_s'] / 60:.3g} min, "
        f"{trained['precision']}, {_machine(there)}.",
    ]
    for name, protocol in record.protocols.items():
        lines.append(
            f"- Text {name}: the dense model's perplexity is "
            f"{record.dense.quality[name].perplexity:.4g}; {protocol['num_tokens']:,} tokens in "
            f"windows of {protocol['window']}, stride {protocol['stride']}, {protocol['dtype']} on "
            f"{protocol['device']}, text {protocol['text_sha256'][:12]}."
        )
    seeds = ", ".join(map(str, plan.seeds))
    lines.append(f"- Compared with seeds {seeds}: {_machine(here)}, commit {here['commit']}.\n")
    return ["\n".join(lines), f"```bash\n{plan.command()}\n```\n"]


def _machine(environment: dict[str, Any]) -> str:
    gpu = environment["gpu"]
    name = gpu["name"] if gpu else f"{environment['processor']} ({environment['num_cpus']} cores)"
    return f"{name}, torch {environment['versions']['torch']}"


def describe(plan: Plan) -> str:
    """What the plan would do, one line each."""
    base = plan.base
    length = (
        f"{base['num_steps']} steps"
        if base["minutes"] is None
        else f"{base['minutes']:g} min on {plan.device}"
    )
    state = "is there" if _base_folder(plan).exists() else f"to train, {length}"
    lines = [
        f"base        {plan.num_layers} layers of width {base['hidden_size']}, "
        f"{plan.num_parameters / 1e6:.1f}M parameters ({plan.num_parameters:,}): {state}"
    ]
    total = 0
    for one in plan.passes():
        total += one.num_cells(plan.seeds)
        lines.append(
            f"{one.name:<11} {one.num_cells(plan.seeds)} cells: {len(one.methods)} methods, "
            f"{len(plan.seeds)} seeds, {', '.join(map(str, one.num_removed))} layers gone"
        )
    lines += [f"{'together':<11} {total} cells", f"{'command':<11} {plan.command()}"]
    return "\n".join(lines)


app = typer.Typer(cls=ErrorsAsExitCodes, add_completion=False, pretty_exceptions_enable=False)


# A group's only action rather than a command: groups are what turns errors into exit codes.
@app.callback(invoke_without_command=True)
def main(
    data: Annotated[list[Path], typer.Option(help="text to train and calibrate on; repeatable")],
    eval_data: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="held-out text; repeatable")
    ],
    out: Annotated[Path, typer.Option(help="folder for everything; repeat the command to go on")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda; decides the defaults")] = "auto",
    minutes: Annotated[float | None, typer.Option(help="of training the base model")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="steps instead of minutes")] = None,
    layers_of_base: Annotated[int | None, typer.Option(min=2)] = None,
    hidden_size: Annotated[int | None, typer.Option(min=64, help="a multiple of 64")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=257)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="of training the base")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=8, help="of training it")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="of training it")] = None,
    bf16: Annotated[bool, typer.Option(help="train it with matrix products in bf16")] = True,
    compile_layers: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="its layers, while it trains")
    ] = None,
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
    if minutes is not None and (steps is not None or minutes <= 0):
        raise UserError("give the length of the training as --minutes above 0, or as --steps")
    device, profile = _profile(device)
    asked = asdict(profile) | {
        name: value
        for name, value in {
            "num_hidden_layers": layers_of_base,
            "hidden_size": hidden_size,
            "vocab_size": vocab_size,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "learning_rate": learning_rate,
            "compile_layers": compile_layers,
            "minutes": minutes,
            "window": window,
            "max_tokens": max_tokens,
        }.items()
        if value is not None
    }
    chosen_window, chosen_tokens = asked.pop("window"), asked.pop("max_tokens")
    from trsp.bench.compare_cli import _named

    plan = Plan(
        data=tuple(data),
        eval_data=_named(eval_data),
        out=out,
        device=device,
        base=asked
        | {
            "context": max(1024, asked["sequence_length"], chosen_window),
            "num_steps": steps,
            "minutes": None if steps is not None else asked["minutes"],
            "seed": 0,
            "precision": "bf16" if bf16 else "fp32",
        },
        seeds=tuple(range(seeds)),
        window=chosen_window,
        max_tokens=chosen_tokens,
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
    print(f"base     {_base_folder(plan)}")
    for one in plan.passes():
        print(f"record   {out / one.name / RECORD_NAME}")
    print(f"tables   {tables}")


def _profile(device: str) -> tuple[str, Profile]:
    from trsp.pruner.run import resolve_device

    device = resolve_device(device)
    kind = device.partition(":")[0]
    if kind not in PROFILES:
        raise UserError(f"--device {device}: choose auto, {', '.join(PROFILES)}")
    return device, PROFILES[kind]


if __name__ == "__main__":
    app()
