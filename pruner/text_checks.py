"""Whether calibration and held-out text are fit for use: apart, and of a kind the model knows.

Apart: a perplexity on text that was trained on says nothing, so held-out text that stands in the
calibration sequences is refused. The measure is the usual one of contamination, the share of
n-grams that both have, with n = 13 tokens (GPT-3, arXiv 2005.14165, appendix C; PaLM, arXiv
2204.02311, takes 8). Measured in held-out 13-grams, tokenizer of 10,240 tokens: 9.1M tokens of
books against one and two other books 0.001 and 0.000 %, against WikiText-2 0.0002 % (with 8-grams
0.12, 0.15 and 0.01 %); WikiText-2's validation against its test text 1.8 % (runs of "<unk> ,
<unk>"); Python's library against modules held out of it 7.9 % (idioms, headers), 1.1 % for 128
sequences of 256 tokens. MAX_SHARE leaves room above these, WARNED_SHARE above the chance of prose.

Of a known kind: the dense model's loss in bits per byte of text, which does not depend on the
vocabulary, as a loss per token does. Measured with a model of 4.5M parameters trained on those
books, samples of 16 sequences of 256 tokens (in brackets the loss as a part of the logarithm of
the vocabulary's size, which does not tell rows of numbers from books): books 1.4 to 1.5 trained
on, 1.5 to 1.75 held out (0.44 to 0.52); WikiText-2 3.2 to 3.8 (0.76 to 0.86); shuffled words 2.7
(0.90); rows of numbers 5.7 (0.48); Python 6.0 (0.90); hexadecimal digits 8.6 (0.76). Between two
samples of books the ratio was at most 1.25, between books and WikiText-2 at least 1.8 (shuffled
words, 1.55, only the first limit finds). On a larger model, which knows more, nothing was measured:
expect the first limit to find only the worst there.

N: calibration sequences, T: tokens of one, S: tokens of the held-out text.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trsp.pruner.errors import UserError
from trsp.pruner.text_files import find_files, is_read_as_bytes, unpacked_blocks

NGRAM = 13
# More than this share of the held-out n-grams, or most of the calibration text's, is refused.
MAX_SHARE = 0.10
MAX_CALIBRATION_SHARE = 0.5
WARNED_SHARE = 0.01
MAX_BITS_PER_BYTE = 2.5
MAX_BITS_RATIO = 1.6

_ALLOW = "where this is wanted: --set evaluation.allow_overlap=true"
_CHUNK = 1 << 20
# Of two files that begin alike, the shorter one has at least so many bytes, or they are the same.
_MIN_BEGINNING = 4096
_DECODED_TOKENS = 4096
_EXAMPLE_CHARS = 60

_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Overlap:
    """What held-out text has in common with the calibration sequences.

    Attributes:
        n: tokens of an n-gram; fewer than asked for where a text is shorter than that.
        num_ngrams: those of the held-out text.
        share: part of the held-out n-grams that occur in the calibration sequences, 0 to 1.
        calibration_share: part of the calibration n-grams that occur in the held-out text.
        longest_run: tokens of the longest held-out stretch all of whose n-grams are shared.
        longest_start: where in the held-out text it begins.
    """

    n: int
    num_ngrams: int
    share: float
    calibration_share: float
    longest_run: int
    longest_start: int

    @property
    def too_much(self) -> bool:
        """Whether a perplexity on this text would be one on calibration text."""
        return self.share > MAX_SHARE or self.calibration_share > MAX_CALIBRATION_SHARE

    def to_document(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready mapping."""
        return asdict(self)


@dataclass
class TextFindings:
    """What one run found out about its texts; None where there was nothing to compare.

    Attributes:
        held_out_bytes: UTF-8 bytes per token of the held-out text.
        calibration_bits: the dense model's loss on the calibration text, bits per byte.
        held_out_bits: the same on the held-out text.
        own_text: whether the dense model wrote the calibration text.
    """

    overlap: Overlap | None = None
    held_out_bytes: float | None = None
    calibration_bits: float | None = None
    held_out_bits: float | None = None
    own_text: bool = False
    warnings: list[str] = field(default_factory=list)

    def to_document(self) -> dict[str, Any]:
        """Return what a report says of the texts, the warnings of their kind among it."""
        return {
            "overlap": None if self.overlap is None else self.overlap.to_document(),
            "bits_per_byte": {"calibration": self.calibration_bits, "held_out": self.held_out_bits},
            "warnings": self.warnings
            + domain_warnings(self.calibration_bits, self.held_out_bits, own_text=self.own_text),
        }


