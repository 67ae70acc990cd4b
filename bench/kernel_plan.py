"""Which cases are measured, at which sizes, with which arms, and in what order.

T tokens (rows), D hidden size. What a bar needs comes first: device time is scarce, and a run that
ends early must have answered the important questions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trsp.bench.kernel_arms import COMPILED_ARMS, Arm, arms_of
from trsp.bench.kernel_bars import BAR_DTYPE
from trsp.bench.kernel_cases import DTYPES, OPS, KernelCase, Op, dtypes_of
from trsp.kernels.launch import MAX_ROW
from trsp.pruner.errors import UserError

HIDDEN_SIZES = (2048, 3072, 4096, 5120, 8192)
TOKENS = (4096, 8191, 16384, 65536)
# Sizes of the bars that every arm is timed at; at T = 8191 a bar needs D = 5120 or more.
_BAR_SIZES = ((16384, 4096), (8191, 5120), (16384, 8192))
_OTHER_DTYPES_SIZE = (16384, 4096)
DRY_RUN_SIZES = ((5, 100), (5, 128))


@dataclass(frozen=True)
class Item:
    """One case at one size with the arms to time there; `for_bars`: a bar waits for it."""

    case: KernelCase
    tokens: int
    arms: tuple[Arm, ...]
    for_bars: bool = False

    def to_document(self) -> dict[str, Any]:
        """The item as JSON, for another process."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "Item":
        """What `to_document` wrote."""
        case = KernelCase(**document["case"])
        return cls(case, document["tokens"], tuple(document["arms"]), document["for_bars"])

    @property
    def name(self) -> str:
        """Names the item in tables and records, and no other item."""
        return f"{self.case.name}-T{self.tokens}"

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one [T, D] tensor of the residual stream."""
        return self.tokens * self.case.hidden_size * DTYPES[self.case.dtype][0].itemsize


def plan_items(
    *,
    ops: Sequence[str] | None = None,
    hidden_sizes: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    dtype: str | None = None,
) -> list[Item]:
    """The items in order: bars with all arms, the sweep without torch.compile, other dtypes.

    A selection is measured with all arms at each of its sizes.
    """
    main = dtype or BAR_DTYPE
    chosen = _chosen(ops, main)
    if hidden_sizes or tokens:
        sizes = [(T, D) for D in hidden_sizes or HIDDEN_SIZES for T in tokens or TOKENS]
        cases = [(KernelCase(op, main, D), T) for T, D in sizes for op in chosen]
        return [Item(case, T, arms_of(case), main == BAR_DTYPE) for case, T in cases]
    first = [
        Item(case, T, arms_of(case), main == BAR_DTYPE)
        for T, D in _BAR_SIZES
        for op in chosen
        for case in [KernelCase(op, main, D)]
    ]
    rest = [
        Item(case, T, without_compile(case))
        # The largest first: what is left out for lack of time is bound by the cache anyway.
        for T, D in sorted(
            ((T, D) for D in HIDDEN_SIZES for T in TOKENS if (T, D) not in _BAR_SIZES),
            key=lambda size: -size[0] * size[1],
        )
        for op in chosen
        for case in [KernelCase(op, main, D)]
    ]
    others = []
    tokens_of_others, hidden_size = _OTHER_DTYPES_SIZE
    if "gated_branch_rmsnorm" in chosen:
        # Liger's op has one branch: here it moves the same bytes forward as ours.
        case = KernelCase("gated_branch_rmsnorm", main, hidden_size, num_branches=1)
        others.append(Item(case, tokens_of_others, without_compile(case)))
    if dtype is None:
        others += [
            Item(case, tokens_of_others, without_compile(case))
            for other in ("fp32", "mixed")
            for op in _chosen(ops, other)
            for case in [KernelCase(op, other, hidden_size)]
        ]
    return first + others + rest


def plan_dry_run(*, ops: Sequence[str] | None = None, dtype: str | None = None) -> list[Item]:
    """Every op and every arm at a tiny size, odd and even."""
    main, items = dtype or BAR_DTYPE, []
    for op in _chosen(ops, main):
        for tokens, hidden_size in DRY_RUN_SIZES:
            case = KernelCase(op, main, hidden_size)
            compiled = (tokens, hidden_size) == DRY_RUN_SIZES[0]
            items.append(Item(case, tokens, arms_of(case) if compiled else without_compile(case)))
    return items


def plan_comparison(
    *, ops: Sequence[str] | None = None, dtype: str | None = None, dry_run: bool = False
) -> list[Item]:
    """The fused op alone, where its bars are."""
    sizes, main = DRY_RUN_SIZES if dry_run else _BAR_SIZES, dtype or BAR_DTYPE
    return [
        Item(KernelCase(op, main, D), T, ("fused",)) for T, D in sizes for op in _chosen(ops, main)
    ]


def without_compile(case: KernelCase) -> tuple[Arm, ...]:
    """The arms of a case that take no time to compile."""
    return tuple(arm for arm in arms_of(case) if arm not in COMPILED_ARMS)


def check_selection(
    *,
    ops: Sequence[str] | None = None,
    hidden_sizes: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    dtype: str | None = None,
    minutes: float | None = None,
) -> None:
    """Refuse a selection that names what cannot be measured.

    Without `ops`, those that have the dtype are measured; one that is named must have it.

    Raises:
        UserError: names the value and what could stand there.
    """
    for op in ops or ():
        if op not in OPS:
            raise UserError(f"--op {op}: unknown; choose {', '.join(OPS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; choose {', '.join(DTYPES)}")
    for op in OPS:
        if dtype is not None and op in (ops or ()) and dtype not in dtypes_of(op):
            known = ", ".join(dtypes_of(op))
            raise UserError(f"--op {op} --dtype {dtype}: nothing to measure; choose {known}")
    for name, values in (("--hidden-size", hidden_sizes), ("--tokens", tokens)):
        for value in values or ():
            if value < 1:
                raise UserError(f"{name} {value}: expected at least 1")
    if max(hidden_sizes or (0,)) > MAX_ROW:
        raise UserError(f"--hidden-size {max(hidden_sizes or ())}: expected at most {MAX_ROW}")
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes {minutes:g}: expected more than 0")


def _chosen(ops: Sequence[str] | None, dtype: str) -> list[Op]:
    """The ops that were asked for, or all, and that have this dtype."""
    return [op for op in OPS if (not ops or op in ops) and dtype in dtypes_of(op)]
