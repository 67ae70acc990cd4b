"""`python -m trsp.bench.family_table`: what works for each decoder family, from real runs.

Each family's pico model (pico_families.py) is cut, pruned with both stages, proven and loaded again
by transformers; in an environment with vLLM it is served too. Another run with the same --out goes
on: a record may be begun in one environment and its vLLM column filled in another.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trsp.bench.pico_families import NUM_LAYERS, PICO_CONFIGS, REFUSED
from trsp.pruner.console import ErrorsAsExitCodes
from trsp.pruner.errors import RunError, UserError

# Neither a run from one end nor every other layer: each kind of layer of each pattern loses some.
KEPT = (0, 1, 2, 4, 5, 7)
COLUMNS = {
    "compaction": "compaction exact",
    "stages": "stages 1 and 2",
    "reload": "transformers reload",
    "vllm": "vLLM, same tokens",
}
_SETTINGS = (
    "calibration.num_sequences=4", "calibration.sequence_length=16", "transfer.steps=3",
    "transfer.batch_size=2", "selection.batch_size=2",
)  # fmt: skip
_SHARD_SIZE = "60KB"
_NUM_WORDS = 600
_MAX_DETAIL = 300

Outcome = dict[str, Any]


def measure_family(name: str, columns: Sequence[str]) -> dict[str, Any]:
    """Make a family's pico model and try these columns of COLUMNS on it.

    Returns:
        model_type, model_class, num_parameters; for each column its outcome: `status` (passed,
        failed or refused; for vLLM also "dense neither": it does not serve the unpruned model
        either) and `detail`, the proof's words or the error's.
    """
    from trsp.bench.pico_checkpoint import make_pico_model

    model = make_pico_model(name)
    row: dict[str, Any] = {
        "model_type": model.config.model_type,
        "model_class": type(model).__name__,
        "num_parameters": model.num_parameters(),
    }
    with tempfile.TemporaryDirectory() as folder:
        for column, outcome in _outcomes(name, Path(folder), columns):
            row[column] = outcome
    return row


def _outcomes(name: str, folder: Path, columns: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    import torch

    from trsp.bench.pico_checkpoint import pico_text, write_pico_checkpoint
    from trsp.pruner import api

    dense, cut = folder / "dense", folder / "cut"
    write_pico_checkpoint(name, dense)
    made = _tried(folder, lambda: api.prune(dense, cut, keep=KEPT, vllm="off"))
    if "compaction" in columns:
        sharded = folder / "sharded"
        write_pico_checkpoint(name, sharded, dtype=torch.bfloat16, max_shard_size=_SHARD_SIZE)
        again = _tried(
            folder, lambda: api.prune(sharded, folder / "cut-sharded", keep=KEPT, vllm="off")
        )
        yield "compaction", _check(made if made["status"] != "passed" else again, "logits")
    if "reload" in columns:
        yield "reload", _check(made, "load")
    if "stages" in columns:
        text = folder / "text.txt"
        text.write_text(pico_text(_NUM_WORDS), "utf-8")
        pruned = _tried(
            folder,
            lambda: api.prune(
                dense, folder / "pruned", layers=2, data=[text], settings=_SETTINGS, vllm="off"
            ),
        )
        yield "stages", _check(pruned, "logits")
    if "vllm" in columns:
        served = made
        if made["status"] == "passed":
            proof = api.verify(cut, against=dense, vllm="required").to_document()
            served = {"status": "passed", "checks": proof["checks"]}
        outcome = _check(served, "vllm")
        if outcome["status"] == "failed" and (reason := _why_dense_is_not_served(dense)):
            outcome = {"status": "dense neither", "detail": reason}
        yield "vllm", outcome


def _why_dense_is_not_served(dense: Path) -> str | None:
    """What vLLM says of the unpruned model, or how it differs; None where it serves it well."""
    from trsp.pruner.checkpoint import open_checkpoint
    from trsp.pruner.folder_checks import CheckFailed
    from trsp.pruner.model_checks import ModelChecks

    checks = ModelChecks(open_checkpoint(dense), trust_remote_code=False, device="cpu")
    checks.load()
    checks.forward(None)
    checks.kv_cache()
    try:
        checks.served(load_tokenizer=False, waiting=lambda: None)
    except CheckFailed as failure:
        return failure.finding.detail[:_MAX_DETAIL]
    except RunError as error:
        return str(error)[:_MAX_DETAIL]
    finally:
        checks.free()
    return None


def _tried(folder: Path, run: Any) -> Outcome:
    """A pruning's proof, or why there is none; what else goes wrong is a fault of ours."""
    try:
        return {"status": "passed", "checks": run()["proof"]["checks"]}
    except (UserError, RunError) as error:
        status = "refused" if isinstance(error, UserError) else "failed"
        text = " ".join(str(error).replace(f"{folder}/", "").split())
        return {"status": status, "detail": text[:_MAX_DETAIL]}


