"""Stands in for the Python of mergekit's environment: MODE, then what that Python is called with.

Moves the bytes of safetensors as mergekit does, with the fault that MODE names.
"""

import json
import sys
from pathlib import Path

import yaml

mode, *arguments = sys.argv[1:]
if arguments[0] == "-c":
    if mode == "absent":
        sys.exit("ModuleNotFoundError: mergekit")
    print(json.dumps({"mergekit": "0", "torch": "0", "transformers": "0"}))
    sys.exit()
slices, out = map(Path, arguments[2:4])
if mode == "nothing":
    sys.exit("RuntimeError: Tensor required but not present")
pieces = [piece["sources"][0] for piece in yaml.safe_load(slices.read_text("utf-8"))["slices"]]
layers = [layer for piece in pieces for layer in range(*piece["layer_range"])]
model = Path(pieces[0]["model"])
content = (model / "model.safetensors").read_bytes()
begin = 8 + int.from_bytes(content[:8], "little")
new_layers = {old: new for new, old in enumerate(layers)}
header, data = {}, b""
for name, entry in json.loads(content[8:begin]).items():
    parts = name.split(".")
    if name == "__metadata__" or (parts[1] == "layers" and int(parts[2]) not in new_layers):
        continue
    if parts[1] == "layers":
        parts[2] = str(new_layers[int(parts[2])])
    piece = content[begin + entry["data_offsets"][0] : begin + entry["data_offsets"][1]]
    if mode == "changed" and name == "model.norm.weight":
        piece = bytes([piece[0] ^ 1]) + piece[1:]
    header[".".join(parts)] = entry | {"data_offsets": [len(data), len(data) + len(piece)]}
    data += piece
head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
out.mkdir()
(out / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
if mode == "stops":
    sys.exit("Traceback\nValueError: `layer_types` (8)")
config = json.loads((model / "config.json").read_text("utf-8"))
if mode != "count":
    config["num_hidden_layers"] = len(layers)
(out / "config.json").write_text(json.dumps(config), "utf-8")
