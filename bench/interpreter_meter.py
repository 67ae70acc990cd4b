"""Counts what a Triton kernel moves, under Triton's interpreter: launches, and bytes by tensor.

Every memory access of the interpreter, of all Triton versions that trsp accepts, ends in four
functions of its C module: load, store, atomic_rmw, atomic_cas. They are replaced while a meter
runs. An access belongs to the tensor of the launch that holds its address, lane by lane where the
mask is true. A lane outside every tensor is counted and not carried out.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

from trsp.bench.aten_traffic import AtenMoves

NO_TENSOR = "no tensor of the launch"


@dataclass
class TensorTraffic:
    """One tensor of a launch; `loads` and `stores` count the accesses of each of its bytes."""

    address: int
    shape: tuple[int, ...]
    itemsize: int
    loads: np.ndarray
    stores: np.ndarray

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorTraffic":
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in strides)
        size = (last + 1) * tensor.element_size() if tensor.numel() else 0
        loads, stores = np.zeros(size, np.int64), np.zeros(size, np.int64)
        return cls(tensor.data_ptr(), tuple(tensor.shape), tensor.element_size(), loads, stores)


@dataclass
class LaunchTraffic:
    """What one launch moved. `tensors` by parameter, `stray_bytes` and `atomics` by tensor."""

    kernel: str
    tensors: dict[str, TensorTraffic]
    num_programs: int = 0
    stray_bytes: int = 0
    atomics: list[str] = field(default_factory=list)

    def access(self, addresses: np.ndarray, mask: np.ndarray, itemsize: int, kind: str) -> Any:
        """Count the lanes of one access; returns the mask of those that lie in a tensor."""
        addresses, mask = np.broadcast_arrays(addresses, mask)
        wanted = mask.astype(bool)
        known = np.zeros_like(wanted)
        for traffic in self.tensors.values():
            offsets = addresses.astype(np.int64) - traffic.address
            inside = wanted & ~known & (offsets >= 0) & (offsets + itemsize <= len(traffic.loads))
            if inside.any():
                counts = traffic.loads if kind == "load" else traffic.stores
                lanes = offsets[inside].reshape(-1, 1) + np.arange(itemsize)
                np.add.at(counts, lanes.reshape(-1), 1)
                known |= inside
        self.stray_bytes += int((wanted & ~known).sum()) * itemsize
        return known

    def owner(self, address: int) -> str:
        """The parameter whose tensor holds an address."""
        for name, traffic in self.tensors.items():
            if 0 <= address - traffic.address < len(traffic.loads):
                return name
        return NO_TENSOR


class LaunchMeter:
    """Launches in order. Their own torch calls are kept out of `moves`, what ran between them."""

    def __init__(self, moves: AtenMoves) -> None:
        self.launches: list[LaunchTraffic] = []
        self._moves = moves
        self._current: LaunchTraffic | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count within; only one meter counts at a time."""
        memory, executor = interpreter._interpreter, interpreter.GridExecutor
        replacements: list[tuple[Any, str, Callable[[Any], Any]]] = [
            (memory, "load", self._load),
            (memory, "store", self._store),
            (memory, "atomic_rmw", self._atomic_rmw),
            (memory, "atomic_cas", self._atomic_cas),
            (executor, "__call__", self._launch),
            (executor, "_init_args_hst", self._arguments),
            (interpreter.InterpreterBuilder, "set_grid_dim", self._grid),
        ]
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
        for (owner, name, wrap), (_, _, original) in zip(replacements, originals, strict=True):
            setattr(owner, name, wrap(original))
        try:
            with self._moves:
                yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _launch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self._current = LaunchTraffic(executor.fn.__name__, {})
            self.launches.append(self._current)
            try:
                with self._moves.paused():
                    return original(executor, *args, **kwargs)
            finally:
                self._current = None

        return call

    def _arguments(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def init(executor: Any, args: Any, kwargs: Any) -> Any:
            host_args, host_kwargs = original(executor, args, kwargs)
            named = dict(zip(executor.arg_names, host_args, strict=False)) | host_kwargs
            launch = self._launched()
            for name, value in named.items():
                if isinstance(value, Tensor):
                    launch.tensors[name] = TensorTraffic.of(value)
            return host_args, host_kwargs

        return init

    def _grid(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def set_grid_dim(builder: Any, *dimensions: int) -> Any:
            self._launched().num_programs = math.prod(int(size) for size in dimensions)
            return original(builder, *dimensions)

        return set_grid_dim

    def _load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load(addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
            itemsize = np.dtype(dtype).itemsize
            return original(
                addresses, self._launched().access(addresses, mask, itemsize, "load"), other, dtype
            )

        return load

    def _store(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def store(addresses: Any, value: Any, mask: Any) -> Any:
            known = self._launched().access(addresses, mask, value.dtype.itemsize, "store")
            return original(addresses, value, known)

        return store

    def _atomic_rmw(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def atomic_rmw(operation: Any, addresses: Any, value: Any, mask: Any, order: Any) -> Any:
            known = self._atomic(addresses, mask, value.dtype.itemsize)
            return original(operation, addresses, value, known, order)

        return atomic_rmw

    def _atomic_cas(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def atomic_cas(addresses: Any, expected: Any, value: Any, order: Any) -> Any:
            known = self._atomic(addresses, np.ones_like(addresses, bool), value.dtype.itemsize)
            if not known.all():
                raise IndexError("atomic_cas outside every tensor of the launch")
            return original(addresses, expected, value, order)

        return atomic_cas

    def _atomic(self, addresses: Any, mask: Any, itemsize: int) -> Any:
        launch = self._launched()
        for address in np.unique(np.broadcast_arrays(addresses, mask)[0][mask.astype(bool)]):
            name = launch.owner(int(address))
            if name not in launch.atomics:
                launch.atomics.append(name)
        launch.access(addresses, mask, itemsize, "load")
        return launch.access(addresses, mask, itemsize, "store")

    def _launched(self) -> LaunchTraffic:
        assert self._current is not None
        return self._current
