"""Whether mergekit makes of our YAML what `trsp compact` makes: every tensor, config.json, logits.

    python -m trsp.bench.interop_mergekit --python MERGEKIT_ENV/bin/python --out mergekit.json

mergekit has an environment of its own (`pip install mergekit` beside a CPU torch); pico models with
random weights are made on the spot. Exit 1 where a tensor differs. It writes its tensors before
config.json, so they are compared whatever becomes of that. mergekit 0.1.5 changes the layer count
and no list with an entry for each layer: with `layer_types` it stops there (Qwen2, Qwen3, Gemma 2
and 3, Cohere 2). For a family that it has no definition of (OLMo 3, SmolLM3) it warns, ends well
and leaves the layer count too: transformers fills the layers that are missing with random weights.

GPT-NeoX is not among them: mergekit 0.1.5 wants buffers (`attention.bias`) that transformers 5 does
not save.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trsp.bench.record import write_record
from trsp.pruner.errors import RunError, UserError

KEPT = (0, 2, 3, 5, 7)
# Families of pico_families.py that mergekit knows, and a dtype for each.
CASES: dict[str, str] = {
    **{"llama": "bfloat16", "llama_tied": "float32", "mistral": "float16", "mixtral": "bfloat16"},
    **{"qwen2": "bfloat16", "qwen3": "bfloat16", "gemma2": "bfloat16", "gemma3_text": "bfloat16"},
    **{"phi3": "bfloat16", "olmo2": "bfloat16", "olmo3": "bfloat16", "granite": "bfloat16"},
    **{"starcoder2": "bfloat16", "cohere2": "bfloat16", "smollm3": "bfloat16", "glm4": "bfloat16"},
    **{"gpt2": "float32"},
}
# Written by whoever saves, whatever the model.
_SAVED_BY = {"transformers_version"}


def run_mergekit(python: Path, slices: Path, out: Path) -> None:
    """Run mergekit-yaml on the file `slices`, in the environment of `python`, offline.

    Raises:
        RunError: it fails; with the last line it said.
    """
    command = [str(python.absolute()), "-m", "mergekit.scripts.run_yaml", str(slices), str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Else our own packages would be found from there.
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*command, "--quiet", "--no-write-model-card"],
        capture_output=True, text=True, env=environment, cwd=slices.parent, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        last = lines[-1].strip() if lines else "it said nothing"
        raise RunError(f"mergekit failed with exit status {done.returncode}: {last}")


def mergekit_versions(python: Path) -> dict[str, str]:
    """Versions of mergekit, torch and transformers in the environment of `python`.

    Raises:
        UserError: `python` cannot be run or has no mergekit.
    """
    code = (
        "import json, importlib.metadata as m\n"
        "print(json.dumps({n: m.version(n) for n in ('mergekit', 'torch', 'transformers')}))"
    )
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"--python {python}: has no mergekit; make an environment for it: python3 -m venv ENV, "
            "ENV/bin/pip install torch==2.13.0, ENV/bin/pip install mergekit"
        ) from error
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def compare_checkpoints(ours: Path, theirs: Path) -> dict[str, Any]:
    """Compare two checkpoint folders: tensors by name, dtype, shape and bytes; config by field.

    Returns:
        num_tensors, the names `only_ours`, `only_theirs` and `different`, and `config`: by field
        (dotted) the two values, None where it is not there; empty where theirs has no config.json.
    """
    from trsp.pruner.checkpoint import contained_file
    from trsp.pruner.safetensors_header import read_header

    found = []
    for folder in (ours, theirs):
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            data = contained_file(folder, path.name).read_bytes()
            for entry in read_header(path, path.name)[1]:
                tensors[entry.name] = (entry.dtype, entry.shape, data[entry.begin : entry.end])
        found.append(tensors)
    here, there = found
    comparison: dict[str, Any] = {
        "num_tensors": len(here),
        "only_ours": sorted(here.keys() - there.keys()),
        "only_theirs": sorted(there.keys() - here.keys()),
        "different": sorted(name for name in here.keys() & there if here[name] != there[name]),
        "config": {},
    }
    if (theirs / "config.json").exists():
        configs = [
            _flat(json.loads((folder / "config.json").read_text("utf-8")))
            for folder in (ours, theirs)
        ]
        comparison["config"] = {
            field: {"trsp": configs[0].get(field), "mergekit": configs[1].get(field)}
            for field in sorted((configs[0].keys() | configs[1].keys()) - _SAVED_BY)
            if configs[0].get(field) != configs[1].get(field)
        }
    return comparison


def same_tensors(comparison: Mapping[str, Any]) -> bool:
    """Whether a comparison found the same tensors on both sides."""
    return comparison["num_tensors"] > 0 and not any(
        comparison[kind] for kind in ("only_ours", "only_theirs", "different")
    )


def same_weights(case: Mapping[str, Any]) -> bool:
    """Whether the tensors are the same, or have other names and give the same logits.

    mergekit writes the experts of a layer as one tensor, as transformers 5 has them in memory.
    """
    renamed = not case["different"] and case["only_ours"] and case["only_theirs"]
    return same_tensors(case) or bool(renamed and case["max_logit_difference"] == 0)


def run_comparison(
    python: Path, *, cases: tuple[str, ...] = tuple(CASES), tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Make each pico model, cut it by mergekit and by trsp, and compare.

    Returns:
        the record: versions of mergekit's environment, `cases` by name, `failed`, those whose
        weights differ, and `unusable`, those of mergekit's that are no model or another one.
    Raises:
        UserError: no mergekit in the environment of `python`.
    """
    record: dict[str, Any] = {
        "kind": "mergekit",
        "mergekit": mergekit_versions(python),
        "kept": list(KEPT),
        "cases": {},
    }
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            case = record["cases"][name] = _compare_case(name, python, Path(folder))
        tell(describe(name, case))
    cases_by_name = record["cases"].items()
    record["failed"] = [name for name, case in cases_by_name if not same_weights(case)]
    record["unusable"] = [name for name, case in cases_by_name if case["max_logit_difference"] != 0]
    return record


