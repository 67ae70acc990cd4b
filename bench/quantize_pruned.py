"""Quantize a pruned checkpoint with llm-compressor, without data, and say what that cost.

    python -m trsp.bench.quantize_pruned PRUNED --out QUANTIZED --python ENV/bin/python \\
        --scheme FP8_DYNAMIC --data heldout.txt --record quantize.json

llm-compressor has an environment of its own: `pip install llmcompressor` beside a CPU torch. Its
releases fix the transformers they work with, which may be older than ours. The result is loaded
where it was made, by transformers and compressed-tensors, and compared with the input there:
perplexity of both on the same windows, divergence, and the largest difference of logits. With
`--vllm-python ENV/bin/python`, vLLM generates from both, greedily, and scores the beginnings of the
windows; exit 1 where it does not load the quantized one, and the record has the reason.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trsp.bench.record import write_record
from trsp.pruner.durable import publish_folder, refuse_existing
from trsp.pruner.errors import RunError, UserError

SCHEMES = ("FP8_DYNAMIC", "W8A8")
PROGRAMS = Path(__file__).parent
_PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")
_VLLM_VARIABLES = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def run_quantization(
    pruned: Path,
    out: Path,
    python: Path,
    *,
    scheme: str,
    data: Path,
    window: int = 256,
    max_tokens: int = 20000,
    vllm_python: Path | None = None,
) -> dict[str, Any]:
    """Quantize `pruned` to the folder `out`, load it and compare it with `pruned`.

    Args:
        python: of the environment with llm-compressor.   vllm_python: of one with vLLM.
        scheme: of SCHEMES.   data: held-out text.   window, max_tokens: tokens.
    Returns:
        the record: versions, sizes in bytes, `comparison`, and `vllm` where it was asked for, with
        `error` where it serves `pruned` and not `out`.
    Raises:
        UserError: `out` exists, the scheme is unknown, or an environment lacks what it needs.
        RunError: a program fails; with the last lines it said.
    """
    if scheme not in SCHEMES:
        raise UserError(f"--scheme {scheme!r} is unknown; choose from {', '.join(SCHEMES)}")
    if window < 2 or max_tokens < window:
        raise UserError(
            f"--window and --max-tokens are {window} and {max_tokens}, expected at least 2 tokens "
            "a window and a window of tokens"
        )
    refuse_existing(out)
    versions = package_versions(python, _PACKAGES)
    record: dict[str, Any] = {
        "kind": "quantize",
        "scheme": scheme,
        "pruned": pruned.name,
        "versions": versions,
        "protocol": {"window": window, "max_tokens": max_tokens, "data": data.name},
    }
    with tempfile.TemporaryDirectory() as folder:
        windows = Path(folder) / "windows.json"
        windows.write_text(json.dumps(cut_token_windows(pruned, data, window, max_tokens)))
        program = PROGRAMS / "quantize_program.py"
        with publish_folder(out) as made:
            run_program(python, program, "quantize", pruned, made, scheme)
        record["comparison"] = run_program(python, program, "compare", pruned, out, windows)
        record["bytes"] = {"before": _weight_bytes(pruned), "after": _weight_bytes(out)}
        if vllm_python is not None:
            record["vllm"] = _serve_both(vllm_python, program, pruned, out, windows)
    return record


def _serve_both(
    python: Path, program: Path, pruned: Path, out: Path, windows: Path
) -> dict[str, Any]:
    versions = package_versions(python, ("vllm", "vllm-cpu", "compressed-tensors", "transformers"))
    served: dict[str, Any] = {"versions": versions}
    served["before"] = run_program(python, program, "serve", pruned, windows)
    try:
        served["after"] = run_program(python, program, "serve", out, windows)
    except RunError as error:
        return served | {"error": str(error)}
    return served | {"same_tokens": share_of_same_tokens(served)}


def cut_token_windows(model: Path, data: Path, window: int, max_tokens: int) -> list[list[int]]:
    """Token windows of held-out text, [num_windows][window], by the model's own tokenizer."""
    from trsp.pruner.checkpoint import load_tokenizer, open_checkpoint
    from trsp.pruner.text_files import read_texts

    tokenizer = load_tokenizer(open_checkpoint(model))
    tokens: list[int] = []
    for document in read_texts([data]):
        tokens += tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        if len(tokens) >= max_tokens:
            break
    tokens = tokens[: min(len(tokens), max_tokens) // window * window]
    if not tokens:
        raise UserError(f"{data}: has fewer than {window} tokens; give more text")
    return [tokens[begin : begin + window] for begin in range(0, len(tokens), window)]


def package_versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of `packages` that the environment of `python` has.

    Raises:
        UserError: `python` cannot be run, or has none of them.
    """
    code = (
        "import json, sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        found[name] = version(name)\n"
        "    except PackageNotFoundError:\n        pass\n"
        "print(json.dumps(found))"
    )
    try:
        done = subprocess.run(
            [str(python), "-c", code, *packages], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{python}: cannot be run: {error}") from error
    found: dict[str, str] = json.loads(done.stdout)
    if not found.keys() & set(packages[:2]):
        raise UserError(f"{python}: has no {packages[0]}; pip install {packages[0]} there")
    return found


def run_program(python: Path, program: Path, *arguments: str | Path) -> Any:
    """Run a program of this folder with another Python, offline; what it writes to its RESULT.

    Raises:
        UserError: `python` cannot be run.
        RunError: it fails or leaves no result; with what it said of the reason.
    """
    environment = os.environ | _VLLM_VARIABLES | {"HF_HUB_OFFLINE": "1"}
    # Else our own packages would be found from there.
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        try:
            done = subprocess.run(
                [str(python), "-P", str(program), str(result), *map(str, arguments)],
                capture_output=True, text=True, env=environment, check=False,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{python}: cannot be run: {error}") from error
        if done.returncode or not result.exists():
            raise RunError(
                f"{arguments[0]} failed, exit status {done.returncode}: "
                f"{reason_of(done.stdout + done.stderr)}"
            )
        return json.loads(result.read_text("utf-8"))


def reason_of(output: str) -> str:
    """What a failed program says of the reason: the errors it names, the first ones first."""
    # vLLM's engine is a process of its own: its error comes first, and that it died comes last.
    named = dict.fromkeys(re.findall(r"\b[A-Za-z_.]*(?:Error|Exception): .*", output))
    lines = list(named)[:3] or output.strip().splitlines()[-4:]
    return " / ".join(line.strip() for line in lines) or "it said nothing"


def share_of_same_tokens(served: dict[str, Any]) -> float:
    """The part of greedily generated tokens that vLLM says alike before and after."""
    same = [
        bool(ours == theirs)
        for one, other in zip(served["before"]["tokens"], served["after"]["tokens"], strict=True)
        for ours, theirs in zip(one, other, strict=True)
    ]
    return sum(same) / len(same)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def show(record: dict[str, Any]) -> None:
    """Print the record for people."""
    found, sizes = record["comparison"], record["bytes"]
    print(
        f"{record['scheme']}: perplexity {found['perplexity_before']:.4f} -> "
        f"{found['perplexity_after']:.4f}, divergence {found['divergence']:.2e} nats, logits "
        f"differ by {found['max_logit_difference']:.3f} of {found['max_logit']:.3f} at most"
    )
    print(
        f"{sizes['before']} -> {sizes['after']} bytes of weights; {found['num_quantized']} "
        f"quantized modules in {found['num_hidden_layers']} layers; loaded by transformers "
        f"{record['versions'].get('transformers')}"
    )
    if "vllm" in record:
        served = record["vllm"]
        print(
            f"vLLM does not serve it: {served['error']}"
            if "error" in served
            else f"vLLM serves both: perplexity {served['before']['perplexity']:.4f} -> "
            f"{served['after']['perplexity']:.4f}, {served['same_tokens']:.0%} of tokens same"
        )


def main(arguments: list[str] | None = None) -> int:
    """Entry point: quantize, compare, show, write the record."""
    parser = argparse.ArgumentParser(description="quantize a pruned checkpoint and compare")
    parser.add_argument("pruned", type=Path, help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--python", type=Path, required=True, help="with llm-compressor")
    parser.add_argument("--vllm-python", type=Path, help="with vLLM; else not served")
    parser.add_argument("--scheme", default="FP8_DYNAMIC", help=", ".join(SCHEMES))
    parser.add_argument("--data", type=Path, required=True, help="held-out text")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--max-tokens", type=int, default=20000, help="score at most so many")
    parser.add_argument("--record", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    try:
        record = run_quantization(
            options.pruned,
            options.out,
            options.python,
            scheme=options.scheme,
            data=options.data,
            window=options.window,
            max_tokens=options.max_tokens,
            vllm_python=options.vllm_python,
        )
        show(record)
        if options.record is not None:
            write_record(options.record, record)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return int("error" in record.get("vllm", {}))


if __name__ == "__main__":
    sys.exit(main())
