"""The proof that a pruned checkpoint is what its layer map says, made from the files on disk.

The checks themselves are in folder_checks and model_checks; this module owns their order, what
each needs to have passed, and the record. A check that cannot be made is reported as skipped with
the reason, never as passed.
"""

import importlib.metadata
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from trsp.pruner import folder_checks
from trsp.pruner.checkpoint import Checkpoint, contained_file, open_checkpoint
from trsp.pruner.errors import Interrupted, RunError, UserError
from trsp.pruner.folder_checks import CheckFailed, CheckSkipped, Finding, Measured
from trsp.pruner.layer_map import LayerMap, read_layer_map
from trsp.pruner.model_checks import ModelChecks, exact_matmuls, is_fp32
from trsp.pruner.progress import Progress, silent
from trsp.pruner.vllm_process import has_vllm, require_vllm

VllmCheck = Literal["auto", "off", "required"]
Status = Literal["passed", "failed", "skipped"]

SCHEMA_VERSION = 1
NUM_CHECKS = 16
LAYER_MAP_NAME = "layer_map.json"
MAX_ERROR_CHARACTERS = 400


class ProofError(RunError):
    """The proof failed, so nothing is published; `proof` holds every check."""

    def __init__(self, proof: "Proof") -> None:
        failures = [f"{check.name}: {check.detail}" for check in proof.failures]
        super().__init__(f"the proof failed: {'; '.join(failures)}")
        self.proof = proof


@dataclass(frozen=True)
class Check:
    """One check: its result, one line of detail, numbers by name, and the bound they were held to.

    Differences and tolerances are relative to the logit scale.
    """

    name: str
    status: Status
    detail: str
    measured: Measured
    tolerance: float | None = None

    def to_document(self) -> dict[str, Any]:
        """For JSON, which has no NaN or infinity: those become text."""
        measured = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in self.measured.items()
        }
        return {
            "name": self.name,
            "status": self.status,
            "passed": self.status == "passed",
            "detail": self.detail,
            "measured": measured,
            "tolerance": self.tolerance,
        }


