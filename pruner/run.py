"""One run: its inputs, checked, and the two stages that train, each from where it stopped."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trsp.pruner.calibration import (
    CalibrationSet,
    build_calibration,
    sequence_length,
    stated_context,
)
from trsp.pruner.checkpoint import (
    Checkpoint,
    check_tokenizer,
    load_model,
    load_tokenizer,
    open_checkpoint,
    sample_weights,
)
from trsp.pruner.compaction import copy_companions
from trsp.pruner.config_surgery import layers_that_must_stay, rewrite_config
from trsp.pruner.cost import StageCost
from trsp.pruner.durable import publish_folder, require_free_space
from trsp.pruner.errors import Interrupted, RunError, UserError
from trsp.pruner.layer_map import BaseModel, LayerMap, read_layer_map, write_layer_map
from trsp.pruner.progress import Progress, silent
from trsp.pruner.recipe import Recipe
from trsp.pruner.run_folder import RunFolder
from trsp.pruner.selection import check_target, select_layers
from trsp.pruner.self_text import (
    SelfTextKey,
    is_self,
    read_self_text,
    sample_self_text,
    self_text_key,
    write_self_text,
)
from trsp.pruner.text_checks import (
    WARNED_SHARE,
    TextFindings,
    bits_per_byte,
    bytes_per_token,
    describe_overlap,
    overlap,
    refuse_same_files,
    require_no_overlap,
)
from trsp.pruner.text_files import find_files, read_texts
from trsp.pruner.token_ids import starts_with_bos
from trsp.pruner.transfer import NUM_MEASURED_SEQUENCES, TransferState, transfer
from trsp.pruner.windows import check_settings, default_window, require_a_window, token_stream


@dataclass
class Run:
    """One run's inputs and the folder it works in."""

    model: Path
    recipe: Recipe
    folder: RunFolder
    trust_remote_code: bool = False
    progress: Progress = silent
    check: Callable[[], None] = lambda: None
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: TextFindings = field(default_factory=TextFindings)

    def __post_init__(self) -> None:
        self.checkpoint = open_checkpoint(self.model, trust_remote_code=self.trust_remote_code)
        self.device = resolve_device(self.recipe.device)
        # A search resolves the recipe; the one that was asked for makes the same model again.
        self.asked = self.recipe

    @contextmanager
    def stage(self, name: str, device: str | None = None) -> Iterator[None]:
        """Measure a stage (of a resumed run: its last leg); say what helps against no memory."""
        with StageCost(device or self.device) as cost:
            try:
                yield
            except torch.OutOfMemoryError as error:
                raise RunError(
                    f"out of memory in {name}: go on with --resume --set "
                    "transfer.micro_batch_size=1 --set transfer.checkpoint_activations=true; "
                    "where 16 bytes a parameter do not fit, start anew with --set "
                    "transfer.lora.rank=16; where local distillation does not (16 bytes for each "
                    "parameter of the layers that learn), with --set transfer.closing=at_once "
                    "(in selection: a smaller selection.batch_size)"
                ) from error
        self.costs[name] = cost.to_document()

    def load(self, dtype: str = "auto") -> PreTrainedModel:
        return load_model(
            self.checkpoint,
            dtype=torch.float32 if dtype == "fp32" else "auto",
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(self.checkpoint, trust_remote_code=self.trust_remote_code)
        check_tokenizer(self.checkpoint, tokenizer)
        return tokenizer

    def calibration(self, *, resume: bool = False) -> CalibrationSet | None:
        """The calibration sequences, or None where the recipe names no text.

        Args:
            resume: text that the model wrote is what keep_calibration kept.
        """
        recipe = self.recipe.calibration
        if not recipe.data:
            return None
        if self.writes_text:
            return self._self_text(self._self_text_key(), resume=resume)
        return build_calibration(
            recipe.data,
            self.tokenizer(),
            num_sequences=recipe.num_sequences,
            sequence_length=sequence_length(self.checkpoint, recipe.sequence_length),
            seed=self.recipe.seed,
            text_field=recipe.text_field,
            progress=self.progress,
        )

    @property
    def writes_text(self) -> bool:
        """Whether the dense model writes the calibration text: `--data self`."""
        return is_self(self.recipe.calibration.data)

    def _self_text(self, key: SelfTextKey, *, resume: bool) -> CalibrationSet:
        kept = read_self_text(self.folder.self_text, key) if resume else None
        if kept is not None:
            self.costs["self text"] = (self.folder.read_record("self_text_record") or {})["cost"]
            return kept
        with StageCost(self.device) as cost:
            drawn = sample_self_text(self.load(), self.tokenizer(), key, progress=self.progress)
            free_memory()
        self.costs["self text"] = cost.to_document()
        return drawn

    def keep_calibration(self, calibration: CalibrationSet | None) -> None:
        """Keep text that the model wrote: drawn again, it could differ. Files are read again."""
        if calibration is not None and self.writes_text and not self.folder.self_text.is_file():
            self.folder.write_record("self_text_record", {"cost": self.costs["self text"]})
            write_self_text(self.folder.self_text, calibration, self._self_text_key())

    def _self_text_key(self) -> SelfTextKey:
        return self_text_key(self.checkpoint, self.tokenizer(), self.recipe, self.recipe.seed)

    def base_model(self) -> BaseModel:
        return base_model_of(self.checkpoint)

    def check_target(self) -> None:
        """Refuse what could only be refused after stage 1: the number of layers, the config."""
        num_layers = self.checkpoint.num_hidden_layers
        count = self.recipe.deepest_to_remove(num_layers, self.needed_layers())
        protected = self.protected_layers()
        check_target(num_layers, count, protected)
        removable = [layer for layer in range(num_layers) if layer not in protected]
        trial = sorted(set(range(num_layers)) - set(removable[:count]))
        rewrite_config(dict(self.checkpoint.config), trial)

    def require_trainable(self) -> None:
        """Refuse text for quantized weights; say what training does to draft layers."""
        if not self.recipe.calibration.data:
            return
        if self.checkpoint.quantization is not None:
            raise UserError(
                f"{self.checkpoint.path}: the weights are quantized "
                f"({self.checkpoint.quantization}), and neither stage can run on them; prune the "
                "unquantized checkpoint and quantize the result, or name the layers (--keep, "
                "--map) and give no text"
            )
        if self.recipe.transfer.enabled and self.checkpoint.has_drafts:
            self.texts.warnings.append(
                "layers for drafting (num_nextn_predict_layers, mtp) are not carried through stage "
                "2: transformers does not load them; serve the result without speculative decoding"
            )

    def protected_layers(self) -> frozenset[int]:
        """Layers that no selection takes: the recipe's, and those that the family needs."""
        return (
            self.recipe.protected_layers(self.checkpoint.num_hidden_layers) | self.needed_layers()
        )

    def needed_layers(self) -> frozenset[int]:
        """Layers that the model's family needs, whatever the recipe protects."""
        return frozenset(layers_that_must_stay(self.checkpoint.config))

    def refuse_same_files(self) -> None:
        """Refuse held-out files that are calibration files, before anything is tokenized."""
        recipe = self.recipe
        texts = (recipe.calibration.data, recipe.evaluation.data)
        if self.writes_text:
            find_files(recipe.evaluation.data)  # one that is missing, before the model writes
        elif all(texts) and not recipe.evaluation.allow_overlap:
            refuse_same_files(*texts)

    def check_evaluation_text(self, calibration: CalibrationSet | None) -> None:
        """Read the held-out text once: a mistake in it, or of it, must not cost the run."""
        recipe, text_field = self.recipe.evaluation, self.recipe.calibration.text_field
        if recipe.data and calibration is None:
            for _ in read_texts(recipe.data, text_field, progress=self.progress):
                pass
        elif recipe.data and calibration is not None:
            tokenizer = self.tokenizer()
            held_out = token_stream(
                recipe.data,
                tokenizer,
                max_tokens=recipe.max_tokens,
                text_field=text_field,
                progress=self.progress,
            ).ids
            context = stated_context(self.checkpoint)
            window = recipe.window or default_window(context)
            held = window - starts_with_bos(tokenizer)
            check_settings(window, recipe.stride or held, held, 1, recipe.max_tokens, context)
            require_a_window(len(held_out), held)
            # What the model wrote was trained on by nobody's mistake: a warning, no refusal.
            allowed = recipe.allow_overlap or self.writes_text
            check = overlap if allowed else require_no_overlap
            found = check(calibration.input_ids, held_out)
            self.texts.overlap = found
            self.texts.held_out_bytes = bytes_per_token(tokenizer, held_out)
            if found.share > WARNED_SHARE or found.too_much:
                self.texts.warnings.append(describe_overlap(found, held_out, tokenizer))

    def measure_calibration_text(
        self, calibration: CalibrationSet, transfer_record: dict[str, Any] | None
    ) -> None:
        """Keep how well the dense model knows the calibration text; a stage has measured it."""
        loss = (self.folder.read_record("selection_record") or {}).get("dense_loss")
        count = self.recipe.selection.verification_sequences
        if loss is None and transfer_record is not None:
            loss, count = transfer_record["loss_dense"], NUM_MEASURED_SEQUENCES
        if loss is not None:
            num_bytes = bytes_per_token(self.tokenizer(), calibration.input_ids[:count])
            self.texts.own_text = self.writes_text
            self.texts.calibration_bits = bits_per_byte(loss, num_bytes)

    def require_disk(self, *, trained: bool) -> None:
        """Check the space for the output and, with stage 2, its state and its result."""
        weights = sum(entry.end - entry.begin for entry in self.checkpoint.tensors.values())
        needed = weights
        if trained:
            parameters = sum(math.prod(e.shape) for e in self.checkpoint.tensors.values())
            full = self.recipe.transfer.lora is None
            needed += weights + (3 * 4 * parameters if full else 0)
            if self.recipe.auto is not None:  # the best transfer so far, beside the one under way
                needed += weights
        require_free_space(self.folder.path, needed)

    def select(self, calibration: CalibrationSet) -> LayerMap:
        """Stage 1, from where it stopped; its layer map is in the run folder afterwards."""
        if self.folder.layer_map.is_file():
            self.costs["selection"] = (self.folder.read_record("selection_record") or {})["cost"]
            return read_layer_map(self.folder.layer_map)
        recipe, num_layers = self.recipe, self.checkpoint.num_hidden_layers

        def after_round(state: Any) -> None:
            self.folder.write_record("selection", state.to_document())
            self.check()

        with self.stage("selection"):
            model = self.load()
            state = select_layers(
                model,
                calibration.input_ids,
                recipe.selection,
                num_to_remove=recipe.num_to_remove(num_layers),
                protected=self.protected_layers(),
                seed=recipe.seed,
                state=self.folder.selection_state(),
                on_round=after_round,
                progress=self.progress,
            )
            del model
            free_memory()
        layer_map = LayerMap.from_removal_order(
            self.base_model(),
            state.picks,
            gates=state.gates,
            method=self.method(recipe.selection.method),
            calibration=calibration.as_record(),
            steps=state.rounds,
        )
        self.folder.write_record(
            "selection_record",
            {"cost": self.costs["selection"], "dense_loss": state.dense_loss},
        )
        write_layer_map(layer_map, self.folder.layer_map)
        return layer_map

    def method(self, name: str) -> dict[str, Any]:
        """What the layer map says of how its layers were chosen."""
        return {
            "name": name,
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.recipe.seed,
            "trsp_version": version("trsp"),
        }

    def transfer(
        self,
        layer_map: LayerMap,
        calibration: CalibrationSet,
        *,
        on_step: Callable[[int, PreTrainedModel], None] = lambda step, model: None,
    ) -> dict[str, Any]:
        """Stage 2, from where it stopped; the moved weights are in the run folder afterwards.

        Args:
            on_step: called with the number of finished steps and the model as it is in training;
                it may raise to give the transfer up.
        """
        if self.folder.is_transferred():
            self.folder.drop_transfer_state()
            record = self.folder.read_record("transfer_record")
            assert record is not None, "the record is written before the weights are published"
            self.costs["transfer"] = record["cost"]
            return record
        recipe = self.recipe.transfer
        saver = _StateSaver(self.folder, self.recipe.state_every_seconds, self.check)
        with self.stage("transfer"):
            model = self.load("auto" if recipe.lora else "fp32")
            torch.manual_seed(self.recipe.seed)

            def after_step(step: int, snapshot: Callable[[], TransferState]) -> None:
                # First: a run that is resumed from the state of this step does not come here again.
                on_step(step, model)
                saver(step, snapshot)

            result = transfer(
                model,
                calibration.input_ids,
                recipe,
                dropped=layer_map.removal_order,
                seed=self.recipe.seed,
                state=self.folder.transfer_state(),
                on_step=after_step,
                on_failure=lambda snapshot: self.folder.save_transfer_state(snapshot()),
                progress=self.progress,
            )
        record = {**result.to_document(), "cost": self.costs["transfer"]}
        self.folder.write_record("transfer_record", record)
        with publish_folder(self.folder.transferred) as folder:
            torch.nn.Module.to(model, checkpoint_dtype(self.checkpoint))
            # The checkpoint's own file is copied as it is; transformers refuses to write some
            # that it reads (temperature without do_sample).
            model.generation_config = GenerationConfig()
            model.save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)
            copy_companions(self.checkpoint, folder)
        self.folder.drop_transfer_state()
        return record


