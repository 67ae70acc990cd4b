"""End to end on a pico model: prune, prove, publish; stop anywhere and resume to the same bytes."""

import hashlib
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trsp.pruner import api
from trsp.pruner.checkpoint import load_model, open_checkpoint, sample_weights
from trsp.pruner.errors import Interrupted, RunError, UserError
from trsp.pruner.layer_map import read_layer_map
from trsp.pruner.proof import ProofError
from trsp.pruner.recipe import Recipe

SETTINGS = (
    "calibration.num_sequences=8", "calibration.sequence_length=32",
    "selection.first_round_steps=6", "selection.round_steps=3", "selection.batch_size=2",
    "selection.num_candidates=2", "selection.verification_sequences=4",
    "transfer.steps=6", "transfer.batch_size=2", "evaluation.window=64",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def words(text_file: Path, held_out_file: Path) -> dict[str, Any]:
    return {
        "data": [text_file],
        "eval_data": [held_out_file],
        "layers": 2,
        "settings": SETTINGS,
        "vllm": "off",
    }


def weights_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for shard in sorted(folder.glob("*.safetensors")):
        digest.update(shard.read_bytes())
    return digest.hexdigest()


class Stopper:
    """Progress that sends this process a signal when `task` reaches `at`."""

    def __init__(self, task: str, at: int, number: int = signal.SIGINT) -> None:
        self.task, self.at, self.number = task, at, number

    def __call__(self, task: str, completed: int, total: int) -> None:
        if task == self.task and completed == self.at:
            os.kill(os.getpid(), self.number)


def test_prune_publishes_a_proven_plain_checkpoint(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    out = tmp_path / "shallow"
    report = api.prune(pico_llama, out, **words)
    checkpoint = open_checkpoint(out)
    assert checkpoint.num_hidden_layers == 4
    layer_map = read_layer_map(out / "layer_map.json")
    assert layer_map.removal_order == tuple(report["removal_order"])
    assert len(layer_map.steps) == 2
    assert layer_map.calibration is not None
    assert layer_map.calibration["num_sequences"] == 8
    assert json.loads((out / "trsp_report.json").read_text())["proof"] == report["proof"]
    assert {"recipe.yaml", "README.md", "manifest.json", "tokenizer.json"} <= {
        path.name for path in out.iterdir()
    }
    assert set(report["evaluation"]) == {"dense", "pruned"}
    assert report["verdict"] in (out / "README.md").read_text().replace("Perplexity", "perplexity")
    assert report["transfer"]["jump_at_deletion"] == 0.0
    stages = {"selection", "transfer", "compaction", "proof"}
    assert set(report["costs"]) == stages | {"evaluation, dense", "evaluation, pruned"}
    assert not list(tmp_path.glob("*.tmp-*")) + list(tmp_path.glob("*.lock"))
    proof = api.verify(out, against=tmp_path / "shallow.run" / "transferred", vllm="off")
    assert proof.passed
    again = tmp_path / "again"
    api.prune(pico_llama, again, recipe=out / "recipe.yaml", vllm="off")
    assert weights_digest(again) == weights_digest(out), "the saved recipe makes the same model"


def test_every_prefix_of_the_run_is_a_model(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    out = tmp_path / "shallow"
    api.prune(pico_llama, out, **words)
    transferred = tmp_path / "shallow.run" / "transferred"
    one = api.compact(transferred, out / "layer_map.json", tmp_path / "one", prefix=1)
    assert open_checkpoint(one).num_hidden_layers == 5
    assert api.verify(one, against=transferred, vllm="off").passed


def test_a_map_tells_the_weights_it_is_for(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    """After transfer those that were moved: served over the given model it would be another."""
    from trsp.serving.served_layers import open_served_layers

    planned = api.plan(
        pico_llama, tmp_path / "plan.json", data=words["data"], layers=2, settings=SETTINGS[:-3]
    )
    assert planned.base_model.weights_sha256 == sample_weights(open_checkpoint(pico_llama))
    assert open_served_layers(pico_llama, planned).layer_map.kept == planned.kept
    api.prune(pico_llama, tmp_path / "shallow", **words)
    transferred = tmp_path / "shallow.run" / "transferred"
    for folder in (tmp_path / "shallow", tmp_path / "shallow.run"):
        layer_map = read_layer_map(folder / "layer_map.json")
        weights = layer_map.base_model.weights_sha256
        assert weights == sample_weights(open_checkpoint(transferred))
        open_served_layers(transferred, layer_map)
        with pytest.raises(UserError, match=r"same shape, other weights.*OUT\.run/transferred"):
            open_served_layers(pico_llama, layer_map)
    # The choice alone, deleted from the given model: what direct removal measures.
    api.compact(pico_llama, tmp_path / "shallow" / "layer_map.json", tmp_path / "direct")


@pytest.mark.parametrize("way", ["keep", "map"])
def test_named_layers_without_text_are_only_compacted(
    pico_llama: Path, tmp_path: Path, way: str
) -> None:
    kept = (0, 1, 4, 5)
    named: dict[str, Any] = {"keep": kept}
    if way == "map":
        api.prune(pico_llama, tmp_path / "first", keep=kept, vllm="off")
        named = {"layer_map": tmp_path / "first" / "layer_map.json"}
    out = tmp_path / "out"
    report = api.prune(pico_llama, out, vllm="off", **named)
    assert report["kept"] == list(kept)
    assert report["transfer"] is None
    dense, shallow = (load_model(open_checkpoint(folder)) for folder in (pico_llama, out))
    for layer, source_layer in enumerate(kept):
        for a, b in zip(
            shallow.model.layers[layer].parameters(),
            dense.model.layers[source_layer].parameters(),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("task", "at"),
    [
        ("loss without, round 1/2", 3),
        ("loss without, round 2/2", 1),
        ("local distillation", 2),
        ("recording the teacher", 4),
        ("transfer", 1),
        ("transfer", 4),
        ("transfer", 6),
        ("evaluating, dense", 1),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any], whole_run: str, task: str, at: int
) -> None:
    out = tmp_path / "shallow"
    with pytest.raises(Interrupted):
        api.prune(pico_llama, out, progress=Stopper(task, at), **words)
    assert not out.exists()
    assert not list(tmp_path.glob("*.tmp-*"))
    api.prune(pico_llama, out, resume=True, **words)
    assert weights_digest(out) == whole_run


@pytest.fixture(scope="module")
def whole_run(
    one_thread: None,
    pico_llama: Path,
    text_file: Path,
    held_out_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Digest of the weights of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "shallow"
    api.prune(
        pico_llama, out, data=[text_file], eval_data=[held_out_file], layers=2,
        settings=SETTINGS, vllm="off",
    )  # fmt: skip
    return weights_digest(out)


def test_a_killed_run_resumes_from_its_last_saved_step(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any], whole_run: str
) -> None:
    out = tmp_path / "shallow"
    settings = (*SETTINGS, "state_every_seconds=0")
    child = os.fork()
    if child == 0:
        api.prune(
            pico_llama, out, progress=Stopper("transfer", 4, signal.SIGKILL),
            **{**words, "settings": settings},
        )  # fmt: skip
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "shallow.run" / "transfer_state").is_dir()
    seen: list[int] = []

    def first_step(task: str, completed: int, total: int) -> None:
        if task == "transfer":
            seen.append(completed)

    api.prune(pico_llama, out, resume=True, progress=first_step, **words)
    assert seen == [5, 6], "the four saved steps are not done again"
    assert weights_digest(out) == whole_run


def test_resume_refuses_another_run(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    out = tmp_path / "shallow"
    with pytest.raises(UserError, match="no unfinished run"):
        api.prune(pico_llama, out, resume=True, **words)
    with pytest.raises(Interrupted):
        api.prune(pico_llama, out, progress=Stopper("transfer", 1), **words)
    with pytest.raises(UserError, match="another target"):
        api.prune(pico_llama, out, resume=True, **{**words, "layers": 3})
    with pytest.raises(UserError, match="--resume"):
        api.prune(pico_llama, out, **words)
    memory = (*SETTINGS, "transfer.micro_batch_size=1", "transfer.checkpoint_activations=true")
    api.prune(pico_llama, out, resume=True, **{**words, "settings": memory})
    assert out.is_dir(), "settings that only lay out memory may change"


def test_a_failed_proof_publishes_nothing(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trsp.pruner import pipeline

    honest = pipeline.prove

    def prove_damaged(folder: Path, **options: Any) -> Any:
        shard = folder / "model.safetensors"
        content = bytearray(shard.read_bytes())
        content[-2000:] = bytes(2000)
        shard.write_bytes(content)
        return honest(folder, **options)

    monkeypatch.setattr(pipeline, "prove", prove_damaged)
    out = tmp_path / "shallow"
    with pytest.raises(ProofError, match="logits"):
        api.prune(pico_llama, out, keep=[0, 1, 4], vllm="off")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_on_one_output_are_refused(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    out = tmp_path / "shallow"
    errors: list[BaseException] = []

    def second(task: str, completed: int, total: int) -> None:
        if task == "transfer" and completed == 1:

            def run() -> None:
                try:
                    api.prune(pico_llama, out, **words)
                except UserError as error:
                    errors.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    api.prune(pico_llama, out, progress=second, **words)
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ()}, "give text to learn from"),
        ({"layers": 6}, "not pruning"),
        ({"layers": None, "ratio": 0.01}, "not pruning"),
        ({"layers": None, "keep": [0, 9]}, "9"),
        ({"layers": None, "keep": []}, "not pruning"),
        ({"settings": (*SETTINGS, "selection.protected=[0,1,2,3,4]")}, "unprotected"),
        ({"settings": ("calibration.sequence_length=100000",)}, "too little|tokens|context"),
        ({"device": "cuda"}, "no CUDA"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    if change.get("device") == "cuda" and torch.cuda.is_available():
        change = {"device": "cuda:99"}
    with pytest.raises(UserError, match=message):
        api.prune(pico_llama, tmp_path / "out", **{**words, **change})
    assert not (tmp_path / "out").exists()


def test_out_of_memory_names_the_settings_that_help(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trsp.pruner import run

    def explode(*_args: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "transfer", explode)
    with pytest.raises(RunError, match=r"micro_batch_size=1.*checkpoint_activations=true"):
        api.prune(pico_llama, tmp_path / "out", **words)


def test_plan_writes_a_layer_map_that_prune_takes(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any], whole_run: str
) -> None:
    words = {key: value for key, value in words.items() if key not in ("eval_data", "vllm")}
    planned = api.plan(pico_llama, tmp_path / "map.json", **words)
    assert read_layer_map(tmp_path / "map.json") == planned
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.json"]
    out = tmp_path / "out"
    api.prune(
        pico_llama, out, layer_map=tmp_path / "map.json", vllm="off",
        **{**words, "layers": None},
    )  # fmt: skip
    assert weights_digest(out) == whole_run


def other_weights(model: Path, folder: Path) -> Path:
    """A checkpoint of the same shape with other weights."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor.mul_(1.01)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_run_is_not_resumed_with_other_weights_of_the_same_shape(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    with pytest.raises(Interrupted):
        api.prune(pico_llama, tmp_path / "out", progress=Stopper("transfer", 1), **words)
    other = other_weights(pico_llama, tmp_path / "other")
    with pytest.raises(UserError, match="another model"):
        api.prune(other, tmp_path / "out", resume=True, **words)


def test_overwrite_deletes_no_input_and_no_folder_of_the_user(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    model = Path(shutil.copytree(pico_llama, tmp_path / "model"))
    digest = weights_digest(model)
    for out in (model, model / "inside"):
        with pytest.raises(UserError, match="choose another --out"):
            api.prune(model, out, overwrite=True, **words)
    api.prune(model, tmp_path / "first", **words)
    transferred = tmp_path / "first.run" / "transferred"
    with pytest.raises(UserError, match="choose another --out"):
        api.prune(
            transferred, tmp_path / "first", overwrite=True, vllm="off",
            layer_map=tmp_path / "first" / "layer_map.json",
        )  # fmt: skip
    assert transferred.is_dir()
    assert weights_digest(model) == digest
    mine = tmp_path / "second.run"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no run of trsp"):
        api.prune(model, tmp_path / "second", overwrite=True, keep=[0, 1], vllm="off")
    assert (mine / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("field", "value"), [("layer_moods", [1, 2, 3, 4, 5, 6]), ("moe_layer_freq", 2)]
)
def test_what_cannot_be_carried_over_is_refused_before_training(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any], field: str, value: Any
) -> None:
    model = Path(shutil.copytree(pico_llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(UserError, match=field):
        api.prune(model, tmp_path / "out", **words)
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        api.prune(pico_llama, tmp_path / "out", **{**words, "eval_data": ["nowhere.txt"]})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_generation_config_that_transformers_would_not_write_is_carried(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    model = Path(shutil.copytree(pico_llama, tmp_path / "model"))
    generation = json.dumps({"temperature": 0.9, "top_p": 0.6})
    (model / "generation_config.json").write_text(generation)
    api.prune(model, tmp_path / "out", **words)
    assert (tmp_path / "out" / "generation_config.json").read_text() == generation


def test_a_failed_step_keeps_the_last_good_state(
    pico_llama: Path,
    tmp_path: Path,
    words: dict[str, Any],
    whole_run: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trsp.pruner import transfer

    honest = transfer.TransferLoop.step

    def fail_once(loop: Any, step: int) -> Any:
        if step == 4:
            raise RunError("the stage 2 loss is nan at step 4")
        return honest(loop, step)

    monkeypatch.setattr(transfer.TransferLoop, "step", fail_once)
    out = tmp_path / "out"
    with pytest.raises(RunError, match="nan at step 4"):
        api.prune(pico_llama, out, **words)
    monkeypatch.undo()
    seen: list[int] = []

    def watch(task: str, completed: int, total: int) -> None:
        if task == "transfer":
            seen.append(completed)

    api.prune(pico_llama, out, resume=True, progress=watch, **words)
    assert seen == [5, 6]
    assert weights_digest(out) == whole_run


def test_words_that_would_be_ignored_are_refused(pico_llama: Path, tmp_path: Path) -> None:
    api.prune(pico_llama, tmp_path / "first", keep=[0, 1, 4], vllm="off")
    assert not (tmp_path / "first.run").exists(), "nothing was trained: nothing to resume"
    layer_map = tmp_path / "first" / "layer_map.json"
    with pytest.raises(UserError, match="leave out --keep, --ratio and --layers"):
        api.prune(pico_llama, tmp_path / "out", layer_map=layer_map, ratio=0.5)
    with pytest.raises(UserError, match="nothing to plan"):
        api.plan(pico_llama, tmp_path / "map.json", keep=[0, 1])
    with pytest.raises(UserError, match="a Recipe is whole"):
        api.prune(pico_llama, tmp_path / "out", recipe=Recipe(), ratio=0.5)


def test_held_out_text_shorter_than_a_window_is_found_before_training(
    pico_llama: Path, tmp_path: Path, words: dict[str, Any]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short", "utf-8")
    seen: list[str] = []
    with pytest.raises(UserError, match="one window needs 64; give more text"):
        api.prune(
            pico_llama, tmp_path / "out", **{**words, "eval_data": [short]},
            progress=lambda task, done, total: seen.append(task),
        )  # fmt: skip
    assert not any("loss without" in task for task in seen)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("evaluation.window=129", "longer than the model's context, 128"),
        ("evaluation.stride=65", "stride 65 is not within 1 to 64"),
    ],
)
def test_windows_that_cannot_be_are_found_before_training(
    pico_llama: Path,
    tmp_path: Path,
    words: dict[str, Any],
    held_out_file: Path,
    setting: str,
    said: str,
) -> None:
    seen: list[str] = []
    words = {**words, "eval_data": [held_out_file]}
    words["settings"] = (*words["settings"], setting)
    with pytest.raises(UserError, match=said):
        api.prune(
            pico_llama, tmp_path / "out", **words,
            progress=lambda task, done, total: seen.append(task),
        )  # fmt: skip
    assert not any("loss without" in task for task in seen)
