"""The README.md of a pruned checkpoint: what was done to which model, and what it cost."""

from typing import Any

from trsp.pruner.auto_record import card_lines

# Perplexity over the dense model's, on the run's held-out text. Where a user should stop is their
# own application's question; these two lines only keep a bad model from passing for a good one.
MODERATE_RATIO = 1.10
HIGH_RATIO = 1.50


def verdict(evaluation: dict[str, Any]) -> str:
    """One sentence on whether the pruned model is usable as it is; always ends with a full stop."""
    ratio = evaluation["pruned"]["perplexity"] / evaluation["dense"]["perplexity"]
    measured = f"perplexity is {ratio:.2f} x the dense model's"
    if ratio <= MODERATE_RATIO:
        return f"{measured}: close; check your own tasks and rare inputs before deployment."
    if ratio <= HIGH_RATIO:
        return f"{measured}: a clear loss; try a lower ratio or more transfer steps."
    return f"{measured}: this ratio is too high without recovery training after deletion."


def deletion_words(transfer: dict[str, Any]) -> str:
    """What deletion changed on calibration text, from a transfer's record; no full stop.

    Where the layers were closed before, nothing was measured twice: deletion is then the identity.
    """
    dense, after = transfer["loss_dense"], transfer["loss_after_deletion"]
    left = max(transfer["residual_difference"].values())
    if left == 0.0:
        return (
            f"calibration loss {dense:.4f} nats dense, {after:.4f} without the layers; they were "
            "closed before the end of the training, so deletion changes nothing"
        )
    return (
        f"calibration loss {dense:.4f} nats dense, {transfer['loss_before_deletion']:.4f} before "
        f"deletion, {after:.4f} after ({transfer['jump_at_deletion']:+.4f}); the layers still "
        f"moved the stream by up to {left:.2g} of its norm"
    )


def model_card(report: dict[str, Any]) -> str:
    """Markdown for a finished run's report (pipeline.prune)."""
    before, after = (report["num_hidden_layers"][key] for key in ("before", "after"))
    lines = [
        f"# {after} of {before} layers, pruned by trsp {report['trsp_version']}",
        "",
        f"- Base model: `{report['model']}`",
        f"- Kept layers: {_listed(report['kept'])}",
        f"- Dropped layers, in order of removal: {_listed(report['removal_order'])}",
    ]
    if report["calibration"]:
        calibration = report["calibration"]
        lines.append(
            f"- Calibration: {calibration['num_sequences']} sequences of "
            f"{calibration['sequence_length']} tokens, sha256 `{calibration['sha256'][:16]}`"
        )
    transfer = report["transfer"]
    if transfer:
        lines.append(f"- Deletion: {deletion_words(transfer)}")
    if report["command"]:
        lines.append(f"- Command: `{report['command']}`")
    lines += ["", "Recipe: `recipe.yaml`. Layer map: `layer_map.json`. Checksums: `manifest.json`."]
    if report["evaluation"]:
        lines += ["", "## Quality", "", "| model | perplexity | tokens |", "|---|---|---|"]
        for label, result in report["evaluation"].items():
            tokens = result["protocol"]["num_tokens"]
            lines.append(f"| {label} | {result['perplexity']:.3f} | {tokens} |")
        lines += ["", report["verdict"][0].upper() + report["verdict"][1:]]
    if report["auto"]:
        lines += ["", *card_lines(report["auto"])]
    lines += ["", "## Proof", "", "| check | result | detail |", "|---|---|---|"]
    for check in report["proof"]["checks"]:
        detail = str(check["detail"]).replace("|", "\\|")
        lines.append(f"| {check['name']} | {check['status']} | {detail} |")
    return "\n".join(lines) + "\n"


def _listed(layers: list[int]) -> str:
    return ", ".join(str(layer) for layer in layers)
