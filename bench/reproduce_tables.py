"""What `python -m trsp.bench.reproduce` found, as Markdown."""

from typing import Any

from trsp.bench.compare_record import CompareRecord
from trsp.bench.compare_show import EXPLANATION
from trsp.bench.report_compare_findings import Comparison
from trsp.bench.report_compare_tables import readme_tables
from trsp.bench.report_markdown import table_markdown
from trsp.bench.reproduce import Pass, Plan


def tables_markdown(
    plan: Plan, trained: dict[str, Any], records: list[tuple[Pass, CompareRecord]]
) -> str:
    """The base model's facts, then the tables of each pass."""
    num_layers = plan.profile.layers_of_base
    blocks = [
        f"# Depth pruning compared on a model of {num_layers} layers\n",
        _facts(plan, trained, records[0][1]),
        f"```bash\n{plan.command()}\n```\n",
        f"{EXPLANATION}\n",
    ]
    for one, record in records:
        blocks.append(f"## {one.title}\n")
        for table in readme_tables(Comparison(record, one.name)):
            blocks += [f"### {table.caption}\n", f"{table_markdown(table)}\n"]
        notes = [
            f"- {cell.label}, {cell.num_removed} layers, seed {cell.seed}: {cell.note}\n"
            for cell in record.cells
            if cell.note
        ]
        blocks += ["".join(notes)] if notes else []
        warnings = [f"- Warning: {text}.\n" for text in record.warnings]
        blocks += ["".join(warnings)] if warnings else []
    return "\n".join(blocks)


def _facts(plan: Plan, trained: dict[str, Any], record: CompareRecord) -> str:
    """What was trained on what, and what the perplexities hold for."""
    passes = trained["num_tokens_trained"] / trained["num_tokens_in_text"]
    here, protocols = record.environment, record.protocols.items()
    lines = [
        f"- Base model: {trained['num_parameters'] / 1e6:.1f}M parameters, "
        f"{trained['num_hidden_layers']} layers of width {trained['hidden_size']}, "
        f"{trained['vocab_size']:,} tokens in the vocabulary, weights "
        f"{record.dense.weights_sha256[:12]}.",
        f"- Trained on {', '.join(trained['text_files'])}: {trained['num_steps']:,} steps, "
        f"{trained['num_tokens_trained']:,} tokens ({passes:.2g} times the text), to a loss of "
        f"{trained['final_loss']:.3f}, in {trained['wall_s'] / 60:.3g} min, "
        f"{trained['precision']}, {_machine(trained['environment'])}.",
        *(
            f"- Text {name}: the dense model's perplexity is "
            f"{record.dense.quality[name].perplexity:.4g}; {about['num_tokens']:,} tokens in "
            f"windows of {about['window']}, stride {about['stride']}, {about['dtype']} on "
            f"{about['device']}, text {about['text_sha256'][:12]}."
            for name, about in protocols
        ),
        f"- Compared with {len(plan.seeds)} seeds: {_machine(here)}, commit {here['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def _machine(environment: dict[str, Any]) -> str:
    gpu = environment["gpu"]
    name = gpu["name"] if gpu else f"{environment['processor']} ({environment['num_cpus']} cores)"
    return f"{name}, torch {environment['versions']['torch']}"
