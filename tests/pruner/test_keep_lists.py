"""Lists of other tools become the layer map that they mean, or are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trsp.pruner.keep_lists import MAX_BYTES, read_keep_list
from trsp.pruner.layer_lists import to_llama_cpp, to_mergekit_slices
from trsp.pruner.layer_map import BaseModel, LayerMap, LayerMapError

BASE = BaseModel("org/model", 8, "f" * 64)

# As PruneMe prints slices, with its blanks and its dtype.
PRUNEME_SLICES = """slices:
  - sources:
      - model: org/model
        layer_range: [0, 3]
  - sources:
      - model: org/model
        layer_range: [6,8]
            
merge_method: passthrough
dtype: bfloat16"""

# Eight layers, blocks of three: hidden states of layers i and i + 3, i from 0 to 4.
PRUNEME_CSV = "block_start,block_end,average_distance\r\n" + "".join(
    f"{start},{start + 3},{distance}\r\n"
    for start, distance in zip(range(1, 6), (0.4, 0.3, 0.1, 0.2, 0.5), strict=True)
)

SLEB_RESULT = """Time Elapsed: 12.5
Model Name: org/model
# Total Blocks: 8
# Remove Blocks: 3
Dataset: wikitext2
Seed: 0
Barriers: early 1 / latter 1
Block Removal Order: [5, 2, 6]
WikiText-2 PPL = 9.99

