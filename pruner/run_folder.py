"""What an unfinished run leaves beside its output, `OUT.run/`, so that `--resume` can go on.

    run.json           what run this is: settings, weights, calibration hash
    self_text.safetensors  the calibration text where the model wrote it; self_text_record.json
    selection.json     finished rounds of stage 1
    layer_map.json     the chosen layers, with selection_record.json
    transfer_state/    weights, optimizer and position within stage 2
    transferred/       the result of stage 2: all layers, weights moved; transfer_record.json
    auto.json          finished work of a search (auto_trials.py)
    search/NAME/       one transfer of a search: a folder like this one

Every file is replaced whole. `transferred/` is what `layer_map.json` applies to, as a whole: its
kept layers do the others' work.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.durable import (
    atomic_write,
    publish_folder,
    sweep_leftovers,
    verify_manifest,
)
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.selection import SelectionState
from trsp.pruner.transfer import TransferState

# Gate histories grow with layers x rounds x steps: 100 layers, 50 rounds, 100 steps are 1 MB.
MAX_RECORD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run; `path` is `OUT.run`."""

    path: Path

    @classmethod
    def of(cls, out: Path) -> "RunFolder":
        return cls(out.with_name(f"{out.name}.run"))

    @property
    def layer_map(self) -> Path:
        return self.path / "layer_map.json"

    @property
    def self_text(self) -> Path:
        return self.path / "self_text.safetensors"

    @property
    def transferred(self) -> Path:
        return self.path / "transferred"

    @property
    def _transfer_state(self) -> Path:
        return self.path / "transfer_state"

    @property
    def _searches(self) -> Path:
        return self.path / "search"

    def search(self, name: str) -> "RunFolder":
        """The folder of one transfer of a search, made where it is not there."""
        folder = RunFolder(self._searches / name)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder._sweep()
        return folder

    def drop_searches(self) -> None:
        """Free the space of the transfers of a search once one of them is the run's."""
        if self._searches.is_dir():
            shutil.rmtree(self._searches)

    def _sweep(self) -> None:
        """Clear what killed runs left half-written."""
        run = self.path / "run.json"
        for name in (self.transferred, self._transfer_state, self.self_text, run):
            sweep_leftovers(name)

    def begin(self, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Make the folder, or check that what is there is this run.

        Settings of stage 2 may differ while stage 2 has saved nothing.

        Raises:
            UserError: see require_free; or it is another run than the one to be resumed, with what
                differs.
        """
        self.require_free(resume=resume, overwrite=overwrite)
        if resume:
            self._check_identity(identity)
            self._sweep()
        elif self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_record("run", identity)

    def require_free(self, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may begin here, or go on.

        Raises:
            UserError: a run is there and neither `resume` nor `overwrite` is given; none is there
                to be resumed; or something is there that is no run of ours.
        """
        is_run = (self.path / "run.json").is_file()
        if resume:
            if not is_run:
                raise UserError(f"{self.path} holds no unfinished run; start without --resume")
        elif self.path.is_symlink() or (self.path.exists() and not is_run and not self._is_empty()):
            raise UserError(
                f"{self.path} is in the way and is no run of trsp: move it, or choose another --out"
            )
        elif is_run and not overwrite:
            raise UserError(
                f"{self.path} holds an earlier run; continue it with --resume, or start anew "
                "with --overwrite"
            )

    def _is_empty(self) -> bool:
        """A folder with nothing in it, as a run leaves that was killed in its first moment."""
        return self.path.is_dir() and not any(self.path.iterdir())

    def _check_identity(self, identity: dict[str, Any]) -> None:
        before = self._read("run.json")
        for key, value in identity.items():
            traces = (self._transfer_state, self.transferred, self._searches)
            untouched = not any(path.exists() for path in traces)
            if before.get(key) == json.loads(json.dumps(value)) or (
                key == "transfer" and untouched
            ):
                continue
            raise UserError(
                f"{self.path} is a run with another {key}; resume it with the same settings, or "
                "start anew with --overwrite"
            )

    def write_record(self, name: str, document: dict[str, Any]) -> None:
        """Replace NAME.json by `document`."""
        atomic_write(self.path / f"{name}.json", json.dumps(document, indent=1) + "\n")

    def read_record(self, name: str) -> dict[str, Any] | None:
        """NAME.json, or None when this run has not come to it."""
        return self._read(f"{name}.json") if (self.path / f"{name}.json").is_file() else None

    def selection_state(self) -> SelectionState | None:
        """Where stage 1 stopped."""
        document = self.read_record("selection")
        return None if document is None else SelectionState.from_document(document)

    def save_transfer_state(self, state: TransferState) -> None:
        """Publish weights, optimizer and position as one folder with a manifest."""
        document = {
            "tensors": state.tensors,
            "optimizer": state.optimizer,
            "steps": state.steps,
        }
        with publish_folder(self._transfer_state, overwrite=True) as folder:
            try:
                torch.save(document, folder / "state.pt")
            except RuntimeError as error:  # what torch makes of a full disk
                raise RunError(
                    f"{self._transfer_state}: the state of stage 2 could not be written: {error}; "
                    "free disk space and go on with --resume"
                ) from error

    def transfer_state(self) -> TransferState | None:
        """Where stage 2 stopped; its manifest is checked first."""
        if not self._transfer_state.is_dir():
            return None
        verify_manifest(self._transfer_state)
        document = torch.load(
            self._transfer_state / "state.pt", weights_only=True, map_location="cpu"
        )
        return TransferState(document["tensors"], document["optimizer"], document["steps"])

    def drop_transfer_state(self) -> None:
        """Free the space of the optimizer's state once stage 2 is finished."""
        if self._transfer_state.is_dir():
            shutil.rmtree(self._transfer_state)

    def is_transferred(self) -> bool:
        """Whether stage 2 is finished and its result undamaged."""
        if not self.transferred.is_dir():
            return False
        verify_manifest(self.transferred)
        return True

    def remove(self) -> None:
        """Delete the run: nothing is left to resume."""
        shutil.rmtree(self.path)

    def _read(self, name: str) -> dict[str, Any]:
        return read_json_object(self.path / name, max_bytes=MAX_RECORD_BYTES)
