"""The layer map: what it says survives the file, and nothing unsound becomes one."""

import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trsp.pruner.errors import UserError
from trsp.pruner.layer_lists import (
    import_drop_list,
    import_keep_list,
    parse_layer_list,
    to_llama_cpp,
    to_mergekit_slices,
)
from trsp.pruner.layer_map import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_LAYERS,
    BaseModel,
    ConfigChange,
    LayerEntry,
    LayerMap,
    LayerMapError,
    read_layer_map,
    write_layer_map,
)

BASE = BaseModel("org/model", 8, "ab" * 32)

# Text that UTF-8 can hold; JSON's other values, numbers as exact as they come.
texts = st.text(st.characters(codec="utf-8"), max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64) + 1, 2**64 - 1) | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(texts, json_values, max_size=3)


@st.composite
def layer_maps(draw: st.DrawFn) -> LayerMap:
    num_layers = draw(st.integers(1, 24))
    order = draw(st.permutations(range(num_layers)))
    num_removals = draw(st.integers(0, num_layers - 1))
    gates = st.lists(st.none() | finite, min_size=num_layers, max_size=num_layers)
    name = draw(texts.filter(lambda text: bool(text.strip())))
    return LayerMap.from_removal_order(
        BaseModel(name, num_layers, "f" * 64),
        order[:num_removals],
        gates=draw(st.none() | gates),
        config_changes=draw(
            st.lists(
                st.builds(ConfigChange, texts.filter(bool), json_values, json_values), max_size=2
            )
        ),
        method=draw(json_objects),
        calibration=draw(st.none() | json_objects),
        steps=draw(st.lists(json_objects, max_size=num_removals)),
    )


def example() -> LayerMap:
    return LayerMap.from_removal_order(
        BASE,
        [5, 2],
        gates=[1.0, 0.5, 0.1, 0.9, 0.1 + 0.2, 0.0, 1e-300, -0.0],
        config_changes=[ConfigChange("num_hidden_layers", 8, 6)],
        method={"name": "gates", "seed": 3},
        calibration={"num_tokens": 4096},
        steps=[{"pick": 5, "loss": 2.5}, {"pick": 2, "loss": 2.75}],
    )


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(example().to_json()), **fields})


def test_a_removal_order_says_it_all() -> None:
    layer_map = example()
    assert layer_map.kept == (0, 1, 3, 4, 6, 7)
    assert layer_map.dropped == (2, 5)
    assert layer_map.removal_order == (5, 2)
    assert layer_map.layers[2] == LayerEntry(2, 3, 0.9)
    assert [entry.layer for entry in layer_map.layers] == list(range(6))
    assert [entry.source_layer for entry in layer_map.layers] == [0, 1, 3, 4, 6, 7]


def test_keep_is_a_set_and_removal_ascends() -> None:
    layer_map = LayerMap.from_keep(BASE, [7, 0, 3], method={"name": "given"})
    assert layer_map.kept == (0, 3, 7)
    assert layer_map.removal_order == layer_map.dropped == (1, 2, 4, 5, 6)
    assert layer_map.method == {"name": "given"}
    assert all(entry.gate is None for entry in layer_map.layers)


def test_drop_keeps_the_order_given() -> None:
    layer_map = LayerMap.from_drop(BASE, (6, 1), gates=[0.5] * 8)
    assert layer_map.removal_order == (6, 1)
    assert layer_map == LayerMap.from_removal_order(BASE, [6, 1], gates=[0.5] * 8)


def test_numpy_numbers_become_plain_ones() -> None:
    order = numpy.array([5, 2])
    layer_map = LayerMap.from_removal_order(
        BASE, order, gates=list(numpy.linspace(0, 1, 8)), method={"loss": numpy.float64(0.5)}
    )
    assert {type(layer) for layer in layer_map.removal_order + layer_map.kept} == {int}
    assert {type(entry.gate) for entry in layer_map.layers} == {float}
    assert LayerMap.from_json(layer_map.to_json()) == layer_map


@settings(max_examples=100, deadline=None)
@given(layer_map=layer_maps())
def test_json_gives_back_an_equal_map(layer_map: LayerMap) -> None:
    text = layer_map.to_json()
    again = LayerMap.from_json(text)
    assert again == layer_map
    assert again.to_json() == text
    # Equal is not enough for numbers: 1 == 1.0 == True, 0.0 == -0.0.
    assert repr(again) == repr(layer_map)


