"""The arms of an experiment: what is an arm, and what cannot be compared with what."""

import json
import shutil
from pathlib import Path

import pytest

from trsp.bench.model_shapes import SHAPES, copy_config_only, write_shape
from trsp.bench.serve_arms import config_dtype, from_folders, from_shape, vocabulary_size
from trsp.bench.serve_plan import CONTROL, DENSE
from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoints with 6 layers, "llama", and 4, "pico-4", of one tokenizer; read only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        **SHAPES["pico"], "vocab_size": 300, "hidden_size": 32, "head_dim": 16,
        "intermediate_size": 48, "num_hidden_layers": 6,
    }  # fmt: skip
    made = []
    for name, num_layers in (("llama", 6), ("pico-4", 4)):
        folder = tmp_path_factory.mktemp("models") / name
        write_shape(shape, folder, num_layers=num_layers)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
        made.append(folder)
    return made[0], made[1]


@pytest.fixture
def dense(folders: tuple[Path, Path]) -> Path:
    return folders[0]


@pytest.fixture
def pruned(folders: tuple[Path, Path]) -> Path:
    return folders[1]


def test_dense_its_control_and_the_pruned_one(dense: Path, pruned: Path) -> None:
    found = from_folders(dense, [pruned], dtype=None, dummy_weights=False)
    assert [candidate.arm.name for candidate in found] == [DENSE, CONTROL, "pico-4"]
    assert [candidate.arm.role for candidate in found] == ["dense", "control", "pruned"]
    assert [candidate.arm.num_hidden_layers for candidate in found] == [6, 6, 4]
    whole, control, other = (candidate.arm for candidate in found)
    assert whole.model_copy(update={"name": CONTROL, "role": "control"}) == control
    assert found[0].folder == found[1].folder
    assert whole.fingerprint == open_checkpoint(dense).fingerprint != other.fingerprint
    assert found[0].weights_sha256 != found[2].weights_sha256
    assert whole.disk_bytes is not None
    assert other.disk_bytes is not None
    assert whole.disk_bytes > other.disk_bytes > 0
    assert whole.weight_bytes == 4 * whole.num_parameters
    assert whole.kv_bytes_per_token * 4 == other.kv_bytes_per_token * 6
    assert whole.weights == "checkpoint"


def test_random_weights_have_no_fingerprint(dense: Path, tmp_path: Path) -> None:
    small = copy_config_only(dense, tmp_path / "small", num_layers=4)
    found = from_folders(dense, [small], dtype="bfloat16", dummy_weights=True)
    arm = found[2].arm
    assert (arm.weights, arm.fingerprint, arm.disk_bytes) == ("dummy", None, None)
    assert arm.weight_bytes == 2 * arm.num_parameters


def test_weights_are_needed_where_they_are_to_be_loaded(dense: Path, tmp_path: Path) -> None:
    small = copy_config_only(dense, tmp_path / "small", num_layers=4)
    with pytest.raises(UserError, match="small"):
        from_folders(dense, [small], dtype=None, dummy_weights=False)


def test_the_wrong_order_is_refused(dense: Path, pruned: Path) -> None:
    with pytest.raises(UserError, match="has 6 layers, the dense model 4: give the dense model"):
        from_folders(pruned, [dense], dtype=None, dummy_weights=False)


def test_the_dense_model_is_not_a_pruned_one_of_itself(dense: Path) -> None:
    with pytest.raises(UserError, match="has 6 layers, the dense model 6"):
        from_folders(dense, [dense], dtype=None, dummy_weights=False)


def test_fewer_but_larger_layers_are_no_pruned_model(dense: Path, tmp_path: Path) -> None:
    """Its bound would be below 1, which is found only when everything is measured."""
    wide = copy_config_only(dense, tmp_path / "wide", num_layers=5)
    config = json.loads((wide / "config.json").read_text())
    config["intermediate_size"] *= 8
    (wide / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"wide: .*parameters"):
        from_folders(dense, [wide], dtype=None, dummy_weights=True)