"""
SLEB_LOG = (
    "Loaded Model: org/model\nPhase 1 of 3\n[SELECTED block 5 (Originally block 5)] Loss=1.000\n"
    "Current Block Removal List: [5]\n" + SLEB_RESULT
)

EVOPRESS = "none\nnone\nattn+mlp\nnone\nnone\nattn+mlp\nattn+mlp\nnone\n"


def read(tmp_path: Path, text: str, base: BaseModel = BASE, **words: Any) -> LayerMap:
    path = tmp_path / "list"
    path.write_text(text, "utf-8")
    return read_keep_list(path, base, **words)


@pytest.mark.parametrize(
    ("form", "text", "order"),
    [
        ("mergekit", PRUNEME_SLICES, (3, 4, 5)),
        ("PruneMe", PRUNEME_CSV, (3, 4, 5)),
        ("SLEB", SLEB_RESULT, (5, 2, 6)),
        ("SLEB", SLEB_LOG, (5, 2, 6)),
        ("SLEB", SLEB_RESULT + SLEB_RESULT, (5, 2, 6)),
        ("EvoPress", EVOPRESS, (2, 5, 6)),
        ("EvoPress", EVOPRESS.replace("\n", "\r\n"), (2, 5, 6)),
    ],
)
def test_forms_that_tell_what_they_are(
    tmp_path: Path, form: str, text: str, order: tuple[int, ...]
) -> None:
    layer_map = read(tmp_path, text)
    assert layer_map.removal_order == order
    assert layer_map.method["name"] == f"{form} list"
    assert layer_map.method["source"] == "list"
    assert layer_map.base_model == BASE
    with pytest.raises(LayerMapError, match=rf"{form}'s.*leave out --list"):
        read(tmp_path, text, listed="drop")


def test_what_a_file_says_of_its_model_is_kept(tmp_path: Path) -> None:
    said = read(tmp_path, PRUNEME_SLICES).method
    assert (said["model"], said["dtype"]) == ("org/model", "bfloat16")
    assert read(tmp_path, PRUNEME_CSV).method["average_distance"] == 0.1


@pytest.mark.parametrize("text", ["5,2,6", "[5, 2, 6]", "5\n2\n6\n"])
def test_a_plain_list_says_keep_or_drop(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text, listed="drop").removal_order == (5, 2, 6)
    assert read(tmp_path, text, listed="keep").kept == (2, 5, 6)
    with pytest.raises(LayerMapError, match=r"list: .* say --list keep or --list drop"):
        read(tmp_path, text)


def test_pruneme_counts_as_its_code_does(tmp_path: Path) -> None:
    """hidden_states[1:], so row i is about layers i + 1 to i + n: checked with real layers.

    The third layer from the end does nothing; the block of one that is closest holds it alone.
    """
    num_layers, idle, n = 8, 5, 1
    states = [0.0]
    for layer in range(num_layers):
        states.append(states[-1] + (0 if layer == idle else 1))
    outputs = states[1:]
    distances = [abs(outputs[i + n] - outputs[i]) for i in range(num_layers - n)]
    text = "block_start,block_end,average_distance\n" + "".join(
        f"{i + 1},{i + 1 + n},{distance}\n" for i, distance in enumerate(distances)
    )
    assert read(tmp_path, text).dropped == (idle,)


@settings(max_examples=60, deadline=None)
@given(kept=st.sets(st.integers(0, 7), min_size=1))
def test_our_own_exports_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, kept: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("exports")
    layer_map = LayerMap.from_keep(BASE, sorted(kept))
    for model in ("org/model", "/models/a+b", "org/name@v1"):
        again = read(folder, to_mergekit_slices(layer_map, model=model, dtype="float16"))
        assert again.kept == layer_map.kept
        assert again.method["model"] == model
    if layer_map.dropped:
        assert read(folder, to_llama_cpp(layer_map), listed="drop").kept == layer_map.kept


def slices(*ranges: Any, model: Any = "m", **settings_: Any) -> str:
    sources = [{"sources": [{"model": model, "layer_range": list(r)}]} for r in ranges]
    return str(yaml.safe_dump({"slices": sources, "merge_method": "passthrough", **settings_}))


def one(**source: Any) -> str:
    whole = {"model": "m", "layer_range": [0, 4], **source}
    document = {"slices": [{"sources": [whole]}], "merge_method": "passthrough"}
    return str(yaml.safe_dump(document))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (slices((0, 4), (2, 6)), r"slice \[2, 6\] repeats layers of \[0, 4\].*not depth pruning"),
        (slices((0, 4), (0, 4)), "repeats layers"),
        (slices((4, 8), (0, 2)), r"slice \[0, 2\] stands after \[4, 8\].*reordered"),
        (slices((0, 9)), r"slice \[0, 9\] leaves the 8 layers"),
        (slices((3, 3)), r"slices\[0\]: layer_range \[3, 3\] holds no layer"),
        (slices((-1, 3)), "holds no layer"),
        (slices((0, 4), base_model="other"), "several models: m, other"),
        (slices((0, 4), parameters={"scale": 0.5}), "sets 'parameters'"),
        (slices((0, 4), tokenizer_source="union"), "sets 'tokenizer_source'"),
        (slices((0, 4), merge_method="linear"), "merge_method is 'linear'; only passthrough"),
        (slices((0, 4), model="m+lora"), "an adapter"),
        (slices((0, 4), model={"model": "m", "lora": "x"}), "an adapter"),
        (slices((0, 4), model=3), "model 3 is not one model"),
        (slices(), r"slices is \[\], expected a list"),
        (slices(("0", "4")), "layer_range is '0', expected an integer"),
        (slices((0, True)), "layer_range is True"),
        (one(parameters={"scale": 0.0}), r"slices\[0\] is .* alone"),
        (one(layer_range=[0]), r"expected model and layer_range \[begin, end\]"),
        ("models:\n  - model: a\nmerge_method: passthrough\n", "sets 'models'"),
        ("modules:\n  text: 3\nmerge_method: passthrough\n", "sets 'modules'"),
        ("slices: 3\nmerge_method: passthrough\n", "slices is 3"),
        ("slices: [1]\nmerge_method: passthrough\n", r"slices\[0\] is 1, expected sources alone"),
        ("slices: [\n", "is not YAML"),
        ("slices: &a [*a]\n", "anchors and aliases"),
        ("slices: []\nslices: []\nmerge_method: passthrough\n", "'slices' is repeated"),
        ("slices: !!python/object:os.system []\n", "is not YAML"),
        ("slices: " + "[" * 100_000, "nests deeper than 20"),
        ("slices: " + "{a: " * 50_000, "nests deeper than 20"),
        ("slices:\n" + "- " * 100_000, "nests deeper than 20"),
        ("slices: " + " " * 300_000, "larger than 262144 bytes"),
    ],
    ids=lambda value: value[:30],
)
def test_mergekit_that_is_no_depth_pruning(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LayerMapError, match=message) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "list"))
    assert str(caught.value).isprintable()


def test_several_sources_in_a_slice(tmp_path: Path) -> None:
    both = [{"model": name, "layer_range": [0, 8]} for name in "ab"]
    text = yaml.safe_dump({"slices": [{"sources": both}], "merge_method": "passthrough"})
    with pytest.raises(LayerMapError, match=r"slices\[0\] merges .* expected one source"):
        read(tmp_path, text)
    mixed = yaml.safe_load(slices((0, 4), (5, 8)))
    mixed["slices"][1]["sources"][0]["model"] = "n"
    with pytest.raises(LayerMapError, match="several models: m, n"):
        read(tmp_path, yaml.safe_dump(mixed))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("some words", "is neither a layer nor a range"),
        ("0-65535," * 400_000, "names more than 65536 layers"),
        ("x" + "\n" * 2_000_000, "is neither a layer nor a range"),
        (
            EVOPRESS.replace("attn+mlp\nnone\nnone", "mlp\nattn\nnone"),
            r"layers 2 \(mlp\), 3 \(attn\)",
        ),
        (EVOPRESS + "none\n", "has 9 lines for 8 layers"),
        ("none\nattn+mlp\n" * 2, "4 lines for 8 layers; .*drop_two_consecutive"),
        ("attn+mlp\n" * 8, "every layer is dropped"),
        (SLEB_RESULT.replace("# Total Blocks: 8", "# Total Blocks: 32"), "model of 32 blocks"),
        (SLEB_RESULT + SLEB_RESULT.replace("[5, 2, 6]", "[5]"), "2 different runs"),
        (SLEB_LOG.partition("Time Elapsed")[0], "did not end"),
        (SLEB_RESULT.replace("[5, 2, 6]", "[5, 2"), "not a list"),
        (SLEB_RESULT.replace("[5, 2, 6]", "{}"), "not a list"),
        (SLEB_RESULT.replace("[5, 2, 6]", '[5, "2"]'), r"removal_order\[1\] is '2'"),
        (SLEB_RESULT.replace("[5, 2, 6]", "[5, 5]"), "names layer 5 twice"),
        (SLEB_RESULT.replace("[5, 2, 6]", "[8]"), "names layer 8"),
        (PRUNEME_CSV.partition("1,4")[0], "has no rows"),
        (PRUNEME_CSV.replace("2,5,0.3\r\n", ""), "not those of one length"),
        (PRUNEME_CSV + "6,9,0.1\n", "of a model of 9 layers, and this one has 8"),
        (PRUNEME_CSV.replace("0.3", "nan"), "line 3: .* no finite distance"),
        (PRUNEME_CSV.replace("0.3", "x"), "line 3: .* is not start,end,distance"),
        (PRUNEME_CSV.replace("0.3", "0.3,1"), "no finite distance"),
        (PRUNEME_CSV.replace(",4,", ",1,"), "not those of one length"),
    ],
    ids=lambda value: value[-30:],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LayerMapError, match=message) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "list"))


def test_size_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(LayerMapError, match=f"larger than {MAX_BYTES} bytes"):
        read(tmp_path, "1," * MAX_BYTES)
    with pytest.raises(LayerMapError, match="No such file"):
        read_keep_list(tmp_path / "absent", BASE)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_text_is_sound_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    text = data.draw(st.sampled_from([PRUNEME_SLICES, PRUNEME_CSV, SLEB_LOG, EVOPRESS, "1,2"]))
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 20)))
    text = text[:begin] + data.draw(st.text(max_size=4)) + text[end:]
    folder = tmp_path_factory.mktemp("damaged")
    try:
        text.encode()
        layer_map = read(folder, text, listed=data.draw(st.sampled_from([None, "keep", "drop"])))
    except (LayerMapError, UnicodeEncodeError):
        return
    assert sorted(layer_map.kept + layer_map.dropped) == list(range(8))