@settings(max_examples=60, deadline=None)
@given(layer_map=layer_maps())
def test_every_prefix_is_a_map(layer_map: LayerMap) -> None:
    gates = {entry.source_layer: entry.gate for entry in layer_map.layers}
    for count in range(len(layer_map.removal_order) + 1):
        prefix = layer_map.prefix(count)
        assert prefix.removal_order == layer_map.removal_order[:count]
        assert set(layer_map.kept) <= set(prefix.kept)
        assert LayerMap.from_json(prefix.to_json()) == prefix
        for entry in prefix.layers:
            assert entry.gate == gates.get(entry.source_layer)
        if count < len(layer_map.removal_order):
            assert prefix.config_changes == ()
    assert layer_map.prefix(0).kept == tuple(range(layer_map.base_model.num_hidden_layers))
    assert layer_map.prefix(len(layer_map.removal_order)) == layer_map


def test_prefix_keeps_the_steps_of_its_removals() -> None:
    assert example().prefix(1).steps == ({"pick": 5, "loss": 2.5},)
    assert example().prefix(0).steps == ()


def test_prefix_keeps_the_one_record_of_one_decision() -> None:
    layer_map = LayerMap.from_removal_order(BASE, [5, 2, 1], steps=[{"scores": [0.5]}])
    assert layer_map.prefix(1).steps == layer_map.prefix(0).steps == ({"scores": [0.5]},)


@pytest.mark.parametrize("count", [-1, 3, True, 1.0, None])
def test_prefix_of_no_such_length(count: Any) -> None:
    with pytest.raises(LayerMapError, match="removals"):
        example().prefix(count)


def test_base_model_is_exchanged() -> None:
    after_transfer = BaseModel("org/model", 8, "cd" * 32)
    layer_map = example().with_base_model(after_transfer)
    assert layer_map.base_model == after_transfer
    assert layer_map == replace(example(), base_model=after_transfer)
    with pytest.raises(LayerMapError, match="for 8 layers, 'other' has 9"):
        example().with_base_model(BaseModel("other", 9, "f"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kept": [0, 1, 3, 4, 6]}, "layer 7 is neither kept nor dropped"),
        ({"kept": [0, 1, 2, 3, 4, 6, 7]}, "layer 2 is both kept and dropped"),
        ({"kept": [1, 0, 3, 4, 6, 7]}, "kept must ascend: 0 follows 1"),
        ({"kept": [0, 1, 3, 4, 6, 7, 7]}, "kept names layer 7 twice"),
        ({"kept": [0, 1, 3, 4, 6, 8]}, "kept names layer 8, but layers are 0 to 7"),
        ({"kept": [-1, 1, 3, 4, 6, 7]}, "kept names layer -1"),
        ({"kept": [0.0, 1, 3, 4, 6, 7]}, r"kept\[0\] is 0.0, expected an integer"),
        ({"kept": [False, 1, 3, 4, 6, 7]}, r"kept\[0\] is False"),
        ({"kept": "013467"}, "kept is '013467', expected a list"),
        ({"kept": {"0": 0}}, r"kept\[0\] is '0'"),
        ({"kept": None}, "kept is None"),
        ({"kept": [], "dropped": list(range(8))}, "every layer is dropped"),
        ({"dropped": [5, 2]}, "dropped must ascend: 2 follows 5"),
        ({"removal_order": [5]}, "removal_order lacks layer 2, which is dropped"),
        ({"removal_order": [5, 2, 0]}, "removal_order names layer 0, which is kept"),
        ({"removal_order": [5, 5]}, "removal_order names layer 5 twice"),
        ({"layers": []}, "layers has 0 entries, kept 6"),
        ({"layers": 7}, "layers is 7, expected a list of records"),
        ({"layers": [7]}, r"layers\[0\] is 7, expected a dict"),
        ({"layers": [{"layer": 0}]}, r"layers\[0\]: the field 'gate' is missing"),
        (
            {"layers": [{"layer": 0, "source_layer": 0, "gate": "1"}]},
            r"layers\[0\]: gate is '1', expected a finite number or null",
        ),
        ({"config_changes": [{"field": "", "before": 1, "after": 2}]}, "expected a name"),
        ({"config_changes": [{"field": 3, "before": 1, "after": 2}]}, r"changes\[0\].*field is 3"),
        ({"method": []}, r"method is \[\], expected an object"),
        ({"calibration": "text"}, "calibration is 'text'"),
        ({"steps": [1]}, r"steps\[0\] is 1"),
        ({"steps": {}}, "steps is {}"),
        ({"base_model": None}, "base_model is None, expected an object"),
        ({"base_model": {"name": "x"}}, "base_model: the field 'fingerprint' is missing"),
        ({"surprise": 1}, "the field 'surprise' is unknown"),
        (
            {"schema_version": 3, "kept": None},
            "schema_version is 3, this trsp reads 1 and 2",
        ),
        ({"schema_version": True}, "schema_version is True"),
        ({"schema_version": "1"}, "schema_version is '1'"),
    ],
    ids=str,
)
def test_unsound_map_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerMapError, match=message) as caught:
        LayerMap.from_json(changed(**fields))
    assert "\n" not in str(caught.value)


