"""Calibration text that the dense model writes itself: `--data self`, no user data at all.

Tokens are drawn one by one at temperature 1 from the model's whole distribution, so that a
sequence is a sample of what the model has learnt: no temperature, no top-p, nothing suppressed but
ids that the tokenizer does not have (rows that pad an embedding). LLM-QAT (arXiv 2305.17888) and
self-calibration (arXiv 2410.17170) calibrate on a model's own text too.

A sequence begins as a document does: with bos where the tokenizer puts it before texts, else with
eos, which stands between the documents of calibration text (calibration.py), else with bos; a
model that knows neither starts with a token drawn from all ordinary ones. Where eos is drawn the
document ends and another one begins behind it, with bos where documents begin so: suppressing eos
would force the model on where it has nothing more to say, and stopping would leave short sequences.

Each token is drawn by one number in [0, 1) that depends on the seed and its place alone (inverse
of the cumulative distribution, in float64). Batches, threads and devices thus change a token only
where they change the model's last bits; as one token changes all behind it, a run keeps what it
drew.

N: sequences, T: tokens of one, B: sequences of a batch, V: ids of the tokenizer.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trsp.pruner.calibration import CalibrationSet, sequence_length
from trsp.pruner.checkpoint import Checkpoint, sample_weights
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.families import text_config
from trsp.pruner.progress import Progress, silent
from trsp.pruner.recipe import Recipe
from trsp.pruner.token_ids import hash_ids, hash_tokenizer, starts_with_bos

SELF = "self"
_MAX_BATCH = 32
_CACHE_BYTES = 8 * 2**30


def is_self(data: Sequence[str | Path]) -> bool:
    """Whether calibration data is the word `self`: text that the dense model writes.

    Raises:
        UserError: files are named beside it.
    """
    words = [str(item) for item in data]
    if SELF in words and len(words) > 1:
        others = ", ".join(word for word in words if word != SELF) or SELF
        raise UserError(
            f"calibration data: {SELF} (text that the model writes) stands alone, not beside "
            f"{others}; choose one (a file of that name is written ./{SELF})"
        )
    return words == [SELF]


@dataclass(frozen=True)
class SelfTextKey:
    """All that decides the tokens, but for the last bits of the model's arithmetic."""

    weights_sha256: str
    tokenizer_sha256: str
    num_sequences: int
    sequence_length: int
    seed: int

    @property
    def digest(self) -> str:
        """A name for files: 32 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:32]


def self_text_key(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, seed: int
) -> SelfTextKey:
    """The key of what a recipe asks the checkpoint's model for; UserError as sequence_length."""
    return SelfTextKey(
        weights_sha256=sample_weights(checkpoint),
        tokenizer_sha256=hash_tokenizer(tokenizer),
        num_sequences=recipe.calibration.num_sequences,
        sequence_length=sequence_length(checkpoint, recipe.calibration.sequence_length),
        seed=seed,
    )


@torch.no_grad()
def sample_self_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    key: SelfTextKey,
    *,
    progress: Progress = silent,
) -> CalibrationSet:
    """Let the model write a calibration set [N, T]; its source is ("self",).

    Args:
        model: the dense model, in eval mode.
        key: N, T, within the model's context, and the seed; the first sequences of a larger N are
            those of a smaller one.
        progress: task "sampling text", in tokens of N * T.
    Raises:
        UserError: the model keeps no cache, or the tokenizer is another model's.
        RunError: its logits are not finite, or memory is out.
    """
    num_sequences, length = key.num_sequences, key.sequence_length
    generator = torch.Generator().manual_seed(key.seed)
    drawer = _Drawer(model, tokenizer)
    starts = drawer.starts(num_sequences, generator)
    size = (num_sequences, length - 1)
    chances = torch.rand(size, generator=generator, dtype=torch.float64)
    batch_size = _batch_size(model, length)
    total = num_sequences * length
    batches = []
    for begin in range(0, num_sequences, batch_size):
        part = slice(begin, begin + batch_size)
        batch = starts[part, None].to(model.device)
        cache: Any = None
        for place in range(length - 1):
            progress("sampling text", begin * length + batch.numel(), total)
            try:
                output = model(batch[:, -1:], past_key_values=cache, use_cache=True)
            except torch.OutOfMemoryError as error:
                raise RunError(
                    f"out of memory in sampling text, {len(batch)} sequences of "
                    f"{length} tokens at a time: take shorter ones "
                    "(--set calibration.sequence_length=N)"
                ) from error
            cache = output.past_key_values
            if cache is None:
                raise UserError(
                    f"{type(model).__name__} keeps no cache of keys and values: it cannot write "
                    "text at a bearable cost; give calibration text with --data"
                )
            drawn = drawer.draw(output.logits[:, -1], chances[part, place].to(model.device))
            batch = torch.cat([batch, drawer.after(batch[:, -1], drawn)[:, None]], dim=1)
        if not bool(drawer.finite):
            raise RunError("the dense model's logits are not finite: no text can be drawn from it")
        batches.append(batch.cpu())
    progress("sampling text", total, total)
    input_ids = torch.cat(batches)
    return CalibrationSet(
        input_ids=input_ids,
        source=(SELF,),
        sha256=hash_ids(input_ids),
        seed=key.seed,
        add_bos=drawer.first is not None and drawer.first == tokenizer.bos_token_id,
    )


