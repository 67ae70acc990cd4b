"""The speed of plain transformers, by the protocol that the paper measured with; no engine.

A prompt of 1 x 2048 tokens for the throughput of prompt processing, and 64 prompts of 64 tokens
with 128 new ones each for generation. The paper reports 1.31 x and 1.35 x for OPT-13B, 1.30 x and
1.33 x for LLaMA2-13B, with 25 % of the layers removed.

B sequences of one batch, T tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.errors import RunError, UserError

if TYPE_CHECKING:
    from torch import Tensor

LoadFormat = Literal["auto", "dummy"]
Metrics = dict[str, float]


@dataclass(frozen=True)
class PaperProtocol:
    """Lengths in tokens.

    Attributes:
        warmups: whole measurements thrown away after each load of a model.
        prompts: different prompts timed for one figure of prompt processing, which is their
            median; one more is thrown away first. A generation is long enough alone.
    """

    prompt_tokens: int = 2048
    batch_size: int = 64
    input_len: int = 64
    output_len: int = 128
    warmups: int = 2
    prompts: int = 5

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "batch_size", "input_len", "output_len", "prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.warmups < 0:
            raise UserError(f"warmups is {self.warmups}, expected 0 or more")

    @property
    def context(self) -> int:
        """The most positions a sequence takes."""
        return max(self.prompt_tokens, self.input_len + self.output_len)


def measure_prompt(model: Any, protocol: PaperProtocol, *, device: str, seed: int) -> Metrics:
    """Time prompts of random tokens drawn from `seed`, one by one; logits for the last token alone.

    Returns:
        prompt_latency_s, the median; prompt_throughput (prompt tokens/s), from it.
    """
    import torch

    prompts = _drawn(model, (1 + protocol.prompts, protocol.prompt_tokens), device, seed)
    times = []
    with torch.inference_mode():
        for prompt in prompts.split(1):
            taken, _ = _timed(
                device, partial(model, input_ids=prompt, use_cache=True, logits_to_keep=1)
            )
            times.append(taken)
    seconds = median(times[1:])
    return {"prompt_latency_s": seconds, "prompt_throughput": protocol.prompt_tokens / seconds}


def measure_generation(model: Any, protocol: PaperProtocol, *, device: str, seed: int) -> Metrics:
    """Time one batch of generations from random tokens drawn from `seed`.

    Greedy, with a KV cache, not ended by an end-of-text token.
    Returns:
        generation_latency_s (its prompts included), generation_throughput (new tokens/s over the
        batch).
    Raises:
        RunError: a sequence did not get exactly `output_len` new tokens.
    """
    import torch

    batch = _drawn(model, (protocol.batch_size, protocol.input_len), device, seed)
    with torch.inference_mode():
        seconds, tokens = _timed(
            device,
            lambda: model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=protocol.output_len,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
            ),
        )
    expected = (protocol.batch_size, protocol.input_len + protocol.output_len)
    if tuple(tokens.shape) != expected:
        raise RunError(
            f"generation gave {tokens.shape[1] - protocol.input_len} new tokens for"
            f" {tokens.shape[0]} sequences, expected {protocol.output_len} for"
            f" {protocol.batch_size}; the measurement does not count"
        )
    count = protocol.batch_size * protocol.output_len
    return {"generation_latency_s": seconds, "generation_throughput": count / seconds}


def load_arm(
    folder: Path, *, load_format: LoadFormat = "auto", dtype: str = "auto", device: str = "cpu"
) -> Any:
    """Load a model in eval mode, without its generation settings, which could change the work.

    Args:
        load_format: "auto" reads the checkpoint; "dummy" needs config.json alone and fills the
            weights with random numbers on the device: matrices with a deviation of 0.02, norms
            with 1, biases with 0. Numbers of real size, because power draw, and with it the clock,
            follows the data.
        dtype: "auto" (the config's) or a torch name.
    Raises:
        UserError: no such model, dtype, device or load format; damaged weights.
    """
    from transformers import GenerationConfig

    if load_format == "auto":
        model: Any = load_model(open_checkpoint(folder), dtype=dtype, device=device)
    elif load_format == "dummy":
        model = _random_model(folder, dtype, device)
    else:
        raise UserError(f"load format {load_format!r} does not exist; use auto or dummy")
    model.generation_config = GenerationConfig()
    return model


def _random_model(folder: Path, dtype: str, device: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: has no config.json; give the folder of a model")
    named = None if dtype == "auto" else getattr(torch, dtype, None)
    if dtype != "auto" and not isinstance(named, torch.dtype):
        raise UserError(f"dtype {dtype!r} does not exist; use auto, float32, bfloat16, float16")
    target = _device(device)
    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        # Buffers such as rotary frequencies are computed here; parameters are not.
        with target, no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=named or config.dtype)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: transformers cannot build the model: {error}") from error
    # It is part of the initialization that was left out.
    model.tie_weights()
    generator = torch.Generator(target).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)
    return model.eval()


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} does not exist; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: torch sees no such GPU here; use --device cpu")
    return device


def require_positions(folder: Path, protocol: PaperProtocol) -> None:
    """Refuse a model whose positions do not suffice.   Raises: UserError."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and protocol.context > positions:
        raise UserError(
            f"{folder}: has {positions} positions and the protocol needs {protocol.context}; give "
            "smaller --prompt-tokens, --input-len or --output-len"
        )


def _drawn(model: Any, shape: tuple[int, int], device: str, seed: int) -> "Tensor":
    import torch

    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator).to(device)


def _timed(device: str, function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the work is done, not until it is launched, and the result."""
    synchronize(device)
    started = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - started, result


def synchronize(device: str) -> None:
    """Wait for a GPU's work; nothing on a CPU."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