def test_layer_from_elsewhere_is_refused() -> None:
    document = json.loads(example().to_json())
    document["layers"][2]["source_layer"] = 2
    with pytest.raises(LayerMapError, match=r"layers\[2\] is layer 2 from source_layer 2, expect"):
        LayerMap.from_json(json.dumps(document))


@pytest.mark.parametrize("missing", sorted(json.loads(example().to_json())))
def test_missing_field_is_named(missing: str) -> None:
    document = json.loads(example().to_json())
    del document[missing]
    message = "schema_version is None" if missing == "schema_version" else f"'{missing}' is missing"
    with pytest.raises(LayerMapError, match=message):
        LayerMap.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("base_model", "message"),
    [
        ({"name": " "}, "base_model.name is ' ', expected text"),
        ({"name": 3}, "base_model.name is 3"),
        ({"fingerprint": ""}, "base_model.fingerprint is ''"),
        ({"fingerprint": None}, "base_model.fingerprint is None"),
        ({"num_hidden_layers": 0}, f"num_hidden_layers is 0, not 1 to {MAX_LAYERS}"),
        ({"num_hidden_layers": MAX_LAYERS + 1}, "num_hidden_layers is 65537"),
        ({"num_hidden_layers": 8.0}, "num_hidden_layers is 8.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"weights_sha256": ""}, "weights_sha256 is '', expected 64 hex digits or null"),
        ({"weights_sha256": "AB" * 32}, "weights_sha256 is 'ABAB"),
        ({"weights_sha256": 3}, "weights_sha256 is 3"),
    ],
    ids=str,
)
def test_base_model_is_checked(base_model: dict[str, Any], message: str) -> None:
    fields = {"name": "m", "num_hidden_layers": 8, "fingerprint": "f", **base_model}
    with pytest.raises(LayerMapError, match=message):
        BaseModel(**fields)


def test_the_weights_of_the_base_model_are_optional() -> None:
    """Layer maps from before they were recorded are read, and an older trsp reads ours."""
    without = example()
    assert "weights_sha256" not in json.loads(without.to_json())["base_model"]
    assert LayerMap.from_json(without.to_json()).base_model.weights_sha256 is None
    null = json.loads(without.to_json())
    null["base_model"]["weights_sha256"] = None
    assert LayerMap.from_json(json.dumps(null)) == without
    known = without.with_base_model(replace(BASE, weights_sha256="cd" * 32))
    assert json.loads(known.to_json())["base_model"]["weights_sha256"] == "cd" * 32
    assert LayerMap.from_json(known.to_json()) == known
    assert known.prefix(1).base_model.weights_sha256 == "cd" * 32
    assert known != without


@pytest.mark.parametrize("gate", [float("nan"), float("inf"), True, "0.5"])
def test_gate_that_is_no_number(gate: Any) -> None:
    with pytest.raises(LayerMapError, match="gate is"):
        LayerEntry(0, 0, gate)