def describe(name: str, case: Mapping[str, Any]) -> str:
    """One line on one case."""
    verdict = "same" if same_tensors(case) else "renamed" if same_weights(case) else "DIFFERENT"
    line = f"{name}: {case['num_tensors']} tensors {verdict}; "
    if case["mergekit_error"] or case["load_error"]:
        return line + str(case["mergekit_error"] or f"does not load: {case['load_error']}")
    fields = ", ".join(case["config"]) or "none"
    return (
        line + f"logits differ by {case['max_logit_difference']:.3g}; config differs in: {fields}"
    )


def _compare_case(name: str, python: Path, folder: Path) -> dict[str, Any]:
    from trsp.pruner.checkpoint import open_checkpoint
    from trsp.pruner.compaction import compact
    from trsp.pruner.layer_lists import to_mergekit_slices
    from trsp.pruner.layer_map import BaseModel, LayerMap

    dense, ours, theirs = (folder / name for name in ("dense", "trsp", "mergekit"))
    make_pico_model(name, dense)
    checkpoint = open_checkpoint(dense)
    base = BaseModel(str(dense), checkpoint.num_hidden_layers, checkpoint.fingerprint)
    layer_map = LayerMap.from_keep(base, KEPT)
    compact(checkpoint, layer_map, ours)
    slices = folder / "slices.yaml"
    slices.write_text(to_mergekit_slices(layer_map), "utf-8")
    case: dict[str, Any] = dict.fromkeys(("mergekit_error", "load_error", "max_logit_difference"))
    try:
        run_mergekit(python, slices, theirs)
    except RunError as error:
        case["mergekit_error"] = str(error).replace(str(folder), "")
    else:
        reference = _logits(ours)
        try:
            difference = (_logits(theirs) - reference).abs().max().item()
        # Whatever transformers raises for a config that does not fit is the finding.
        except Exception as error:
            case["load_error"] = " ".join(str(error).replace(str(folder), "").split())
        else:
            case["max_logit_difference"] = difference
    return compare_checkpoints(ours, theirs) | case


def _logits(folder: Path) -> Any:
    """Logits of a checkpoint, as transformers loads it by itself, for 24 tokens; fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float().eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(24)[None] * 11 % 256 + 3, use_cache=False).logits


def make_pico_model(name: str, folder: Path) -> None:
    """Write the pico model `name` of CASES with random weights and a tokenizer to `folder`."""
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from trsp.bench.pico_families import PICO_CONFIGS, VOCAB_SIZE

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(PICO_CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.to(getattr(torch, CASES[name])).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, VOCAB_SIZE)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w3",
    ).save_pretrained(folder)  # fmt: skip


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def main(arguments: list[str] | None = None) -> int:
    """Entry point: run, show, write the record; 1 where a tensor differs."""
    parser = argparse.ArgumentParser(description="trsp compact beside mergekit, tensor by tensor")
    parser.add_argument("--python", type=Path, required=True, help="of mergekit's environment")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="repeatable; all")
    parser.add_argument("--out", type=Path, help="record to write")
    options = parser.parse_args(arguments)
    try:
        record = run_comparison(options.python, cases=tuple(options.case or CASES))
        if options.out is not None:
            write_record(options.out, record)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 1 if record["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