class _Drawer:
    """How documents begin, end and go on with one model and tokenizer.

    Attributes:
        first: the id that a document begins with; None: one drawn from all ordinary ones.
        finite: [] bool on the model's device: all logits so far were.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        with_bos = starts_with_bos(tokenizer)
        self.first: int | None = bos if with_bos or self._eos is None else self._eos
        # Behind eos comes bos where documents begin with it; where eos is both, it has been drawn.
        self._reopened = bos if with_bos and bos != self._eos else None
        vocabulary = sorted(set(tokenizer.get_vocab().values()))
        if vocabulary[-1] >= text_config(model).vocab_size:
            raise UserError(
                f"the tokenizer has token {vocabulary[-1]}, the model knows "
                f"{text_config(model).vocab_size} of them: the tokenizer is another model's"
            )
        self._ids = torch.tensor(vocabulary, device=model.device)
        self._ordinary = torch.tensor(sorted(set(vocabulary) - set(tokenizer.all_special_ids)))
        self.finite = torch.ones((), dtype=torch.bool, device=model.device)

    def starts(self, count: int, generator: torch.Generator) -> Tensor:
        """The first token of each of `count` sequences, [N]."""
        if self.first is not None:
            return torch.full((count,), self.first)
        return self._ordinary[torch.randint(len(self._ordinary), (count,), generator=generator)]

    def draw(self, logits: Tensor, chances: Tensor) -> Tensor:
        """One id [B] for each row of logits [B, rows of the embedding], by chances [B] in [0, 1).

        The i-th id of the vocabulary is drawn where the chance lies between the sum of the
        probabilities before it and the sum with its own.
        """
        sums = logits[:, self._ids].double().softmax(dim=-1).cumsum(dim=-1)
        self.finite &= sums[:, -1].isfinite().all()
        # By the last sum, which is 1 but for rounding: an id of no probability is never drawn.
        places = torch.searchsorted(sums, (chances * sums[:, -1])[:, None], right=True)
        return self._ids[places[:, 0].clamp(max=len(self._ids) - 1)]

    def after(self, last: Tensor, drawn: Tensor) -> Tensor:
        """What comes after the tokens `last` [B]: `drawn` [B], or a document's begin after eos."""
        if self._reopened is None:
            return drawn
        return torch.where(last == self._eos, self._reopened, drawn)


def _batch_size(model: PreTrainedModel, sequence_length: int) -> int:
    """How many sequences are drawn at a time: 32, or less where their cache would pass 8 GiB.

    Free memory does not decide it: another batch size can change the last bits.
    """
    config = text_config(model)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    token = 2 * config.num_hidden_layers * kept * width * model.dtype.itemsize
    return max(1, min(_MAX_BATCH, _CACHE_BYTES // int(token * sequence_length)))


def write_self_text(path: Path, calibration: CalibrationSet, key: SelfTextKey) -> None:
    """Keep what was drawn in a safetensors file, replaced whole."""
    about = {**asdict(key), "add_bos": calibration.add_bos, "sha256": calibration.sha256}
    metadata = {"trsp_self_text": json.dumps(about)}
    atomic_write(path, save({"input_ids": calibration.input_ids.contiguous()}, metadata))


def read_self_text(path: Path, key: SelfTextKey) -> CalibrationSet | None:
    """What write_self_text kept, or None where there is no such file.

    Raises:
        UserError: it was drawn by another key, named.   RunError: the file is damaged.
    """
    if not path.is_file():
        return None
    damaged = f"{path} is damaged: start anew with --overwrite"
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["trsp_self_text"])
            input_ids = file.get_tensor("input_ids")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(damaged) from error
    if hash_ids(input_ids) != about.get("sha256"):
        raise RunError(damaged)
    for name, value in asdict(key).items():
        if about.get(name) != value:
            raise UserError(
                f"{path} was written with another {name}; go on with the same settings, or start "
                "anew with --overwrite"
            )
    return CalibrationSet(input_ids, (SELF,), about["sha256"], key.seed, about["add_bos"])