def test_gates_are_one_for_each_layer() -> None:
    with pytest.raises(LayerMapError, match="7 gates for 8 layers"):
        LayerMap.from_removal_order(BASE, [1], gates=[1.0] * 7)


@pytest.mark.parametrize("make", [LayerMap.from_keep, LayerMap.from_removal_order])
def test_impossible_choice_is_refused(make: Any) -> None:
    for layers in ([1, 1], [8], [-1], [True], ["1"], [1.0]):
        with pytest.raises(LayerMapError, match=r"layer|\[0\]"):
            make(BASE, layers)
    everything = range(8) if make == LayerMap.from_removal_order else []
    with pytest.raises(LayerMapError, match="every layer is dropped"):
        make(BASE, everything)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "method.x: holds nan, which JSON cannot"),
        (float("-inf"), "method.x: holds -inf"),
        (2**64, "method.x: holds an integer beyond 64 bits"),
        ("\ud800", "half a surrogate pair"),
        ({1: 2}, "method.x: has the key 1, expected text"),
        ({"\udfff": 2}, "half a surrogate pair"),
        ({"two\nlines": float("nan")}, r"method.x.'two\\nlines': holds nan"),
        (b"bytes", "method.x: holds bytes, which is not JSON"),
        ([0, {"y": {1}}], r"method.x\[1\].y: holds set"),
    ],
    ids=repr,
)
def test_what_json_cannot_hold_is_refused(value: Any, message: str) -> None:
    with pytest.raises(LayerMapError, match=message):
        LayerMap.from_removal_order(BASE, [1], method={"x": value})


def test_depth_is_bounded_alike_when_made_and_when_read() -> None:
    value: Any = 0
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    layer_map = LayerMap.from_removal_order(BASE, [1, 2], steps=[{"x": value}] * 2)
    assert LayerMap.from_json(layer_map.to_json()) == layer_map
    with pytest.raises(LayerMapError, match=r"nested more than 32 deep"):
        LayerMap.from_removal_order(BASE, [1], steps=[{"x": [value]}])
    with pytest.raises(LayerMapError, match="nested"):
        LayerMap.from_json(changed(method={"x": [value]}))
    for hostile in ("[" * 10**6, '{"a":' * 10**6, changed()[:-1] + ',"x":' + "[" * 10**6):
        with pytest.raises(LayerMapError, match="nested too deep"):
            LayerMap.from_json(hostile)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "holds list, expected a JSON object"),
        ("3", "holds int"),
        ("{", "not JSON"),
        ('{"a": "\ud800"}', "not JSON"),
        ('{"schema_version": ' + "1" * 5000 + "}", "not JSON"),
        (example().to_json().replace('"steps"', '"method"'), "'method' is repeated"),
        (example().to_json().replace("2.75", "NaN"), r"steps\[1\].loss: holds nan"),
        (example().to_json().replace("2.75", "1e999"), r"steps\[1\].loss: holds inf"),
    ],
    ids=lambda value: value[:24],
)
def test_text_that_is_no_map_is_refused(text: str, message: str) -> None:
    with pytest.raises(LayerMapError, match=message):
        LayerMap.from_json(text)


def test_size_is_bounded_when_written_and_when_read(tmp_path: Path) -> None:
    path = tmp_path / "layer_map.json"
    path.write_text(" " * (MAX_BYTES + 1))
    with pytest.raises(LayerMapError, match=f"larger than {MAX_BYTES} bytes"):
        read_layer_map(path)
    with pytest.raises(LayerMapError, match=f"larger than {MAX_BYTES} bytes"):
        LayerMap.from_json(" " * (MAX_BYTES + 1))
    too_much = LayerMap.from_removal_order(BASE, [1], steps=[{"x": "y" * MAX_BYTES}])
    with pytest.raises(LayerMapError, match="record less in `steps`"):
        write_layer_map(too_much, path)
    assert path.read_text().isspace()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), replacement=json_values)
def test_corrupted_map_is_sound_or_refused(data: st.DataObject, replacement: Any) -> None:
    document = json.loads(data.draw(layer_maps()).to_json())
    at, key = document, data.draw(st.sampled_from(sorted(document)))
    while isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
        at = at[key]
        keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
    at[key] = replacement
    _sound_or_refused(json.dumps(document))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_text_is_sound_or_refused(data: st.DataObject) -> None:
    text = data.draw(layer_maps()).to_json()
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 20)))
    _sound_or_refused(text[:begin] + data.draw(st.text(max_size=4)) + text[end:])