@dataclass(frozen=True)
class Proof:
    """Every check of one folder, in the order they were made.

    `fingerprint`, `reference`: of the folder and of the reference; None where not opened or given.
    """

    checks: tuple[Check, ...]
    fingerprint: str | None
    reference: str | None
    environment: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    @property
    def passed(self) -> bool:
        """No check failed. Skipped ones are listed, with their reasons."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "failed")

    def to_document(self) -> dict[str, Any]:
        """The proof as a JSON object."""
        return {
            "schema_version": self.schema_version,
            "passed": self.passed,
            "fingerprint": self.fingerprint,
            "reference": self.reference,
            "environment": self.environment,
            "checks": [check.to_document() for check in self.checks],
        }


def require(proof: Proof) -> None:
    """Let a proof that passed through.

    Raises:
        ProofError: a check failed; the text names each one.
    """
    if not proof.passed:
        raise ProofError(proof)


def prove(
    folder: Path,
    *,
    against: Path | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    vllm: VllmCheck = "auto",
    progress: Progress = silent,
) -> Proof:
    """Check that the checkpoint `folder` is what its layer map says; nothing is written to it.

    Args:
        against: the checkpoint that was compacted (after a transfer the transferred one); without
            it the checks against a reference are skipped.
        device: "cpu", "cuda" or "cuda:N", where both models run, one at a time, in fp32.
        vllm: "auto" compares with vLLM where it is installed, "required" refuses to go without.
    Returns:
        the proof, passed or not; see `require`.
    Raises:
        UserError: `folder` is no checkpoint folder at all, or its auto_map is not trusted;
            `against` cannot be used; vLLM is required and not installed; no such device.
    """
    if vllm == "required":
        require_vllm()
    _check_device(device)
    checkpoint: Checkpoint | UserError
    try:
        checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    except UserError as error:
        _refuse_what_is_not_ours_to_prove(folder, error, trust_remote_code=trust_remote_code)
        checkpoint = error
    base = None
    if against is not None:
        base = open_checkpoint(against, trust_remote_code=trust_remote_code)
    prover = _Prover(
        folder,
        base,
        trust_remote_code=trust_remote_code,
        device=device,
        vllm=vllm,
        progress=progress,
    )
    try:
        with exact_matmuls():
            return prover.run(checkpoint)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(
            f"out of memory in the proof on {device}, where one model at a time is loaded in fp32; "
            "free the device or pass --device cpu"
        ) from error


class _Prover:
    """The checks in order; each leaves what those after it need, which run only if it passed."""

    # Set by open and read_layer_map.
    checkpoint: Checkpoint
    layers: LayerMap
    models: ModelChecks

    def __init__(
        self,
        folder: Path,
        base: Checkpoint | None,
        *,
        trust_remote_code: bool,
        device: str,
        vllm: VllmCheck,
        progress: Progress,
    ) -> None:
        self.folder, self.base, self.device, self.vllm = folder, base, device, vllm
        self.trust_remote_code, self.progress = trust_remote_code, progress
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.checks: dict[str, Check] = {}

    def run(self, opened: Checkpoint | UserError) -> Proof:
        """Make every check; `opened` is the folder's checkpoint, or why it does not open."""
        check = self._check
        check("manifest", lambda: folder_checks.manifest(self.folder, self.progress))
        check("checkpoint", lambda: self._open(opened))
        check("layer_map", self._read_layer_map, needs=("checkpoint",))
        check("config", self._check_config, needs=("checkpoint",))
        check("tokenizer", self._load_tokenizer, needs=("checkpoint",))
        check("base_model", self._check_base_model, needs=("layer_map",))
        check("weights", self._check_weights, needs=("base_model",))
        check("load", lambda: self.models.load(), needs=("checkpoint",))
        check("layer_indices", lambda: self.models.layer_indices(), needs=("load",))
        check("forward", lambda: self.models.forward(self.tokenizer), needs=("load",))
        check("kv_cache", lambda: self.models.kv_cache(), needs=("forward",))
        if self.base is not None and self._passed("forward", "base_model"):
            # Outside of a check: a reference that cannot be loaded or masked is no fault of ours.
            with self.models.masked_reference(self.base, self.layers.dropped):
                self._compare_with_reference()
        else:
            self._compare_with_reference()
        if self._passed("checkpoint"):
            self.models.free()
        check("logits_native", self._compare_in_own_dtype, needs=("logits",))
        check("vllm", self._compare_with_vllm, needs=("kv_cache",))
        return self._record()

    def _compare_with_reference(self) -> None:
        check, both = self._check, ("forward", "base_model")
        check(
            "layer_attributes", lambda: self.models.layer_attributes(self.layers.kept), needs=both
        )
        check("logits", lambda: self.models.logits(), needs=both)
        check("greedy", lambda: self.models.greedy(), needs=("kv_cache", "base_model"))

    def _open(self, opened: Checkpoint | UserError) -> Finding:
        if isinstance(opened, UserError):
            raise opened
        self.checkpoint = opened
        self.models = ModelChecks(
            opened, trust_remote_code=self.trust_remote_code, device=self.device
        )
        num_tensors, num_layers = len(opened.tensors), opened.num_hidden_layers
        return Finding(
            f"{num_layers} layers; {num_tensors} tensors in {len(opened.shards)} files",
            {"num_hidden_layers": num_layers, "num_tensors": num_tensors},
        )

    def _read_layer_map(self) -> Finding:
        self.layers = read_layer_map(contained_file(self.folder, LAYER_MAP_NAME))
        return folder_checks.layer_map(self.checkpoint, self.layers)

    def _check_config(self) -> Finding:
        layers = self.layers if self._passed("layer_map") else None
        return folder_checks.config(
            self.checkpoint, layers, trust_remote_code=self.trust_remote_code
        )

    def _load_tokenizer(self) -> Finding:
        self.tokenizer, finding = folder_checks.tokenizer(
            self.checkpoint, self.base, trust_remote_code=self.trust_remote_code
        )
        return finding

    def _check_base_model(self) -> Finding:
        if self.base is None:
            raise CheckSkipped("no reference was given (--against MODEL)")
        return folder_checks.base_model(self.checkpoint, self.layers, self.base)

    def _check_weights(self) -> Finding:
        assert self.base is not None, "base_model passed"
        return folder_checks.weights(self.checkpoint, self.layers, self.base, self.progress)

    def _compare_in_own_dtype(self) -> Finding:
        assert self.base is not None, "logits passed"
        if is_fp32(self.checkpoint):
            raise CheckSkipped("the checkpoint's own dtype is fp32")
        return self.models.logits_native(self.base, self.layers.dropped)

    def _compare_with_vllm(self) -> Finding:
        if self.vllm == "off":
            raise CheckSkipped("not asked for (--vllm off)")
        if not has_vllm():
            raise CheckSkipped("vLLM is not installed")
        return self.models.served(
            load_tokenizer=self.tokenizer is not None, waiting=self._report_progress
        )

    def _check(
        self, name: str, step: Callable[[], Finding], *, needs: tuple[str, ...] = ()
    ) -> None:
        """Make one check; whatever a broken folder raises in it is its result."""
        self._report_progress()
        status: Status
        unmet = [self.checks[other] for other in needs if not self._passed(other)]
        if unmet:
            status, finding = "skipped", Finding(f"{unmet[0].name} {unmet[0].status}")
        else:
            try:
                status, finding = "passed", step()
            except CheckFailed as failure:
                status, finding = "failed", failure.finding
            except CheckSkipped as reason:
                status, finding = "skipped", Finding(str(reason))
            except (Interrupted, torch.OutOfMemoryError, MemoryError):
                raise
            except (UserError, RunError) as error:
                status, finding = "failed", Finding(str(error))
            except Exception as error:
                text = textwrap.shorten(str(error), MAX_ERROR_CHARACTERS, placeholder=" ...")
                status, finding = "failed", Finding(f"{type(error).__name__}: {text}")
        self.checks[name] = Check(name, status, finding.detail, finding.measured, finding.tolerance)

    def _passed(self, *names: str) -> bool:
        return all(self.checks[name].status == "passed" for name in names)

    def _report_progress(self) -> None:
        self.progress("prove", len(self.checks), NUM_CHECKS)

    def _record(self) -> Proof:
        self._report_progress()
        return Proof(
            checks=tuple(self.checks.values()),
            fingerprint=self.checkpoint.fingerprint if self._passed("checkpoint") else None,
            reference=None if self.base is None else self.base.fingerprint,
            environment={
                "device": self.device,
                **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            },
        )


def _refuse_what_is_not_ours_to_prove(
    folder: Path, error: UserError, *, trust_remote_code: bool
) -> None:
    """Raise `error` again where it is about what was asked and not about the folder's state."""
    if not (folder / "config.json").is_file():
        raise error
    if trust_remote_code:
        return
    try:
        # Runs no code of the folder. If trust alone was missing, granting it is the user's choice.
        open_checkpoint(folder, trust_remote_code=True)
    except UserError:
        return
    raise error


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        # AssertionError: a torch without CUDA.
        line = str(error).partition("\n")[0]
        raise UserError(f"device {device!r} cannot be used: {line}; use cpu or cuda") from error
