"""A pico model of each family on disk, as its users have it: sharded or not, with a tokenizer.

Random weights, large enough that every layer changes the logits.
"""

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trsp.bench.pico_families import MULTIMODAL, PICO_CONFIGS, VOCAB_SIZE

_WEIGHT_SCALE = 0.15
_SPECIAL = ("<pad>", "<s>", "</s>")
# Ids from here on stand for images in the multimodal configurations.
_VOCAB_SIZE = 280


def make_pico_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """The pico model of a family with random weights, in fp32 and eval mode.

    Args:
        name: a key of PICO_CONFIGS.
    """
    config = PICO_CONFIGS[name]()
    kind: Any = (
        transformers.AutoModelForImageTextToText
        if name in MULTIMODAL
        else transformers.AutoModelForCausalLM
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # A norm's weight stays near what it was: 1, or 0 where 1 is added.
                center = parameter.mean() if parameter.ndim == 1 else 0.0
                parameter.copy_(torch.randn_like(parameter) * _WEIGHT_SCALE + center)
    return model


def write_pico_checkpoint(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    seed: int = 0,
) -> None:
    """Write a family's pico model and a tokenizer to `folder`, as transformers saves them."""
    model = make_pico_model(name, seed=seed).to(dtype)  # type: ignore[arg-type]
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    pico_tokenizer().save_pretrained(folder)


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges; ids 0, 1 and 2 are pad, begin and end of text.

    Byte-level, because transformers reads the tokenizers of some model types as such, whatever
    their files say.
    """
    assert _VOCAB_SIZE < VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE, special_tokens=list(_SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator([pico_text(2000)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def pico_text(num_words: int, *, seed: int = 0) -> str:
    """Numbers as words, the next one depending on the last."""
    generator, word, words = random.Random(seed), 0, []
    for _ in range(num_words):
        word = (word + generator.choice((1, 1, 1, 7, 40))) % 100
        words.append(f"w{word}")
    return " ".join(words)
