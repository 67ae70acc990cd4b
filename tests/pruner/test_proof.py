"""The proof passes on what compaction writes; each planted mutant fails the check meant for it."""

import json
import resource
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from trsp.pruner import folder_checks, model_checks, proof, vllm_process
from trsp.pruner.checkpoint import Checkpoint, load_model, open_checkpoint
from trsp.pruner.compaction import compact
from trsp.pruner.durable import write_manifest
from trsp.pruner.errors import Interrupted, RunError, UserError
from trsp.pruner.layer_map import BaseModel, LayerMap, read_layer_map, write_layer_map
from trsp.pruner.progress import silent
from trsp.pruner.proof import Proof, ProofError, prove, require
from trsp.pruner.vllm_process import ServedTokens

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Wide enough that each layer moves the logits.
    "initializer_range": 0.3,
}
WORDS = ["the", "old", "keeper", "counted", "ships", "in", "bay", "and", "wrote", "number", "he"]


def save_model(config: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> None:
    names = ["<pad>", "<s>", "</s>", "<unk>", *words]
    tokenizer = Tokenizer(WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    ).save_pretrained(folder)


def prune_folder(base: Path, out: Path, dropped: Sequence[int]) -> Path:
    checkpoint = open_checkpoint(base)
    layers = LayerMap.from_drop(
        BaseModel("base", checkpoint.num_hidden_layers, checkpoint.fingerprint), dropped
    )
    return compact(checkpoint, layers, out)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_model(
        LlamaConfig(num_hidden_layers=4, **SHAPE), tmp_path_factory.mktemp("llama") / "base"
    )
    save_tokenizer(base)
    return base


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers with a window of 24 tokens in turn with layers without; bf16."""
    config = Gemma2Config(num_hidden_layers=4, sliding_window=24, query_pre_attn_scalar=16, **SHAPE)
    return save_model(config, tmp_path_factory.mktemp("gemma") / "base", torch.bfloat16)


@pytest.fixture(scope="module")
def pruned_llama(llama: Path) -> Path:
    return prune_folder(llama, llama.parent / "pruned", [2])


@pytest.fixture(scope="module")
def pruned_gemma(gemma: Path) -> Path:
    return prune_folder(gemma, gemma.parent / "pruned", [1])


@pytest.fixture
def mutable(pruned_llama: Path, tmp_path: Path) -> Path:
    """A copy of the pruned model to damage, without the manifest that would notice first."""
    folder = tmp_path / "mutable"
    shutil.copytree(pruned_llama, folder, ignore=shutil.ignore_patterns("manifest.json"))
    return folder


def statuses(result: Proof) -> dict[str, str]:
    return {check.name: check.status for check in result.checks}


def failed(result: Proof) -> list[str]:
    return [check.name for check in result.failures]


def details(result: Proof) -> dict[str, str]:
    return {check.name: check.detail for check in result.checks}


def change_json(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))


def rewrite_layer_types(folder: Path, types: list[str]) -> None:
    """Change config.json and what the layer map records of it alike."""
    change_json(folder / "config.json", layer_types=types)
    changes = json.loads((folder / "layer_map.json").read_text())["config_changes"]
    for change in changes:
        if change["field"] == "layer_types":
            change["after"] = types
    change_json(folder / "layer_map.json", config_changes=changes)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_compacted_llama_passes_every_check_that_applies(llama: Path, pruned_llama: Path) -> None:
    result = prove(pruned_llama, against=llama)
    assert result.passed
    skipped = {name for name, status in statuses(result).items() if status != "passed"}
    assert skipped <= {"logits_native", "vllm"}
    assert len(result.checks) == proof.NUM_CHECKS
    measured = {check.name: check.measured for check in result.checks}
    # Same weights, same kernels, same shapes: nothing is rounded in another way.
    assert measured["logits"]["max_difference"] == 0
    assert measured["logits"]["logit_scale"] > 1
    assert 0 < measured["kv_cache"]["relative_difference"] < 1e-5
    # 4 random prompts and the text.
    assert measured["greedy"]["num_tokens"] == 5 * 32
    require(result)


def test_compacted_gemma_passes_in_its_own_dtype_too(gemma: Path, pruned_gemma: Path) -> None:
    result = prove(pruned_gemma, against=gemma, vllm="off")
    assert result.passed
    assert statuses(result)["logits_native"] == "passed"
    assert details(result)["logits_native"].startswith("bfloat16")
    # The random prompts of 16 tokens and their 32 new ones go beyond the window of 24, and so
    # does one more sequence.
    assert "1 x 56 window" in details(result)["forward"]


def test_without_a_reference_what_needs_one_is_skipped_by_name(pruned_llama: Path) -> None:
    result = prove(pruned_llama, vllm="off")
    assert result.passed
    skipped = {name for name, status in statuses(result).items() if status == "skipped"}
    needing = {"base_model", "weights", "layer_attributes", "logits", "logits_native", "greedy"}
    assert skipped == needing | {"vllm"}
    assert details(result)["base_model"] == "no reference was given (--against MODEL)"
    assert details(result)["logits"] == "base_model skipped"
    assert result.reference is None


def flip_a_bit_of_a_kept_weight(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        # The lowest exponent bit: the weight is doubled or halved.
        tensors["model.layers.1.mlp.down_proj.weight"].view(torch.int32)[3, 5] ^= 1 << 23

    change_tensors(folder, change)


def swap_two_layers(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            other = name.replace(".0.", ".1.", 1)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    change_tensors(folder, change)


def add_a_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))


def remove_a_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def transpose_a_tensor(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))


def poison_a_weight(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))


def drop_one_more_layer(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            del tensors[name]

    change_tensors(folder, change)
    change_json(folder / "config.json", num_hidden_layers=2)


def miscount_layers(folder: Path) -> None:
    change_json(folder / "config.json", num_hidden_layers=4)


def truncate_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def change_a_config_field(folder: Path) -> None:
    change_json(folder / "config.json", rms_norm_eps=1e-3)


def name_other_dropped_layers(folder: Path) -> None:
    path = folder / "layer_map.json"
    layers = read_layer_map(path)
    other = LayerMap.from_drop(layers.base_model, [1], config_changes=layers.config_changes)
    write_layer_map(other, path)


def name_another_base_model(folder: Path) -> None:
    path = folder / "layer_map.json"
    write_layer_map(read_layer_map(path).with_base_model(BaseModel("other", 4, "0" * 64)), path)


def remove_the_layer_map(folder: Path) -> None:
    (folder / "layer_map.json").unlink()


def remove_the_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def swap_the_tokenizer(folder: Path) -> None:
    save_tokenizer(folder, WORDS[::-1])


def enlarge_the_tokenizer(folder: Path) -> None:
    save_tokenizer(folder, [f"word{n}" for n in range(200)])


def stale_manifest(folder: Path) -> None:
    write_manifest(folder)
    flip_a_bit_of_a_kept_weight(folder)


@pytest.mark.parametrize(
    ("plant", "failing"),
    [
        (flip_a_bit_of_a_kept_weight, {"weights", "logits", "greedy"}),
        (swap_two_layers, {"weights", "logits", "greedy"}),
        (add_a_tensor, {"weights", "load"}),
        (remove_a_tensor, {"weights", "load"}),
        (transpose_a_tensor, {"weights", "load"}),
        (poison_a_weight, {"weights", "forward"}),
        (drop_one_more_layer, {"layer_map"}),
        (miscount_layers, {"checkpoint"}),
        (truncate_the_weights, {"checkpoint"}),
        (change_a_config_field, {"base_model"}),
        (name_other_dropped_layers, {"weights", "logits", "greedy"}),
        (name_another_base_model, {"base_model"}),
        (remove_the_layer_map, {"layer_map"}),
        (remove_the_tokenizer, {"tokenizer"}),
        (swap_the_tokenizer, {"tokenizer"}),
        (enlarge_the_tokenizer, {"tokenizer"}),
        (stale_manifest, {"manifest", "weights", "logits", "greedy"}),
    ],
)
def test_planted_mutant_fails_the_check_meant_for_it(
    plant: Callable[[Path], None], failing: set[str], llama: Path, mutable: Path
) -> None:
    plant(mutable)
    result = prove(mutable, against=llama, vllm="off")
    assert set(failed(result)) == failing, details(result)
    with pytest.raises(ProofError, match=min(failing)) as caught:
        require(result)
    assert isinstance(caught.value, RunError)
    assert "\n" not in str(caught.value)


def test_stale_layer_types_fail(gemma: Path, pruned_gemma: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stale"
    shutil.copytree(pruned_gemma, folder, ignore=shutil.ignore_patterns("manifest.json"))
    stale = json.loads((gemma / "config.json").read_text())["layer_types"]
    change_json(folder / "config.json", layer_types=stale)
    result = prove(folder, against=gemma, vllm="off")
    assert set(failed(result)) == {"layer_map", "config", "load"}
    # Shortened instead of sliced, and the layer map agrees: only the layers themselves tell.
    rewrite_layer_types(folder, stale[:3])
    result = prove(folder, against=gemma, vllm="off")
    assert set(failed(result)) == {"layer_attributes", "logits", "greedy"}
    assert "layer_type is 'full_attention'" in details(result)["layer_attributes"]


def test_window_too_wide_for_the_probes_is_still_compared(tmp_path: Path) -> None:
    shape = {**SHAPE, "max_position_embeddings": 8192}
    config = Gemma2Config(num_hidden_layers=3, sliding_window=4096, **shape)
    base = save_model(config, tmp_path / "base")
    folder = prune_folder(base, tmp_path / "pruned", [0])
    assert prove(folder, against=base, vllm="off").passed
    rewrite_layer_types(folder, ["sliding_attention", "full_attention"])
    write_manifest(folder)
    assert failed(prove(folder, against=base, vllm="off")) == ["layer_attributes"]


def test_sharded_checkpoint_passes(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(base, max_shard_size="20KB")
    folder = prune_folder(base, tmp_path / "pruned", [1, 2])
    assert len(list(folder.glob("*.safetensors"))) > 2
    result = prove(folder, against=base, vllm="off")
    assert result.passed, details(result)


@pytest.fixture
def stale_layer_idx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose second layer believes that it is the first, as after a careless deletion."""

    def load_stale(*args: Any, **options: Any) -> PreTrainedModel:
        model = load_model(*args, **options)
        model.model.layers[1].self_attn.layer_idx = 0
        return model

    monkeypatch.setattr(model_checks, "load_model", load_stale)


@pytest.mark.usefixtures("stale_layer_idx")
def test_stale_layer_idx_fails_and_spoils_the_cache(pruned_llama: Path) -> None:
    result = prove(pruned_llama, vllm="off")
    assert set(failed(result)) == {"layer_indices", "kv_cache"}
    assert "layer 1.self_attn.layer_idx is 0" in details(result)["layer_indices"]


def test_logits_that_differ_with_the_cache_fail_though_the_tokens_agree(
    pruned_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_checks, "CACHE_TOLERANCE", 0.0)
    result = prove(pruned_llama, vllm="off")
    assert failed(result) == ["kv_cache"]
    assert "160 greedy tokens with the cache on and off" in details(result)["kv_cache"]


def test_a_difference_in_its_own_dtype_alone_fails(
    gemma: Path, pruned_gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_skewed(checkpoint: Checkpoint, **options: Any) -> PreTrainedModel:
        model = load_model(checkpoint, **options)
        if options["dtype"] == "auto" and checkpoint.path == pruned_gemma:
            with torch.no_grad():
                # Gemma multiplies by 1 + weight: logits grow by 5 %.
                model.model.norm.weight += 0.05
        return model

    monkeypatch.setattr(model_checks, "load_model", load_skewed)
    result = prove(pruned_gemma, against=gemma, vllm="off")
    assert failed(result) == ["logits_native"]
    check = result.failures[0]
    assert check.tolerance == 2**-8
    assert check.measured["relative_difference"] > check.tolerance


def test_proof_runs_where_the_context_is_tiny(tmp_path: Path) -> None:
    config = GPT2Config(
        n_layer=3, n_embd=32, n_head=2, vocab_size=64, n_positions=8, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = save_model(config, tmp_path / "base")
    result = prove(prune_folder(base, tmp_path / "pruned", [1]), against=base, vllm="off")
    assert result.passed, details(result)
    measured = {check.name: check.measured for check in result.checks}
    assert measured["greedy"]["num_tokens"] == 4 * 4


def test_models_are_in_memory_one_at_a_time(
    gemma: Path, pruned_gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[PreTrainedModel]] = []
    alive_at_load: list[int] = []

    def load_watched(*args: Any, **options: Any) -> PreTrainedModel:
        alive_at_load.append(sum(reference() is not None for reference in loaded))
        model = load_model(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(model_checks, "load_model", load_watched)
    assert prove(pruned_gemma, against=gemma, vllm="off").passed
    # Both in fp32, both in bf16.
    assert alive_at_load == [0, 0, 0, 0]
    assert [reference() for reference in loaded] == [None] * 4


def test_nothing_is_published_when_the_proof_fails(llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama)
    layers = LayerMap.from_drop(BaseModel("base", 4, checkpoint.fingerprint), [0])

    def damage_and_prove(folder: Path) -> None:
        flip_a_bit_of_a_kept_weight(folder)
        require(prove(folder, against=llama, vllm="off"))

    with pytest.raises(ProofError, match=r"weights: tensor .* differs from the"):
        compact(checkpoint, layers, tmp_path / "out", prove=damage_and_prove)
    assert list(tmp_path.iterdir()) == []
    compact(
        checkpoint,
        layers,
        tmp_path / "out",
        prove=lambda folder: require(prove(folder, against=llama, vllm="off")),
    )
    assert statuses(prove(tmp_path / "out", vllm="off"))["manifest"] == "passed"


def test_the_folder_is_left_as_it_was(pruned_llama: Path, llama: Path) -> None:
    def listing() -> list[tuple[str, int, int]]:
        files = sorted(pruned_llama.rglob("*"))
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    before = listing()
    prove(pruned_llama, against=llama, vllm="off")
    assert listing() == before


def test_matmul_precision_is_restored(pruned_llama: Path) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        prove(pruned_llama, vllm="off")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_interruption_passes_through(pruned_llama: Path) -> None:
    def interrupt(task: str, completed: int, total: int) -> None:
        if completed == 9:
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        prove(pruned_llama, progress=interrupt, vllm="off")


def test_interruption_inside_a_check_passes_through(pruned_llama: Path) -> None:
    def interrupt(task: str, completed: int, total: int) -> None:
        if task != "prove":
            raise Interrupted(15)

    with pytest.raises(Interrupted):
        prove(pruned_llama, progress=interrupt, vllm="off")


def test_out_of_memory_is_named(pruned_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*args: Any, **options: Any) -> PreTrainedModel:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model_checks, "load_model", exhaust)
    with pytest.raises(RunError, match="out of memory in the proof on cpu"):
        prove(pruned_llama, vllm="off")


def test_what_the_user_asked_wrongly_is_refused(
    pruned_llama: Path, mutable: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a folder"):
        prove(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        prove(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere"):
        prove(pruned_llama, against=tmp_path / "nowhere")
    with pytest.raises(UserError, match="device 'quantum' cannot be used"):
        prove(pruned_llama, device="quantum")
    change_json(mutable / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(UserError, match="--trust-remote-code"):
        prove(mutable)


def test_document_is_plain_json_with_every_check(llama: Path, mutable: Path) -> None:
    poison_a_weight(mutable)
    result = prove(mutable, against=llama, vllm="off")
    document = json.loads(json.dumps(result.to_document(), allow_nan=False))
    assert document["schema_version"] == 1
    assert document["passed"] is False
    assert document["reference"] == open_checkpoint(llama).fingerprint
    by_name = {check["name"]: check for check in document["checks"]}
    assert by_name["forward"]["measured"] == {"logit_scale": "nan"}
    assert by_name["forward"]["passed"] is False
    assert by_name["vllm"] == {
        "name": "vllm",
        "status": "skipped",
        "passed": False,
        "detail": "kv_cache skipped",
        "measured": {},
        "tolerance": None,
    }


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand in for vLLM: transformers' own tokens, of which `served["change"]` may alter one."""
    requests: dict[str, Any] = {"change": None}

    def generate(model: Path, prompts: list[list[int]], **options: Any) -> ServedTokens:
        requests.update(options, prompts=prompts)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokens, logprobs = [], []
        for prompt in prompts:
            row: list[int] = []
            probabilities: list[float] = []
            for _ in range(options["max_new_tokens"]):
                with torch.no_grad():
                    logits = loaded(torch.tensor([prompt + row])).logits[0, -1]
                row.append(int(logits.argmax()))
                probabilities.append(float(logits.log_softmax(-1)[row[-1]]))
            tokens.append(tuple(row))
            logprobs.append(tuple(probabilities))
        if requests["change"] is not None:
            sequence, step = requests["change"]
            row = list(tokens[sequence])
            row[step] = (row[step] + 1) % SHAPE["vocab_size"]
            tokens[sequence] = tuple(row)
        return ServedTokens("vllm-stand-in 1.0", tuple(tokens), tuple(logprobs))

    monkeypatch.setattr(proof, "has_vllm", lambda: True)
    monkeypatch.setattr(model_checks, "generate_greedily", generate)
    return requests


def test_vllm_is_compared_where_it_is_installed(served: dict[str, Any], pruned_llama: Path) -> None:
    result = prove(pruned_llama)
    assert statuses(result)["vllm"] == "passed"
    check = result.checks[-1]
    assert check.measured["num_tokens"] == 5 * 32
    assert check.measured["max_logprob_difference"] < 1e-4
    assert served["load_tokenizer"]
    assert served["kv_cache_memory_bytes"] == 256 * 2**20
    assert [len(prompt) for prompt in served["prompts"][:4]] == [16] * 4


def test_other_tokens_from_vllm_fail(served: dict[str, Any], pruned_llama: Path) -> None:
    served["change"] = (2, 7)
    result = prove(pruned_llama)
    assert failed(result) == ["vllm"]
    assert "random prompt 2, step 7" in details(result)["vllm"]


def test_vllm_that_fails_is_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, pruned_llama: Path
) -> None:
    def refuse(*args: Any, **options: Any) -> ServedTokens:
        raise RunError("vLLM: ValueError: unsupported architecture")

    monkeypatch.setattr(proof, "has_vllm", lambda: True)
    monkeypatch.setattr(model_checks, "generate_greedily", refuse)
    result = prove(pruned_llama)
    assert failed(result) == ["vllm"]
    assert details(result)["vllm"] == "vLLM: ValueError: unsupported architecture"


def test_absent_vllm_is_skipped_and_never_passed(
    monkeypatch: pytest.MonkeyPatch, pruned_llama: Path
) -> None:
    monkeypatch.setattr(proof, "has_vllm", lambda: False)
    monkeypatch.setattr(vllm_process, "has_vllm", lambda: False)
    result = prove(pruned_llama)
    assert statuses(result)["vllm"] == "skipped"
    assert details(result)["vllm"] == "vLLM is not installed"
    with pytest.raises(UserError, match="not installed"):
        prove(pruned_llama, vllm="required")


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    base = save_model(LlamaConfig(**SHAPE, num_hidden_layers=4), tmp_path / "one")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    weight_map = {name: f"part-{number:03d}.safetensors" for number, name in enumerate(tensors)}
    for name, part in weight_map.items():
        save_file({name: tensors[name]}, base / part, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    out = prune_folder(base, tmp_path / "out", [1])
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 8, hard))
    try:
        found = folder_checks.weights(
            open_checkpoint(out),
            read_layer_map(out / "layer_map.json"),
            open_checkpoint(base),
            silent,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(weight_map) > 32
    assert found.measured["num_tensors"] == len(weight_map) - 9