def _sound_or_refused(text: str) -> None:
    refusal = ""
    try:
        layer_map = LayerMap.from_json(text)
    except LayerMapError as error:
        refusal = str(error)
    if refusal:
        assert refusal.isprintable()
        return
    num_layers = layer_map.base_model.num_hidden_layers
    assert sorted(layer_map.kept + layer_map.dropped) == list(range(num_layers))
    assert sorted(layer_map.removal_order) == list(layer_map.dropped)
    assert tuple(entry.source_layer for entry in layer_map.layers) == layer_map.kept
    assert LayerMap.from_json(layer_map.to_json()) == layer_map


def test_a_map_cannot_be_changed() -> None:
    method = {"name": "gates", "seeds": [1]}
    layer_map = LayerMap.from_removal_order(BASE, [1], method=method)
    method["seeds"].append(2)  # type: ignore[attr-defined]
    assert layer_map.method == {"name": "gates", "seeds": [1]}
    with pytest.raises(FrozenInstanceError):
        layer_map.kept = ()  # type: ignore[misc]


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "layer_map.json"
    write_layer_map(example(), path)
    assert read_layer_map(path) == example()
    write_layer_map(example().prefix(1), path)
    assert read_layer_map(path) == example().prefix(1)
    assert [file.name for file in tmp_path.iterdir()] == ["layer_map.json"]


def test_file_is_laid_out_for_readers() -> None:
    lines = example().to_json().splitlines()
    assert '  "kept": [0, 1, 3, 4, 6, 7],' in lines
    assert '    {"layer": 2, "source_layer": 3, "gate": 0.9},' in lines
    assert lines[1] == '  "schema_version": 1,'


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary, damaged = tmp_path / "binary.json", tmp_path / "damaged.json"
    binary.write_bytes(b"\xff\xfe")
    damaged.write_text(changed(kept=[0]))
    for path, message in (
        (tmp_path / "absent.json", "No such file"),
        (tmp_path, "directory"),
        (binary, "not UTF-8"),
        (damaged, "neither kept nor dropped"),
    ):
        with pytest.raises(LayerMapError, match=message) as caught:
            read_layer_map(path)
        assert str(path) in str(caught.value)
        assert isinstance(caught.value, UserError)


def test_reading_needs_the_standard_library_alone(tmp_path: Path) -> None:
    path = tmp_path / "layer_map.json"
    write_layer_map(example(), path)
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from trsp.pruner.layer_map import read_layer_map\n"
        f"read_layer_map({str(path)!r})\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "foreign = new - set(sys.stdlib_module_names) - {'trsp'}\n"
        "sys.exit(f'imported {foreign}' if foreign else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@given(layer_map=layer_maps())
@settings(max_examples=60, deadline=None)
def test_mergekit_slices_are_half_open_runs(layer_map: LayerMap) -> None:
    document = yaml.safe_load(to_mergekit_slices(layer_map))
    assert set(document) == {"slices", "merge_method"}
    assert document["merge_method"] == "passthrough"
    layers: list[int] = []
    ends: list[int] = []
    for piece in document["slices"]:
        (source,) = piece["sources"]
        name = source["model"]
        assert (name if isinstance(name, str) else name["model"]["path"]) == (
            layer_map.base_model.name
        )
        begin, end = source["layer_range"]
        assert begin not in ends, "adjacent runs are one"
        layers += range(begin, end)
        ends.append(end)
    assert tuple(layers) == layer_map.kept


def test_mergekit_text() -> None:
    assert to_mergekit_slices(example(), dtype="bfloat16") == (
        "slices:\n"
        "  - sources:\n"
        '      - model: "org/model"\n'
        "        layer_range: [0, 2]\n"
        "  - sources:\n"
        '      - model: "org/model"\n'
        "        layer_range: [3, 5]\n"
        "  - sources:\n"
        '      - model: "org/model"\n'
        "        layer_range: [6, 8]\n"
        "merge_method: passthrough\n"
        'dtype: "bfloat16"\n'
    )


