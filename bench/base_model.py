"""Small Llama-shaped language models trained from nothing, so that pruning has a real subject.

T: tokens of one sequence, B: sequences of one step, N: tokens of the whole stream.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trsp.pruner.errors import RunError, UserError
from trsp.pruner.progress import Progress, silent

END_OF_TEXT = "<|endoftext|>"
HEAD_DIM = 64
Precision = Literal["fp32", "bf16"]
_WARMUP_PART = 0.05
_FINAL_SHARE = 0.05


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step as it was taken: loss in nats per token, time since the first step."""

    step: int
    loss: float
    learning_rate: float
    num_tokens: int
    elapsed_s: float

    def as_record(self) -> dict[str, float]:
        """Return the fields as a JSON-ready mapping."""
        return asdict(self)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts always give the same tokenizer.

    Args:
        texts: documents; read once, in pieces cut at line ends.
        vocab_size: number of tokens, counting the 256 bytes and `<|endoftext|>` (id 0), which is
            both bos and eos and is never added on its own.
    Raises:
        UserError: the texts are too short to give that many tokens, or vocab_size is under 257.
    """
    if vocab_size < 257:
        raise UserError(
            f"vocab_size {vocab_size} is too small: a byte-level tokenizer has at least 257 tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"the text gives only {tokenizer.get_vocab_size()} tokens, vocab_size {vocab_size} was"
            " asked for; give more text or a smaller vocab_size"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> Tensor:
    """Return one stream of token ids, [N] int64: each document, then eos.

    A document is encoded in pieces cut at line ends, so that a whole book does not pass through
    the tokenizer as one string (slow, and on one core).
    """
    ids: list[int] = []
    for document in documents:
        pieces = list(_pieces(document))
        for piece_ids in tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else ():
            ids.extend(piece_ids)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.long)


def base_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_hidden_layers: int,
    hidden_size: int,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 1024,
) -> LlamaConfig:
    """Return a Llama shape for that tokenizer: heads of 64, tied embeddings, SwiGLU of 8/3 width.

    Args:
        hidden_size: a multiple of 64.
        intermediate_size: the MLP's width; by default 8/3 of hidden_size, rounded up to 32.
    Raises:
        UserError: hidden_size is not a multiple of 64, or there is no layer.
    """
    if hidden_size < HEAD_DIM or hidden_size % HEAD_DIM:
        raise UserError(f"hidden_size {hidden_size} is not a multiple of the head size {HEAD_DIM}")
    if num_hidden_layers < 1:
        raise UserError(f"num_hidden_layers is {num_hidden_layers}; at least 1 is needed")
    num_heads = hidden_size // HEAD_DIM
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 32 * math.ceil(hidden_size / 12),
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_base_model(
    token_ids: Tensor,
    config: LlamaConfig,
    *,
    num_steps: int | None = None,
    minutes: float | None = None,
    batch_size: int = 8,
    sequence_length: int = 256,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.1,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    precision: Precision = "fp32",
    compile_layers: bool = False,
    device: str = "cpu",
    progress: Progress = silent,
    log: Callable[[TrainingStep], None] | None = None,
) -> LlamaForCausalLM:
    """Train a Llama-shaped model from random weights on one stream of tokens.

    Muon on the layers' matrices, AdamW on the rest: after 256k tokens of English a 12-layer model
    of width 192 stood at a loss of 5.57, with AdamW alone at 6.53 (same seed, rate and batches).
    The learning rate warms up over 5 % of the run and falls along a cosine to 5 %. Windows are
    drawn without replacement until the text is used up, then again at another offset. With
    `num_steps`, the same arguments, thread count and machine give the same weights, bit for bit;
    with `minutes` the schedule follows the clock.

    Args:
        token_ids: [N] int64, at least sequence_length + 1 of them, below config.vocab_size.
        num_steps, minutes: the length of the run; exactly one of them.
        learning_rate: the peak of the schedule.
        precision: "bf16" runs matrix products in bf16 under autocast; weights stay fp32.
        compile_layers: torch.compile the decoder stack (needs a C++ compiler).
        device: where it trains; the weights it begins with do not depend on it.
        progress: called after each step; with `minutes` it counts seconds.
        log: called after each step with what it did.
    Returns:
        The model in eval mode, fp32, on that device.
    Raises:
        UserError: arguments that cannot be trained with.   RunError: the loss is not finite.
    """
    _check_run(token_ids, config, num_steps, minutes, batch_size, sequence_length)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.to(device)  # type: ignore[arg-type]
    model.train()
    if compile_layers:
        model.model.compile()
    optimizers = _optimizers(model, weight_decay)
    windows = _windows(token_ids, batch_size, sequence_length, generator)
    start = time.monotonic()
    step, part = 0, 0.0
    while part < 1:
        step_rate = learning_rate * _schedule(part)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = step_rate
        loss = _loss(model, next(windows).to(device), precision)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        taken = TrainingStep(
            step=step,
            loss=loss.item(),
            learning_rate=step_rate,
            num_tokens=step * batch_size * sequence_length,
            elapsed_s=time.monotonic() - start,
        )
        if not math.isfinite(taken.loss):
            raise RunError(f"loss is {taken.loss} at step {step}; lower the learning rate")
        if log is not None:
            log(taken)
        if num_steps is not None:
            part = step / num_steps
            progress("train", step, num_steps)
        elif minutes is not None:
            part = taken.elapsed_s / (60 * minutes)
            progress("train", min(int(taken.elapsed_s), int(60 * minutes)), int(60 * minutes))
    model.eval()
    return model


def _loss(model: LlamaForCausalLM, batch: Tensor, precision: Precision) -> Tensor:
    """Mean next-token loss of [B, T + 1] ids, taken in fp32."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16"):
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def _optimizers(model: LlamaForCausalLM, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in inner}
    outer = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(inner, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _schedule(part: float) -> float:
    """Share of the peak learning rate when `part` of the run is done: linear up, cosine down."""
    if part < _WARMUP_PART:
        return (part + 0.01) / (_WARMUP_PART + 0.01)
    fall = (part - _WARMUP_PART) / (1 - _WARMUP_PART)
    return _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * fall))


