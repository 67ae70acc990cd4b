"""Opening a checkpoint folder: what it holds, established from its headers before a byte is used.

A checkpoint comes from elsewhere, so nothing in it is taken at its word: names in the index stay in
the folder, the weights hold exactly the layers that the config states, pickles are never opened,
and code is run only when the user said so. Standard library only, but for loading.
"""

import contextlib
import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any

from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.config_surgery import num_draft_layers, num_hidden_layers
from trsp.pruner.errors import UserError
from trsp.pruner.quantization import SIDE_FILES, quantization_method
from trsp.pruner.safetensors_header import Shard, TensorEntry, read_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
QUANTIZATION_FIELDS = ("quantization_config", "compression_config")
# config.json is about 2 kB; the index of a 100,000-tensor checkpoint about 10 MB.
MAX_CONFIG_BYTES = 4 * 2**20
MAX_INDEX_BYTES = 64 * 2**20

_LAYER_NAME = re.compile(r"((?:.*?\.)?(?:layers|h|blocks|block)\.)(0|[1-9][0-9]{0,8})\.")
_NOT_LANGUAGE = re.compile(r"vision|visual|image|audio|speech|video|encoder|draft|mtp")
_MTP = re.compile(r"(^|\.)mtp\.")
_EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight"
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were read and found consistent.

    Attributes:
        path: the folder.
        config: config.json.
        tensors: where each tensor lies, by name.
        shards: the safetensors files, sorted by name.
        layer_prefix: what stands before a decoder layer's number, as in "model.layers.".
        num_hidden_layers: decoder layers, the same in config and weights.
        fingerprint: sha256 (hex) over architecture and tensor names, shapes and dtypes.
        trust_remote_code: whether the user trusts the Python files of this folder.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    shards: tuple[Shard, ...]
    layer_prefix: str
    num_hidden_layers: int
    fingerprint: str
    trust_remote_code: bool

    @property
    def quantization(self) -> str | None:
        """How the weights are quantized, by the config or a file beside it; None: they are not."""
        for part in (self.config, language_config(self.config)):
            for field in QUANTIZATION_FIELDS:
                if isinstance(section := part.get(field), dict):
                    return quantization_method(section)
        return next((name for name in SIDE_FILES if (self.path / name).exists()), None)

    @property
    def has_drafts(self) -> bool:
        """Whether it holds layers for drafting: behind the decoder layers, or under mtp."""
        return any(
            _MTP.search(name) or (self.source_layer(name) or 0) >= self.num_hidden_layers
            for name in self.tensors
        )

    def source_layer(self, tensor_name: str) -> int | None:
        """The number of the layer that a tensor belongs to; None for embeddings, norm and head.

        Draft layers (num_nextn_predict_layers) have numbers from num_hidden_layers on.
        """
        if not tensor_name.startswith(self.layer_prefix):
            return None
        match = _LAYER_NAME.match(tensor_name)
        return int(match[2]) if match and match[1] == self.layer_prefix else None


def open_checkpoint(path: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read the headers of the checkpoint folder `path` and check that they fit together.

    Args:
        trust_remote_code: accept a config whose `auto_map` points to Python code.
    Raises:
        UserError: not a checkpoint of a decoder-only model in safetensors; damaged, incomplete, or
            pointing outside its folder; config and weights differ in their layers; GGUF;
            `auto_map` without `trust_remote_code`. The text names the file.
    """
    path = Path(path)
    if path.suffix == ".gguf" or (path.is_dir() and _is_gguf_only(path)):
        raise UserError(
            f"{path}: GGUF is not read; llama.cpp prunes it: llama-quantize --prune-layers "
            '"$(trsp map MAP --format llama-cpp)", with the layer map of the original checkpoint'
        )
    if not path.is_dir():
        raise UserError(
            f"{path}: is not a folder; give the folder of a checkpoint (config.json and "
            "*.safetensors), one on the hub must be downloaded first"
        )
    config = _read_config(path, trust_remote_code=trust_remote_code)
    shards, tensors = _read_weights(path)
    prefix, num_layers = _find_layers(path, config, tensors)
    return Checkpoint(
        path=path,
        config=config,
        tensors=tensors,
        shards=shards,
        layer_prefix=prefix,
        num_hidden_layers=num_layers,
        fingerprint=_fingerprint(config, tensors),
        trust_remote_code=trust_remote_code,
    )


def _is_gguf_only(path: Path) -> bool:
    return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: `text_config` where there is one."""
    text_config = config.get("text_config")
    return text_config if isinstance(text_config, dict) else config


def contained_file(folder: Path, name: str) -> Path:
    """The path of the file `name` of a checkpoint folder, which no link may lead out of.

    `name` may be in a subfolder, with forward slashes. A link into the `blobs` folder of the hub
    cache that `folder` is a snapshot of is followed.
    Raises:
        UserError: `name` leads out of the folder, by itself or by a link, or is no regular file.
    """
    path, parts = folder / name, name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or set(name) & set("\\\0"):
        raise UserError(f"{folder}: {name!r} is not the name of a file in this folder")
    root = folder.resolve()
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing; fetch the checkpoint again") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: {name!r} cannot be read: {error}") from error
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
        raise UserError(
            f"{path}: is a link out of the checkpoint's folder, to {real}; "
            "copy the file into the folder"
        )
    if not real.is_file():
        raise UserError(f"{path}: is not a regular file")
    return path


