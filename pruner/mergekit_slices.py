"""The layers that a mergekit configuration keeps, where it is depth pruning and nothing else.

Its form was read in arcee-ai/mergekit, mergekit/config.py and plan.py; `layer_range: [a, b]` leaves
b out.
"""

from collections import Counter
from itertools import pairwise
from reprlib import repr as brief
from typing import Any

from trsp.pruner.layer_map import LayerMapError, integer

# A hand-written file has a few kB.
MAX_BYTES = 256 * 2**10
# A slices file nests six deep. PyYAML's time grows with the square of the depth: 34 s for 100,000.
MAX_DEPTH = 20

_NEUTRAL_SETTINGS = {"slices", "merge_method", "dtype", "out_dtype", "base_model", "name"}


def read_slices(text: str, num_layers: int) -> tuple[list[int], dict[str, Any]]:
    """The layers that a mergekit configuration keeps of one model, and what it says of the model.

    Returns:
        the layers, ascending; `model`, and `dtype` and `out_dtype` where they are set.
    Raises:
        LayerMapError: not a passthrough merge of slices of one model of `num_layers` layers; layers
            repeated or reordered; a setting that depth pruning does not have; hostile YAML.
    """
    document = _load_yaml(text)
    if not isinstance(document, dict):
        raise LayerMapError("is no YAML mapping, as a mergekit configuration is")
    if document.get("merge_method") != "passthrough":
        raise LayerMapError(
            f"merge_method is {brief(document.get('merge_method'))}; only passthrough slices of "
            "one model are depth pruning"
        )
    if other := sorted(map(str, set(document) - _NEUTRAL_SETTINGS)):
        raise LayerMapError(
            f"sets {other[0]!r}, which depth pruning does not have; make a pure slices file"
        )
    slices = document.get("slices")
    if not isinstance(slices, list) or not slices:
        raise LayerMapError(f"slices is {brief(slices)}, expected a list of slices")
    sources = [_source(piece, f"slices[{n}]") for n, piece in enumerate(slices)]
    models = {model for model, _, _ in sources}
    if document.get("base_model") is not None:
        models.add(_model_name(document["base_model"], "base_model"))
    if len(models) > 1:
        raise LayerMapError(f"takes layers from several models: {', '.join(sorted(models))}")
    for (_, begin, end), (_, next_begin, next_end) in pairwise(sources):
        if next_begin < end:
            what = "repeats layers of" if next_end > begin else "stands after"
            raise LayerMapError(
                f"slice [{next_begin}, {next_end}] {what} [{begin}, {end}]: layers are repeated or "
                "reordered, which is not depth pruning"
            )
    for _, begin, end in sources:
        if end > num_layers:
            raise LayerMapError(f"slice [{begin}, {end}] leaves the {num_layers} layers")
    said = {"model": models.pop()}
    # mergekit converts the weights to this type; compaction moves them as they are.
    for name in ("dtype", "out_dtype"):
        if document.get(name) is not None:
            said[name] = str(document[name])
    return [layer for _, begin, end in sources for layer in range(begin, end)], said


def _source(piece: Any, where: str) -> tuple[str, int, int]:
    """Model and layer range [begin, end) of an output slice."""
    if not isinstance(piece, dict) or set(piece) != {"sources"}:
        raise LayerMapError(f"{where} is {brief(piece)}, expected sources alone")
    sources = piece["sources"]
    if not isinstance(sources, list) or len(sources) != 1:
        raise LayerMapError(f"{where} merges {brief(sources)}, expected one source")
    match sources[0]:
        case {"model": model, "layer_range": [begin, end], **rest} if not rest:
            begin, end = (integer(value, f"{where}: layer_range") for value in (begin, end))
        case _:
            raise LayerMapError(
                f"{where} is {brief(sources[0])}, expected model and layer_range [begin, end] alone"
            )
    if not 0 <= begin < end:
        raise LayerMapError(f"{where}: layer_range [{begin}, {end}] holds no layer")
    return _model_name(model, where), begin, end


def _model_name(model: Any, where: str) -> str:
    """The name in mergekit's ModelReference: text, or a mapping {model: {path: text}}."""
    match model:
        case str(name) if "+" not in name:
            return name
        case {"model": str(name), **rest} if not rest:
            return name
        case {"model": {"path": str(name), **at}, **rest} if not rest and set(at) <= {"revision"}:
            return f"{name}@{at['revision']}" if at.get("revision") is not None else name
    raise LayerMapError(
        f"{where}: model {brief(model)} is not one model as it is; an adapter or another "
        "architecture must be merged in first"
    )


def _load_yaml(text: str) -> Any:
    import yaml

    if len(text) > MAX_BYTES:
        raise LayerMapError(f"is larger than {MAX_BYTES} bytes, not a list of slices")
    opening = (
        *(yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken),
        *(yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken),
    )
    closing = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
    depth = 0
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
                raise LayerMapError("YAML anchors and aliases are refused; write it out")
            depth += isinstance(token, opening)
            depth -= isinstance(token, closing)
            if depth > MAX_DEPTH:
                raise LayerMapError(f"nests deeper than {MAX_DEPTH}, not a list of slices")
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, LayerMapError):
            raise
        raise LayerMapError(f"is not YAML: {' '.join(str(error).split())[:200]}") from error


def _refuse_repeated_keys(node: Any) -> None:
    import yaml

    if isinstance(node, yaml.MappingNode):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, count in names.items():
            if count > 1:
                raise LayerMapError(f"the key {name!r} is repeated")
        for _, value in node.value:
            _refuse_repeated_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated_keys(value)