def refuse_same_files(
    calibration: Sequence[str | Path], held_out: Sequence[str | Path], *, remedy: str = _ALLOW
) -> None:
    """Refuse held-out files that are calibration files, by their place or what they hold.

    Files are unpacked and compared until they differ; blank space at their end does not count. A
    file that another one begins with is refused too, unless it is under 4 KiB: a short text may
    begin many. Parquet files are compared byte by byte. Of files whose first 4 KiB differ nothing
    more is read.

    Args:
        calibration, held_out: text files and folders, as read_texts takes them.
    Raises:
        UserError: a file is in both, named; TextError as find_files, or a file is broken.
    """
    known: defaultdict[bytes, list[Path]] = defaultdict(list)
    places = set()
    for path in find_files(calibration):
        places.add(path.resolve())
        known[_beginning(path)].append(path)
    for path in find_files(held_out):
        if path.resolve() in places:
            raise _same_text(path, "is calibration text too", remedy)
        beginning = _beginning(path)
        for other in known.get(beginning, ()) if beginning else ():
            if how := _how_alike(path, other):
                raise _same_text(path, f"{how} the calibration text {other}", remedy)


def require_no_overlap(
    calibration_ids: Tensor,
    held_out_ids: Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    held_out: str = "the held-out text",
    remedy: str = _ALLOW,
) -> Overlap:
    """Measure the overlap of two texts and refuse too much of it.

    Args:
        calibration_ids: [N, T].   held_out_ids: [S].
        tokenizer: shows in the error what is shared, as text instead of ids.
        held_out: what the error calls the held-out text.
        remedy: what the error names besides other text.
    Raises:
        UserError: the share is above MAX_SHARE, or that of the calibration text above
            MAX_CALIBRATION_SHARE.
    """
    found = overlap(calibration_ids, held_out_ids)
    if found.too_much:
        raise UserError(
            f"{describe_overlap(found, held_out_ids, tokenizer, held_out=held_out)} (at most "
            f"{MAX_SHARE:.0%} and {MAX_CALIBRATION_SHARE:.0%} may): a perplexity on text that was "
            f"trained on says nothing; hold out other documents, or, {remedy}"
        )
    return found


def describe_overlap(
    found: Overlap,
    held_out_ids: Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    held_out: str = "the held-out text",
) -> str:
    """Both shares and the beginning of the longest run, in a line without a full stop."""
    run = held_out_ids[found.longest_start : found.longest_start + found.longest_run].tolist()
    if tokenizer is None:
        example = f"tokens {' '.join(map(str, run[:NGRAM]))}"
    else:
        example = repr(" ".join(str(tokenizer.decode(run)).split())[:_EXAMPLE_CHARS])
    return (
        f"{found.share:.1%} of the {found.n}-token runs of {held_out} stand in the calibration "
        f"text, {found.calibration_share:.1%} of those of the calibration text in it, such as "
        f"{example} (the longest has {found.longest_run} tokens)"
    )


def overlap(calibration_ids: Tensor, held_out_ids: Tensor, n: int = NGRAM) -> Overlap:
    """Count the n-grams that two texts have in common.

    N-grams are compared by 64-bit hashes alone: a false match has a chance of 2^-64 a pair, so
    that even 10M calibration and 10M held-out tokens make one with a chance of 5e-6. Memory is some
    50 bytes a calibration token and one a held-out token; seconds for 10M tokens.

    Args:
        calibration_ids: [N, T]; no n-gram goes from one sequence into the next.
        held_out_ids: [S].
        n: at least 1; where T or S is less, that is used instead.
    """
    n = min(n, calibration_ids.shape[-1], len(held_out_ids))
    if n < 1 or len(calibration_ids) == 0:
        return Overlap(0, 0, 0.0, 0.0, 0, 0)
    known, counts = np.unique(_hash_ngrams(calibration_ids, n), return_counts=True)
    seen = np.zeros(len(known), dtype=np.bool_)
    num_ngrams = len(held_out_ids) - n + 1
    shared = np.zeros(num_ngrams, dtype=np.bool_)
    for start in range(0, num_ngrams, _CHUNK):
        hashes = _hash_ngrams(held_out_ids[start : start + _CHUNK + n - 1], n)
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        hits = known[places] == hashes
        shared[start : start + len(hashes)] = hits
        seen[places[hits]] = True
    num_runs, begin = _longest_run(shared)
    return Overlap(
        n=n,
        num_ngrams=num_ngrams,
        share=float(shared.mean()),
        calibration_share=float(counts[seen].sum() / counts.sum()),
        longest_run=num_runs + n - 1 if num_runs else 0,
        longest_start=begin,
    )


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> float:
    """UTF-8 bytes of text per token of [N, T] or [S]; a special token is one of no bytes."""
    sequences = torch.atleast_2d(input_ids)
    num_bytes = 0
    for part in (part for sequence in sequences for part in sequence.split(_DECODED_TOKENS)):
        text = tokenizer.decode(part.tolist(), skip_special_tokens=True)
        num_bytes += len(str(text).encode())
    return num_bytes / max(1, input_ids.numel())


def bits_per_byte(loss: float, num_bytes: float) -> float | None:
    """A loss in nats per token, of `num_bytes` each, in bits per byte; None for no bytes."""
    return loss / math.log(2) / num_bytes if num_bytes else None