def _windows(
    token_ids: Tensor, batch_size: int, sequence_length: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield [B, T + 1] batches forever, each window once a pass, passes at their own offset."""
    span = sequence_length + 1
    waiting = token_ids.new_empty(0)
    while True:
        spare = min(sequence_length, len(token_ids) - span)
        offset = int(torch.randint(spare + 1, (), generator=generator))
        num_windows = (len(token_ids) - offset - 1) // sequence_length
        order = torch.randperm(num_windows, generator=generator)
        waiting = torch.cat([waiting, offset + sequence_length * order])
        while len(waiting) >= batch_size:
            starts, waiting = waiting[:batch_size], waiting[batch_size:]
            yield token_ids[starts[:, None] + torch.arange(span)]


def _pieces(document: str, num_chars: int = 20_000) -> Iterator[str]:
    """Cut a document at line ends into pieces of at least num_chars, the last one shorter."""
    piece: list[str] = []
    length = 0
    for line in document.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= num_chars:
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)


def _check_run(
    token_ids: Tensor,
    config: LlamaConfig,
    num_steps: int | None,
    minutes: float | None,
    batch_size: int,
    sequence_length: int,
) -> None:
    """Refuse what cannot be trained with."""
    if (num_steps is None) == (minutes is None):
        raise UserError("give the length of the run either as num_steps or as minutes")
    if (num_steps if num_steps is not None else minutes or 0) <= 0:
        raise UserError(f"the run has no length: num_steps {num_steps}, minutes {minutes}")
    if batch_size < 1 or sequence_length < 1:
        raise UserError(
            f"batch_size {batch_size} and sequence_length {sequence_length} must be at least 1"
        )
    if sequence_length > config.max_position_embeddings:
        raise UserError(
            f"sequence_length {sequence_length} is longer than the model's context,"
            f" {config.max_position_embeddings}"
        )
    if token_ids.ndim != 1 or token_ids.dtype != torch.long:
        raise UserError(
            f"token_ids must be one stream [N] of int64,"
            f" not {list(token_ids.shape)} of {token_ids.dtype}"
        )
    if len(token_ids) <= sequence_length:
        raise UserError(
            f"the text has {len(token_ids)} tokens; a window of {sequence_length} needs"
            f" {sequence_length + 1}"
        )
    if int(token_ids.max()) >= config.vocab_size:
        raise UserError(
            f"token id {int(token_ids.max())} is outside the vocabulary of {config.vocab_size}"
        )