@pytest.mark.parametrize("place", ["dense", "pruned"])
def test_a_folder_without_a_config(place: str, dense: Path, tmp_path: Path) -> None:
    folders = [dense, tmp_path] if place == "pruned" else [tmp_path, dense]
    with pytest.raises(UserError, match=r"has no config.json; give the folder of a checkpoint"):
        from_folders(folders[0], folders[1:], dtype=None, dummy_weights=False)


def test_same_names_are_refused(dense: Path, pruned: Path, tmp_path: Path) -> None:
    other = tmp_path / pruned.name
    other.mkdir()
    with pytest.raises(UserError, match="two models are called 'pico-4'"):
        from_folders(dense, [pruned, other], dtype=None, dummy_weights=False)


def test_another_tokenizer_is_refused(dense: Path, pruned: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pruned, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        UserError, match=r"other: its tokenizer is not that of .*copy the dense"
    ) as e:
        from_folders(dense, [other], dtype=None, dummy_weights=False)
    assert "\n" not in str(e.value)


def test_the_same_tokenizer_in_other_bytes_is_the_same(
    dense: Path, pruned: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pruned, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=7))
    assert len(from_folders(dense, [other], dtype=None, dummy_weights=False)) == 3


@pytest.mark.parametrize("text", ["{", "{}", None])
def test_a_broken_tokenizer_is_one_line(
    text: str | None, dense: Path, pruned: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pruned, other)
    if text is None:
        (other / "tokenizer.json").unlink()
    else:
        (other / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="other: its tokenizer") as raised:
        from_folders(dense, [other], dtype=None, dummy_weights=False)
    assert "\n" not in str(raised.value)


def test_a_shape_is_cut(tmp_path: Path) -> None:
    found = from_shape("pico", [3, 1], tmp_path, dtype=None)
    names = [candidate.arm.name for candidate in found]
    assert names == [DENSE, CONTROL, "pico-minus-1", "pico-minus-3"]
    assert [candidate.arm.num_hidden_layers for candidate in found] == [8, 8, 7, 5]
    assert found[3].arm.model == "pico, 5 of 8 layers"
    assert {candidate.arm.weights for candidate in found} == {"dummy"}
    assert not list(tmp_path.rglob("*.safetensors"))
    assert config_dtype(found[0].folder) == "float32"
    assert vocabulary_size(found[0].folder) == 10240


def test_a_folders_shape_is_cut(dense: Path, tmp_path: Path) -> None:
    found = from_shape(dense, [2], tmp_path / "shapes", dtype=None)
    assert [candidate.arm.name for candidate in found] == [DENSE, CONTROL, "llama-minus-2"]
    assert [candidate.arm.num_hidden_layers for candidate in found] == [6, 6, 4]


@pytest.mark.parametrize("removals", [[], [0], [8], [-1], [2, 2]])
def test_removals_that_mean_nothing(removals: list[int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--remove .*pico has 8 layers.* from 1 to 7"):
        from_shape("pico", removals, tmp_path / "shapes", dtype=None)
    assert not (tmp_path / "shapes").exists()


def test_an_unknown_shape_names_those_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--shape 'gpt-9' is unknown; choose from .*llama3-8b"):
        from_shape("gpt-9", [1], tmp_path, dtype=None)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float17"):
        from_shape("pico", [1], tmp_path, dtype="float17")


def test_a_shape_that_was_written_for_another_model_is_not_taken(tmp_path: Path) -> None:
    """Two models whose folders have one name, one after the other with one --out."""
    for width, removed in ((352, 2), (704, 2)):
        model = write_shape("pico", tmp_path / str(width) / "m")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"intermediate_size": width}))
        for candidate in from_shape(model, [removed], tmp_path / "shapes", dtype=None):
            made = json.loads((candidate.folder / "config.json").read_text())
            assert made["intermediate_size"] == width
