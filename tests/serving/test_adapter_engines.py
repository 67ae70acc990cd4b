"""A layer map over the dense checkpoint is served as the compacted checkpoint is, engine by engine.

Every engine is vLLM's own with the load format `trsp_layer_map`; the reference is the folder that
`trsp compact` wrote, served with no flag.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LOAD_FORMAT = "trsp_layer_map"
FAMILIES = ("llama", "qwen3", "gemma3", "opt")
# Two ranks each sum a part of every product, so the order of summation differs.
TENSOR_PARALLEL_TOLERANCE = 1e-5

Overlay = Callable[[str], Path]


def short_map(case: Any) -> Any:
    """The first removals of the family's map: those of the compacted checkpoint."""
    from trsp.pruner.layer_map import read_layer_map

    return read_layer_map(case.layer_map).prefix(case.num_removals)


@pytest.fixture(scope="module")
def overlay(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Overlay:
    """overlay(family): a folder without weights over the dense checkpoint; made once."""
    from trsp.serving.layer_map_overlay import write_overlay

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            case = pico(family)
            out = tmp_path_factory.mktemp("overlay") / family
            made[family] = write_overlay(case.dense, short_map(case), out)
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_an_overlay_in_process_is_the_compacted_checkpoint(
    family: str, pico: Any, overlay: Overlay, serve: Any
) -> None:
    assert not list(overlay(family).rglob("*.safetensors*"))
    served = serve(overlay(family), load_format=LOAD_FORMAT)
    assert served.largest_difference(serve(pico(family).pruned)) == 0.0
    assert served.num_layers == 5


def test_the_dense_checkpoint_is_another_model(pico: Any, serve: Any) -> None:
    """What an adapter that did nothing would serve."""
    case = pico("llama")
    dense = serve(case.dense)
    assert dense.num_layers == 8
    pairs = zip(dense.tokens, serve(case.pruned).tokens, strict=True)
    assert all(ours != theirs for ours, theirs in pairs)


def test_without_the_load_format_a_trimmed_dense_checkpoint_is_refused(
    pico: Any, serve: Any
) -> None:
    """By vLLM itself: nothing of trsp runs here, and the first layers would be another model."""
    with refused(serve, "no module or parameter named 'layers.5'"):
        serve(pico("llama").dense, hf_overrides={"num_hidden_layers": 5})


def test_an_overlay_with_separate_engine_and_worker_processes(
    pico: Any, overlay: Overlay, serve: Any
) -> None:
    served = serve(overlay("qwen3"), in_process=False, load_format=LOAD_FORMAT)
    assert served.largest_difference(serve(pico("qwen3").pruned)) == 0.0


def test_an_overlay_with_tensor_parallel_ranks(pico: Any, overlay: Overlay, serve: Any) -> None:
    served = serve(
        overlay("llama"),
        load_format=LOAD_FORMAT,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )
    assert served.largest_difference(serve(pico("llama").pruned)) < TENSOR_PARALLEL_TOLERANCE


def test_an_overlay_with_pipeline_stages(pico: Any, overlay: Overlay, serve: Any) -> None:
    """Five layers on two stages, so one has a layer more than the other.

    The second stage makes the buffer it receives into while warming up, which the CPU build leaves
    out without a compiler: so one that compiles nothing, and changes no result.
    """
    served = serve(
        overlay("qwen3"),
        load_format=LOAD_FORMAT,
        pipeline_parallel_size=2,
        distributed_executor_backend="mp",
        enforce_eager=False,
        compilation_config={"mode": 2, "backend": "eager"},
    )
    assert served.largest_difference(serve(pico("qwen3").pruned)) == 0.0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_dense_folder_with_overrides_that_agree(
    family: str, pico: Any, serve: Any, tmp_path: Path
) -> None:
    from trsp.pruner.layer_map import write_layer_map
    from trsp.serving.served_layers import open_served_layers

    case = pico(family)
    write_layer_map(short_map(case), tmp_path / "map.json")
    served = serve(
        case.dense,
        load_format=LOAD_FORMAT,
        hf_overrides=open_served_layers(case.dense, short_map(case)).hf_overrides(),
        model_loader_extra_config={"layer_map": str(tmp_path / "map.json")},
    )
    assert served.largest_difference(serve(case.pruned)) == 0.0


@pytest.mark.parametrize(
    ("family", "overrides", "complaint"),
    [
        ("llama", {}, "num_hidden_layers is 8, expected 5"),
        ("llama", {"num_hidden_layers": 4}, "num_hidden_layers is 4, expected 5"),
        # The number alone: the list of layer types stays that of the dense model.
        ("qwen3", {"num_hidden_layers": 5}, "(layer_types|max_window_layers) is .*, expected"),
    ],
)
def test_the_dense_folder_with_overrides_that_disagree_is_refused(
    family: str, overrides: dict[str, Any], complaint: str, pico: Any, serve: Any, tmp_path: Path
) -> None:
    from trsp.pruner.layer_map import write_layer_map

    case = pico(family)
    write_layer_map(short_map(case), tmp_path / "map.json")
    with refused(serve, f"does not agree with the layer map: {complaint}"):
        serve(
            case.dense,
            load_format=LOAD_FORMAT,
            hf_overrides=overrides,
            model_loader_extra_config={"layer_map": str(tmp_path / "map.json")},
        )


def test_a_map_of_another_checkpoint_is_refused(pico: Any, serve: Any) -> None:
    with refused(serve, "the layer map is for another model"):
        serve(
            pico("llama").dense,
            load_format=LOAD_FORMAT,
            hf_overrides={"num_hidden_layers": 4},
            model_loader_extra_config={"layer_map": str(pico("qwen3").layer_map)},
        )


def test_an_overlay_without_the_load_format_is_refused(overlay: Overlay, serve: Any) -> None:
    with refused(serve, "[Cc]annot find any model weights"):
        serve(overlay("llama"))


def test_an_overlay_whose_map_was_changed_is_refused(
    pico: Any, overlay: Overlay, serve: Any, tmp_path: Path
) -> None:
    from trsp.pruner.layer_map import read_layer_map, write_layer_map

    changed = shutil.copytree(overlay("llama"), tmp_path / "changed")
    full_map = read_layer_map(pico("llama").layer_map)
    write_layer_map(full_map, changed / "layer_map.json")
    with refused(serve, "changed since the overlay was made"):
        serve(changed, load_format=LOAD_FORMAT)


def test_an_overlay_whose_config_was_changed_is_refused(
    overlay: Overlay, serve: Any, tmp_path: Path
) -> None:
    changed = shutil.copytree(overlay("llama"), tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with refused(serve, "num_hidden_layers is 4, expected 5"):
        serve(changed, load_format=LOAD_FORMAT)


def refused(serve: Any, complaint: str) -> Any:
    """Expect that the engine does not start, and that vLLM's error says `complaint`."""
    return pytest.raises(serve.refused, match=complaint)