def sample_weights(checkpoint: Checkpoint) -> str:
    """A sha256 that tells two checkpoints of one shape apart without reading them whole.

    Taken over 64 blocks of 64 KiB, evenly spaced, of each shard; 4 MiB a shard at most.
    """
    digest = hashlib.sha256()
    for name in sorted({entry.shard for entry in checkpoint.tensors.values()}):
        file = contained_file(checkpoint.path, name)
        size = file.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with file.open("rb") as shard:
            for block in range(64):
                shard.seek(block * size // 64)
                digest.update(shard.read(65536))
    return digest.hexdigest()


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which ours cannot share a terminal with."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: "str | torch.dtype" = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load the model with transformers, offline, in eval mode, and let it fill in nothing.

    Args:
        dtype: "auto" (the config's), a torch dtype or its name, such as "bfloat16".
        device: "cpu", "cuda" or "cuda:N".
    Raises:
        UserError: a parameter is missing from the weights, left over or of another shape, or
            transformers cannot load the checkpoint; device or dtype does not exist.
    """
    import torch

    if checkpoint.quantization is not None:
        raise UserError(
            f"{checkpoint.path}: the weights are quantized ({checkpoint.quantization}): they can "
            "be moved (trsp compact, trsp prune --keep), not computed with; use the unquantized "
            "checkpoint and quantize the result"
        )
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} does not exist; use cpu, cuda or cuda:N") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device!r}: torch sees no such GPU here; use --device cpu")
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise UserError(f"dtype {dtype!r} does not exist; use auto, float32, bfloat16, float16")
        dtype = named
    with _without_bars():
        model, report = _from_pretrained(
            _model_class(checkpoint).from_pretrained,
            checkpoint,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            # So that a parameter of another shape is reported below, by name.
            ignore_mismatched_sizes=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        problems = report.get(kind) or ()
        if kind == "unexpected_keys":
            problems = [name for name in problems if not _is_of_a_draft(checkpoint, name)]
        if problems:
            # A mismatch comes as (name, shape in the file, shape in the model).
            first = min(p if isinstance(p, str) else " ".join(map(str, p)) for p in problems)
            raise UserError(
                f"{checkpoint.path}: config.json and weights disagree: {len(problems)} "
                f"{kind.replace('_', ' ')}, the first is {first}; fetch the checkpoint again"
            )
    loaded: PreTrainedModel = model.to(target).eval()
    return loaded


def _is_of_a_draft(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is of a draft layer, which transformers does not build."""
    layer = checkpoint.source_layer(name)
    return layer is not None and layer >= checkpoint.num_hidden_layers


def _model_class(checkpoint: Checkpoint) -> Any:
    """The auto class for the whole checkpoint: with its image tower, where it has one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    model_type = str(checkpoint.config.get("model_type"))
    with_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    is_whole = with_images in (checkpoint.config.get("architectures") or ())
    if with_images and (is_whole or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_tokenizer(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of the checkpoint with transformers, offline.

    Raises:
        UserError: the folder has no tokenizer files (transformers would make an empty one up), or
            transformers cannot load them.
    """
    from transformers import AutoTokenizer

    if not any(any(checkpoint.path.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise UserError(
            f"{checkpoint.path}: has no tokenizer files (tokenizer.json or the like); "
            "copy those of the model into it"
        )
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(
        AutoTokenizer.from_pretrained, checkpoint, trust_remote_code=trust_remote_code
    )
    return tokenizer


def check_tokenizer(checkpoint: Checkpoint, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that `tokenizer` can be the one that the checkpoint was trained with.

    A smaller vocabulary passes, because embeddings are often padded.
    Raises:
        UserError: a token id has no row in the embedding; or the tokenizer's begin- or end-of-text
            id is not one that config.json or generation_config.json names.
    """
    num_rows = _num_embeddings(checkpoint)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= num_rows:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r}: has token ids up to {largest}, and the model "
            f"{checkpoint.path} has {num_rows} embeddings; use the model's own tokenizer"
        )
    configs = [checkpoint.config, language_config(checkpoint.config)]
    if (checkpoint.path / "generation_config.json").exists():
        file = contained_file(checkpoint.path, "generation_config.json")
        configs.append(read_json_object(file, max_bytes=MAX_CONFIG_BYTES))
    for field in ("bos_token_id", "eos_token_id"):
        token_id = getattr(tokenizer, field)
        stated = {i for config in configs for i in _token_ids(config.get(field))}
        if token_id is not None and stated and token_id not in stated:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r}: its {field} is {token_id}, and the model "
                f"{checkpoint.path} says {sorted(stated)}; use the model's own tokenizer"
            )


def _read_config(path: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """Read config.json and refuse what would load other, quantized or executable things."""
    if not (path / "config.json").exists():
        raise UserError(f"{path}: has no config.json; give the folder of a checkpoint")
    config = read_json_object(contained_file(path, "config.json"), max_bytes=MAX_CONFIG_BYTES)
    where = path / "config.json"
    if (path / "adapter_config.json").exists():
        raise UserError(
            f"{path}: holds an adapter (adapter_config.json); merge it into its base model first"
        )
    if not trust_remote_code:
        files = [("config.json", config)]
        for name in ("tokenizer_config.json", "processor_config.json"):
            if (path / name).exists():
                file = contained_file(path, name)
                files.append((name, read_json_object(file, max_bytes=MAX_INDEX_BYTES)))
        for name, document in files:
            if any("auto_map" in part for part in _objects(document)):
                raise UserError(
                    f"{path / name}: its auto_map asks to run Python code from the checkpoint; "
                    "read that code, then pass --trust-remote-code"
                )
    for part in _objects(config):
        if part.get("transformers_weights") is not None:
            raise UserError(f"{where}: transformers_weights is not supported; remove the field")
    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise UserError(
            f"{where}: architectures is {brief(architectures)}, expected a list of names"
        )
    if config.get("is_encoder_decoder"):
        raise UserError(f"{where}: is_encoder_decoder is true; only decoder-only models are pruned")
    return config


def _read_weights(path: Path) -> tuple[tuple[Shard, ...], dict[str, TensorEntry]]:
    """Read the header of every shard; with an index, it and the shards must tell the same."""
    has_weights, has_index = (path / WEIGHTS_NAME).exists(), (path / INDEX_NAME).exists()
    if has_weights and has_index:
        raise UserError(
            f"{path}: has both {WEIGHTS_NAME} and {INDEX_NAME}; remove the one that is stale"
        )
    if not (has_weights or has_index):
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        if pickles:
            raise UserError(
                f"{path}: has pickle weights only ({pickles[0]}), which can run code when opened "
                "and are never loaded; convert them to safetensors"
            )
        raise UserError(f"{path}: has no weights; expected {WEIGHTS_NAME} or {INDEX_NAME}")
    weight_map = _read_index(path) if has_index else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [WEIGHTS_NAME]
    shards: list[Shard] = []
    tensors: dict[str, TensorEntry] = {}
    for name in names:
        shard, entries = read_header(contained_file(path, name), name)
        shards.append(shard)
        for entry in entries:
            if entry.name in tensors:
                raise UserError(f"{path / name}: tensor {entry.name!r} is in two shards")
            tensors[entry.name] = entry
    if weight_map is not None:
        found = {name: entry.shard for name, entry in tensors.items()}
        for name in sorted(weight_map.keys() | found.keys()):
            if weight_map.get(name) != found.get(name):
                raise UserError(
                    f"{path / INDEX_NAME}: says tensor {name!r} is in {weight_map.get(name)}, and "
                    f"it is in {found.get(name)}; fetch the checkpoint again"
                )
    return tuple(shards), tensors


def _read_index(path: Path) -> dict[str, str]:
    """Read the index's weight_map: base names of safetensors files by tensor name."""
    file = path / INDEX_NAME
    document = read_json_object(
        contained_file(path, INDEX_NAME), max_bytes=MAX_INDEX_BYTES, unique_keys=True
    )
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: has no weight_map; fetch the checkpoint again")
    for name in weight_map.values():
        if not isinstance(name, str) or "/" in name:
            raise UserError(f"{file}: {name!r} is not the name of a file in this folder")
        if not name.endswith(".safetensors"):
            raise UserError(f"{file}: {name!r} is not a safetensors file, the only kind loaded")
    return weight_map


def _find_layers(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> tuple[str, int]:
    """Find the tensors' prefix whose numbers are the layers that the language config states."""
    try:
        num_layers = num_hidden_layers(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    groups: dict[str, set[int]] = {}
    for name in tensors:
        if match := _LAYER_NAME.match(name):
            groups.setdefault(match[1], set()).add(int(match[2]))
    if not groups:
        raise UserError(f"{path}: no tensor is named after a layer, as in model.layers.0.*")
    for prefix in groups:
        # Without is_encoder_decoder in its config such a model would pass for its decoder.
        if prefix.replace("encoder.", "decoder.") in groups.keys() - {prefix}:
            raise UserError(
                f"{path}: has two stacks of layers, an encoder's ({prefix}*) and a decoder's; only "
                "decoder-only models are pruned"
            )
    depths = {num_layers, num_layers + num_draft_layers(config)}
    fitting = [prefix for prefix, layers in groups.items() if _reach(layers) in depths]
    language = [prefix for prefix in fitting if not _NOT_LANGUAGE.search(prefix)]
    # A vision tower may happen to have as many layers as the language model.
    chosen = fitting if len(fitting) == 1 else language
    if len(chosen) == 1:
        return chosen[0], num_layers
    held = "; ".join(
        f"{prefix}* holds {len(layers)} ({_ranges(layers)})" for prefix, layers in groups.items()
    )
    if fitting:
        raise UserError(
            f"{path}: cannot tell which tensors are the {num_layers} decoder layers: {held}; "
            "this architecture is not supported"
        )
    raise UserError(
        f"{path}: config.json says {num_layers} layers, and in the weights {held}; "
        "they must agree, fetch the checkpoint again"
    )


def _reach(layers: set[int]) -> int | None:
    """How many layers there are, where they are numbered from 0 without a gap."""
    return len(layers) if max(layers) == len(layers) - 1 else None


def _fingerprint(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> str:
    description = {
        "architecture": config.get("architectures") or config.get("model_type"),
        "tensors": [[name, tensors[name].dtype, tensors[name].shape] for name in sorted(tensors)],
    }
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()


def _from_pretrained(
    load: Callable[..., Any], checkpoint: Checkpoint, *, trust_remote_code: bool, **options: Any
) -> Any:
    """Call a from_pretrained offline; what it makes of a foreign folder becomes one clear line."""
    import torch

    try:
        return load(
            str(checkpoint.path),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        text = textwrap.shorten(str(error), 500, placeholder=" ...")
        raise UserError(f"{checkpoint.path}: transformers cannot load it: {text}") from error


def _num_embeddings(checkpoint: Checkpoint) -> int:
    """Rows of the input embedding, from the weights or else the config."""
    for name, entry in checkpoint.tensors.items():
        if checkpoint.source_layer(name) is None and _EMBEDDINGS.search(name) and entry.shape:
            return entry.shape[0]
    vocab_size = language_config(checkpoint.config).get("vocab_size")
    if not isinstance(vocab_size, int):
        raise UserError(f"{checkpoint.path}: neither weights nor config.json tell the vocabulary")
    return vocab_size


def _token_ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token_id for token_id in values if type(token_id) is int]


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Go through an object and all objects in it: a config, its text_config and the like."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _objects(child)


def _ranges(numbers: set[int]) -> str:
    """Write numbers as runs: 0-3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
