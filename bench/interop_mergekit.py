"""Whether mergekit makes of our YAML what `trsp compact` makes: every tensor, and config.json.

    python -m trsp.bench.interop_mergekit --python MERGEKIT_ENV/bin/python --out mergekit.json

mergekit has an environment of its own (`pip install mergekit` beside a CPU torch); pico models with
random weights are made on the spot. Exit 1 where a tensor differs. mergekit changes the layer count
and no list with an entry for each layer (`layer_types`): where that stops it, the record says so.
It writes its tensors before config.json, so they are compared all the same.
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

NUM_LAYERS = 6
KEPT = (0, 2, 3, 5)
VOCAB_SIZE = 40
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Configuration class, dtype and settings of each pico model.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "bfloat16", {}),
    "llama tied": ("LlamaConfig", "float32", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "float16", {"sliding_window": 4}),
    "qwen2": ("Qwen2Config", "bfloat16", {}),
    "qwen2 tied": ("Qwen2Config", "bfloat16", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "bfloat16", {}),
    "gemma2": ("Gemma2Config", "bfloat16", {"sliding_window": 4}),
    "phi3": ("Phi3Config", "bfloat16", {}),
}


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
        (dotted) the two values, None where it is not there.
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
    configs = [_read_config(folder) for folder in (ours, theirs)]
    return {
        "num_tensors": len(here),
        "only_ours": sorted(here.keys() - there.keys()),
        "only_theirs": sorted(there.keys() - here.keys()),
        "different": sorted(name for name in here.keys() & there if here[name] != there[name]),
        "config": {
            field: {"trsp": configs[0].get(field), "mergekit": configs[1].get(field)}
            for field in sorted(configs[0].keys() | configs[1].keys())
            if configs[0].get(field) != configs[1].get(field)
        },
    }


def same_tensors(comparison: Mapping[str, Any]) -> bool:
    """Whether a comparison found the same tensors on both sides."""
    return comparison["num_tensors"] > 0 and not any(
        comparison[kind] for kind in ("only_ours", "only_theirs", "different")
    )


def run_comparison(
    python: Path, *, cases: tuple[str, ...] = tuple(CASES), tell: Callable[[str], None] = print
) -> dict[str, Any]:
    """Make each pico model, cut it by mergekit and by trsp, and compare.

    Returns:
        the record: versions of mergekit's environment, `cases` by name, and `failed`, those whose
        tensors differ.
    Raises:
        UserError: no mergekit in the environment of `python`.   RunError: mergekit fails.
    """
    record: dict[str, Any] = {
        "kind": "mergekit",
        "mergekit": mergekit_versions(python),
        "kept": list(KEPT),
        "cases": {},
    }
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            comparison = _compare_case(name, python, Path(folder))
        record["cases"][name] = comparison
        verdict = "same" if same_tensors(comparison) else "DIFFERENT"
        fields = ", ".join(comparison["config"]) or "none"
        config = comparison["mergekit_error"] or f"config fields that differ: {fields}"
        tell(f"{name}: {comparison['num_tensors']} tensors {verdict}; {config}")
    record["failed"] = [name for name, case in record["cases"].items() if not same_tensors(case)]
    return record


def _compare_case(name: str, python: Path, folder: Path) -> dict[str, Any]:
    from trsp.pruner.checkpoint import load_model, open_checkpoint
    from trsp.pruner.compaction import compact
    from trsp.pruner.layer_lists import to_mergekit_slices
    from trsp.pruner.layer_map import BaseModel, LayerMap

    dense = folder / "dense"
    make_pico_model(name, dense)
    checkpoint = open_checkpoint(dense)
    base = BaseModel(str(dense), checkpoint.num_hidden_layers, checkpoint.fingerprint)
    layer_map = LayerMap.from_keep(base, KEPT)
    compact(checkpoint, layer_map, folder / "trsp")
    load_model(open_checkpoint(folder / "trsp"))
    slices = folder / "slices.yaml"
    slices.write_text(to_mergekit_slices(layer_map), "utf-8")
    error = _try_mergekit(python, slices, folder / "mergekit")
    comparison = compare_checkpoints(folder / "trsp", folder / "mergekit")
    return comparison | {"mergekit_error": error}


def _try_mergekit(python: Path, slices: Path, out: Path) -> str | None:
    """Why mergekit fails or transformers does not load what it wrote; None where all is well."""
    from trsp.pruner.checkpoint import load_model, open_checkpoint

    try:
        run_mergekit(python, slices, out)
        load_model(open_checkpoint(out))
    except (RunError, UserError) as error:
        return str(error).replace(str(out.parent), "")
    return None


def make_pico_model(name: str, folder: Path) -> None:
    """Write the pico model `name` of CASES with random weights and a tokenizer to `folder`."""
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    config_class, dtype, settings = CASES[name]
    config = getattr(transformers, config_class)(**(_SIZES | settings))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, VOCAB_SIZE)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w3",
    ).save_pretrained(folder)  # fmt: skip


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json by dotted field; empty where a tool stopped before it wrote one."""
    path = folder / "config.json"
    return _flat(json.loads(path.read_text("utf-8"))) if path.exists() else {}


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
