"""Folders with a config and a tokenizer but no weights: enough to measure speed with random ones.

Speed does not depend on what the weights are, so a model that is not at hand can be measured by
its public shape. Its text and quality say nothing.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.checkpoint import MAX_CONFIG_BYTES, Checkpoint, contained_file, language_config
from trsp.pruner.compaction import copy_companions, find_companions
from trsp.pruner.config_surgery import num_hidden_layers, rewrite_config
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError

# Lists with one entry for each layer that tell layers of different cost apart.
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "moe_layer_freq", "no_rope_layers")


def _llama(**fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **fields,
    }


# The public config.json of each model, without what only text generation reads.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama2-7b": _llama(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        num_hidden_layers=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype="float16",
    ),
    "llama2-13b": _llama(
        hidden_size=5120,
        intermediate_size=13824,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
        num_hidden_layers=40,
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype="float16",
    ),
    "llama3-8b": _llama(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        num_hidden_layers=32,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_id=128001,
        dtype="bfloat16",
    ),
    "opt-13b": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "attention_dropout": 0.0,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "ffn_dim": 20480,
        "hidden_size": 5120,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "tie_word_embeddings": True,
        "vocab_size": 50272,
        "word_embed_proj_dim": 5120,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "dtype": "float16",
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "dtype": "bfloat16",
    },
    # For tests and dry runs: vLLM's offline benchmark draws token ids below 10,000.
    "pico": _llama(
        hidden_size=128,
        intermediate_size=352,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=8,
        vocab_size=10240,
        max_position_embeddings=4096,
        dtype="float32",
    ),
}


def write_shape(
    shape: str | Mapping[str, Any], folder: Path, *, num_layers: int | None = None
) -> Path:
    """Write config.json and a tokenizer of words for a shape, whole or with layers removed.

    The tokenizer has exactly the shape's vocabulary, words t0, t1, ... with spaces between, and no
    special tokens. Text and token ids are one word for one token in both directions, so the prompts
    of `vllm bench serve --dataset-name random` have exactly the tokens asked for.

    Args:
        shape: a name in SHAPES, or a transformers config.
        folder: made when missing; an existing config and tokenizer in it are replaced.
        num_layers: decoder layers to keep, chosen by `spread_layers`; None: all.
    Returns:
        `folder`.
    Raises:
        UserError: no such shape; more layers than it has, or none; a config that cannot be carried
            over to fewer layers; the folder holds weights, which the new config would not fit.
    """
    config = _named(shape) if isinstance(shape, str) else shape
    text = json.dumps(_shortened(config, num_layers), indent=2) + "\n"
    _prepare(folder)
    _write_tokenizer(language_config(config), folder)
    atomic_write(folder / "config.json", text)
    return folder


def copy_config_only(model: Path, folder: Path, *, num_layers: int | None = None) -> Path:
    """Write the shape of a model folder: as `write_shape`, but with the model's own tokenizer.

    `model` needs no weights. Generation config, chat template and licence come along; a model
    without tokenizer files gets the one of words.
    Raises:
        UserError: as `write_shape`; `model` has no readable config.json, or is `folder`.
    """
    if not (model / "config.json").exists():
        raise UserError(f"{model}: has no config.json; give the folder of a model")
    if model.resolve() == folder.resolve():
        raise UserError(f"{folder}: is the model itself; choose another folder for its shape")
    config = read_json_object(contained_file(model, "config.json"), max_bytes=MAX_CONFIG_BYTES)
    text = json.dumps(_shortened(config, num_layers), indent=2) + "\n"
    # Companions are found by the folder's files alone; there are no weights to describe.
    source = Checkpoint(model, config, {}, (), "", num_hidden_layers(config), "", False)
    _prepare(folder)
    copy_companions(source, folder)
    if not any(name.startswith(("tokenizer", "vocab")) for name in find_companions(source)):
        _write_tokenizer(language_config(config), folder)
    atomic_write(folder / "config.json", text)
    return folder


def spread_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The layers to keep, ascending, so that fewer layers are a fair sample of all.

    Which layers go does not matter for speed where all are alike. Where they are of kinds (sliding
    and full attention, dense and sparse), each kind keeps its share of layers, by largest
    remainder; within a kind the kept ones are evenly spaced.
    Raises:
        UserError: not within 1 and the number of layers.
    """
    total = num_hidden_layers(config)
    if not 1 <= num_layers <= total:
        raise UserError(f"{num_layers} layers asked for, the model has {total}; give 1 to {total}")
    kinds = _layer_kinds(config, total)
    shares = {kind: num_layers * count / total for kind, count in Counter(kinds).items()}
    counts = {kind: int(share) for kind, share in shares.items()}
    spare = num_layers - sum(counts.values())
    for kind in sorted(shares, key=lambda kind: counts[kind] - shares[kind])[:spare]:
        counts[kind] += 1
    kept: list[int] = []
    for kind, count in counts.items():
        layers = [layer for layer in range(total) if kinds[layer] == kind]
        kept += [layers[(2 * n + 1) * len(layers) // (2 * count)] for n in range(count)]
    return tuple(sorted(kept))


def _layer_kinds(config: Mapping[str, Any], num_layers: int) -> list[str]:
    """A text for each layer, equal for layers of one kind; what the config class derives counts."""
    from transformers import AutoConfig

    fields = {name: value for name, value in config.items() if name != "model_type"}
    try:
        model_type = str(config.get("model_type"))
        whole = AutoConfig.for_model(model_type, **fields).get_text_config().to_dict()
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"config.json: transformers cannot read it: {error}") from error
    lists = [whole[name] for name in _KINDS if isinstance(whole.get(name), list | tuple)]
    lists = [entries for entries in lists if len(entries) == num_layers]
    return [str([entries[layer] for entries in lists]) for layer in range(num_layers)]


def _named(name: str) -> Mapping[str, Any]:
    if name not in SHAPES:
        raise UserError(f"there is no shape {name!r}; known: {', '.join(sorted(SHAPES))}")
    return SHAPES[name]


def _shortened(config: Mapping[str, Any], num_layers: int | None) -> dict[str, Any]:
    if num_layers is None:
        return dict(config)
    return rewrite_config(dict(config), spread_layers(config, num_layers))[0]


def _prepare(folder: Path) -> None:
    if weights := sorted(folder.glob("*.safetensors*")):
        raise UserError(f"{folder}: holds weights ({weights[0].name}); choose another folder")
    folder.mkdir(parents=True, exist_ok=True)


def _write_tokenizer(config: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer of words; 151,936 of them take 3.6 MB and load in half a second."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size = config.get("vocab_size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"config.json: vocab_size is {size!r}, expected a positive integer")
    # t0 stands for unknown words, as a plain word: a special token would vanish from the text.
    words = models.WordLevel({f"t{n}": n for n in range(size)}, unk_token="t0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