def domain_warnings(
    calibration: float | None, held_out: float | None = None, *, own_text: bool = False
) -> list[str]:
    """What the dense model's losses, in bits per byte, say against the texts; mostly nothing.

    Args:
        own_text: the dense model wrote the calibration text: it knows such text, however many bits
            that takes.
    """
    warnings = []
    if calibration is not None and calibration > MAX_BITS_PER_BYTE and not own_text:
        warnings.append(
            f"the dense model needs {calibration:.2f} bits per byte of the calibration text "
            f"(above {MAX_BITS_PER_BYTE} it hardly knows such text): which layers matter for its "
            "own text cannot be learned from this; give text of the kind it was trained on"
        )
    return warnings + kind_warnings(calibration, held_out)


def kind_warnings(
    calibration: float | None, held_out: float | None, *, name: str = "held-out text"
) -> list[str]:
    """That calibration and held-out text, called `name`, are of different kinds, if they are.

    Args:
        calibration, held_out: the dense model's losses on them, bits per byte; None: unknown.
    """
    if calibration is None or held_out is None:
        return []
    low, high = sorted((calibration, held_out))
    if high <= MAX_BITS_RATIO * low:
        return []
    return [
        f"calibration and {name} are of different kinds: the dense model needs {calibration:.2f} "
        f"bits per byte of the one and {held_out:.2f} of the other; the perplexities are out of "
        "domain"
    ]


def unknown_text_warnings(held_out: float | None, *, name: str = "held-out text") -> list[str]:
    """That the dense model, by its loss in bits per byte, hardly knows text such as `name`."""
    if held_out is None or held_out <= MAX_BITS_PER_BYTE:
        return []
    return [
        f"the dense model needs {held_out:.2f} bits per byte of {name} (above {MAX_BITS_PER_BYTE} "
        "it hardly knows such text): what pruning lost on it says little of the model's own text; "
        "give text of the kind it was trained on"
    ]


def _hash_ngrams(ids: Tensor, n: int) -> _Hashes:
    """64-bit hashes [..., T - n + 1] of the n-grams of [..., T]: a polynomial of mixed ids."""
    mixed = _mix(ids.cpu().numpy().astype(np.uint64))
    length = mixed.shape[-1] - n + 1
    hashes = np.zeros((*mixed.shape[:-1], length), dtype=np.uint64)
    for place in range(n):
        # Odd, so that n-grams that differ in one token never collide.
        hashes *= np.uint64(0xD1342543DE82EF95)
        hashes += mixed[..., place : place + length]
    return hashes


def _mix(values: _Hashes) -> _Hashes:
    """Numbers that look random, one for each id (splitmix64): ids are small and dense."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _longest_run(flags: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Length and begin of the longest stretch of true; zeros where there is none."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    if len(edges) == 0:
        return 0, 0
    lengths = edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return int(lengths[longest]), int(edges[2 * longest])


def _same_text(path: Path, how: str, remedy: str) -> UserError:
    return UserError(
        f"the held-out text {path} {how}: a perplexity on text that was trained on says nothing; "
        f"hold out other files, or, {remedy}"
    )


def _beginning(path: Path) -> bytes:
    """What files that hold the same have in common; empty where there is nothing to compare.

    A hash of the first 4 KiB, unpacked, or of all of a shorter file without blank space behind.
    """
    if not is_read_as_bytes(path):
        return b"parquet %d" % path.stat().st_size
    block = next(unpacked_blocks(path, 2 * _MIN_BEGINNING), b"")
    whole = block.rstrip()
    if len(block) < 2 * _MIN_BEGINNING and len(whole) < _MIN_BEGINNING:
        return b"short " + hashlib.sha256(whole).digest() if whole else b""
    return b"long " + hashlib.sha256(block[:_MIN_BEGINNING]).digest()


def _how_alike(path: Path, other: Path) -> str | None:
    """How a held-out file stands to a calibration file that begins alike; None: they differ."""
    # Of Parquet the bytes as they lie there, packed or not.
    unpack = unpacked_blocks if is_read_as_bytes(path) else _blocks
    mine, theirs = unpack(path), unpack(other)
    with closing(mine), closing(theirs):
        left = right = b""
        while True:
            left, right = left or next(mine, b""), right or next(theirs, b"")
            length = min(len(left), len(right))
            if not length or left[:length] != right[:length]:
                break
            left, right = left[length:], right[length:]
        place = _first_difference(left[:length], right[:length])
        ends = _is_blank(left[place:], mine), _is_blank(right[place:], theirs)
    if not any(ends) or (unpack is _blocks and not all(ends)):
        return None
    if all(ends):
        return "has the same content as"
    return "is the beginning of" if ends[0] else "begins with all of"


def _blocks(path: Path) -> Generator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            yield block


def _first_difference(left: bytes, right: bytes) -> int:
    """Where two blocks of one length differ first; 0 where both are empty."""
    one, two = (np.frombuffer(block, dtype=np.uint8) for block in (left, right))
    return int((one != two).argmax()) if len(one) else 0


def _is_blank(rest: bytes, blocks: Iterator[bytes]) -> bool:
    return not rest.strip() and all(not block.strip() for block in blocks)