def _check(tried: Outcome, name: str) -> Outcome:
    """The outcome of one check of a proof, or of what came before it."""
    if "checks" not in tried:
        return tried
    (check,) = (check for check in tried["checks"] if check["name"] == name)
    return {"status": check["status"], "detail": check["detail"][:_MAX_DETAIL]}


def table_markdown(record: dict[str, Any]) -> str:
    """The record as a table for a README, and the families that are refused, with the reasons."""
    lines = [
        f"| family | {' | '.join(COLUMNS.values())} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    refused = []
    for name, row in record["families"].items():
        first = row.get("compaction", {})
        if first.get("status") == "refused":
            refused.append(f"- `{name}`: {first['detail']}")
            continue
        cells = [_mark(row.get(column)) for column in COLUMNS]
        lines.append(f"| {name} ({row['model_class']}) | {' | '.join(cells)} |")
    if refused:
        lines += ["", "Refused:", "", *refused]
    unserved = [
        f"- `{name}`: {outcome['detail']}"
        for name, row in record["families"].items()
        if (outcome := row.get("vllm", {})).get("status") in ("failed", "dense neither")
    ]
    if unserved:
        lines += ["", "Not served, in vLLM's words or by the difference:", "", *unserved]
    return "\n".join(lines)


def _mark(outcome: Outcome | None) -> str:
    words = {"passed": "yes", "failed": "**no**"}
    return "not run" if outcome is None else words.get(outcome["status"], str(outcome["status"]))


app = typer.Typer(cls=ErrorsAsExitCodes, add_completion=False, pretty_exceptions_enable=False)


# A group's only action rather than a command: groups are what turns errors into exit codes.
@app.callback(invoke_without_command=True)
def main(
    out: Annotated[Path, typer.Option(help="the record; what it holds is kept")],
    family: Annotated[list[str] | None, typer.Option(help="repeatable; all")] = None,
    column: Annotated[list[str] | None, typer.Option(help="repeatable; all that can run")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the table, run none")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Try every family and write what works; exit 1 where something failed."""
    from trsp.bench.record import environment, write_record
    from trsp.pruner.vllm_process import has_vllm

    record: dict[str, Any] = {"kind": "trsp families", "environments": {}, "families": {}}
    if out.exists():
        record = json.loads(out.read_text("utf-8"))
        if record.get("kind") != "trsp families":
            raise UserError(f"{out} is no record of this command; name another --out")
    if markdown:
        print(table_markdown(record))
        return
    names, columns = family or list(PICO_CONFIGS), column or list(COLUMNS)
    for word, known in ((names, PICO_CONFIGS), (columns, COLUMNS)):
        if unknown := sorted(set(word) - set(known)):
            raise UserError(f"{unknown[0]!r} is unknown; choose from {', '.join(known)}")
    if "vllm" in columns and not has_vllm():
        if column:
            raise UserError("--column vllm needs vLLM: pip install 'trsp[vllm]'")
        columns.remove("vllm")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    record |= {"num_layers": NUM_LAYERS, "kept": list(KEPT)}
    here = environment()
    for name in names:
        row = record["families"].setdefault(name, {})
        missing = [one for one in columns if one not in row]
        if missing:
            row |= measure_family(name, missing)
            record["environments"] |= dict.fromkeys(missing, here)
            write_record(out, record)
        told = (f"{one} {row[one]['status']}" for one in COLUMNS if one in row)
        print(f"{name}: {', '.join(told)}", file=sys.stderr, flush=True)
    failed = [
        f"{name}: {one}"
        for name in names
        for one in columns
        if record["families"][name][one]["status"]
        in ({"failed"} if name in REFUSED else {"failed", "refused"})
    ]
    if failed:
        raise RunError(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    app()