class _StateSaver:
    """Save the transfer state now and then, and before stopping on a signal."""

    def __init__(self, folder: RunFolder, every_seconds: float, check: Callable[[], None]) -> None:
        self._folder, self._every, self._check = folder, every_seconds, check
        self._saved_at = time.monotonic()

    def __call__(self, step: int, snapshot: Callable[[], TransferState]) -> None:
        try:
            self._check()
        except Interrupted:
            self._folder.save_transfer_state(snapshot())
            raise
        if time.monotonic() - self._saved_at >= self._every:
            self._folder.save_transfer_state(snapshot())
            self._saved_at = time.monotonic()


def base_model_of(checkpoint: Checkpoint, name: str | None = None) -> BaseModel:
    """What a layer map says of the checkpoint it is for."""
    return BaseModel(
        name=name or checkpoint.path.resolve().name,
        num_hidden_layers=checkpoint.num_hidden_layers,
        fingerprint=checkpoint.fingerprint,
        weights_sha256=sample_weights(checkpoint),
    )


def checkpoint_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype most elements of the checkpoint have."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.end - entry.begin
    name = max(sizes, key=lambda dtype: sizes[dtype])
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if name not in known:
        raise UserError(
            f"{checkpoint.path} holds {name} weights; training needs {', '.join(known)}"
        )
    return known[name]


def resolve_device(name: str) -> str:
    """`auto` as cuda where there is one; UserError when a named device is not there."""
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name.startswith("cuda") and not available:
        raise UserError(f"device {name}: torch sees no CUDA device here; use --device cpu")
    return name


def free_memory() -> None:
    """Give back what deleted models held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