@pytest.mark.parametrize("name", ["/models/a+b", "org/name@v1"])
def test_mergekit_does_not_split_the_name(name: str) -> None:
    document = yaml.safe_load(to_mergekit_slices(example(), model=name))
    assert document["slices"][0]["sources"][0]["model"] == {"model": {"path": name}}


def test_mergekit_name_that_yaml_would_fold_or_refuse() -> None:
    name = 'a "b" \\ \x85 \u2028 \u2029 \ufeff\x7f\uffff \U0001f600: #'
    document = yaml.safe_load(to_mergekit_slices(example(), model=name))
    assert document["slices"][0]["sources"][0]["model"] == name


def test_llama_cpp_list() -> None:
    assert to_llama_cpp(example()) == "2,5"
    with pytest.raises(LayerMapError, match="drops no layer"):
        to_llama_cpp(example().prefix(0))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-3,7", (0, 1, 2, 3, 7)),
        (" 12, 3 ,4-4", (12, 3, 4)),
        ("3\n7\n\n9\n", (3, 7, 9)),
        ("0-1,5\r\n7", (0, 1, 5, 7)),
        ("[3, 7, 9]", (3, 7, 9)),
        (" [5]\n", (5,)),
        ("007", (7,)),
    ],
)
def test_layer_list(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layer_list(text) == layers


@given(st.lists(st.integers(0, MAX_LAYERS - 1), min_size=1, max_size=30, unique=True))
def test_layer_list_in_every_writing(layers: list[int]) -> None:
    for text in (json.dumps(layers), ",".join(map(str, layers)), "\n".join(map(str, layers))):
        assert parse_layer_list(text) == tuple(layers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no layer"),
        (" \n", "names no layer"),
        ("[]", "names no layer"),
        ("0,,2", "'' is neither a layer nor a range"),
        ("0,", "'' is neither"),
        ("0-3,2", "names layer 2 twice"),
        ("[1, 1]", "names layer 1 twice"),
        ("-1", "'-1' is neither"),
        ("[-1]", "names layer -1, but"),
        ("3-1", "3-1 must ascend within 0 to 65535"),
        ("0-65536", "0-65536 must ascend"),
        ("0-999999999999", "is neither"),
        ("[65536]", "names layer 65536"),
        ("1.5", "'1.5' is neither"),
        ("[1.5]", "item 0 is 1.5"),
        ("[true]", "item 0 is True"),
        ('[1, "2"]', "item 1 is '2'"),
        ("[1", "not a JSON list"),
        ("[" * 10**6, "not a JSON list"),
        ("1 2", "'1 2' is neither"),
        ("0:3", "'0:3' is neither"),
        ("\u0663", "is neither"),
        ("kept: 3", "'kept: 3' is neither"),
    ],
    ids=lambda value: value[:16],
)
def test_layer_list_that_is_none(text: str, message: str) -> None:
    with pytest.raises(LayerMapError, match=re.escape(message)):
        parse_layer_list(text)


def test_lists_from_files(tmp_path: Path) -> None:
    path = tmp_path / "layers.txt"
    path.write_text("0-3,7")
    keep = import_keep_list(path, BASE)
    assert keep.kept == (0, 1, 2, 3, 7)
    assert keep.method == {"name": "keep list", "source": "layers.txt"}
    path.write_text("[6, 2]")
    drop = import_drop_list(path, BASE)
    assert drop.removal_order == (6, 2)
    assert drop.method == {"name": "drop list", "source": "layers.txt"}
    path.write_text("8")
    for make in (import_keep_list, import_drop_list):
        with pytest.raises(LayerMapError, match=r"layers\.txt: .* names layer 8"):
            make(path, BASE)
        with pytest.raises(LayerMapError, match=r"absent.*No such file"):
            make(tmp_path / "absent", BASE)


@given(layer_map=layer_maps())
@settings(max_examples=40, deadline=None)
def test_llama_cpp_list_is_read_back(layer_map: LayerMap) -> None:
    assume(layer_map.dropped)
    again = LayerMap.from_drop(layer_map.base_model, parse_layer_list(to_llama_cpp(layer_map)))
    assert again.kept == layer_map.kept
