"""A needle in a haystack: a value that stands somewhere in a long text and is asked for at its end.

Cheng-Ping Hsieh and others: RULER: What's the Real Context Size of Your Long-Context Language Models?, 2024,
arXiv:2404.06654: the three kinds with one needle that Titans (Ali Behrouz, Peilin Zhong, Vahab Mirrokni, 2025,
arXiv:2501.00663, table 2) reports, in miniature. As there: the haystack of a pass key is one passage, repeated, that of
the others is real text; a number is made of digits, a word (there a UUID) of hexadecimal ones; the needle is at any
depth; an answer counts only as a whole. We had secondary notes and the authors' public code, not the paper.

What differs makes all kinds easier, so that a small model learns them from nothing:

- Tokens are bytes. A needle is a marker, a byte that occurs nowhere else, a letter as its key, and a value of a few
  bytes; there it is a sentence with a key of two words and a value of 7 digits or 36 characters.
- The query is marker and key, without a sentence around them or a question.
- Models are trained on the task; there they are language models that have never seen it.
- Text is English Wikipedia, or any other that is given; there it is essays by one author. It may start and end amid a
  word, and the needle may stand in one.
"""

import string
import sys
from collections.abc import Sequence
from functools import partial

import grain
import numpy as np
from jaxtyping import UInt8

from experiments.data.pipelines import stack_members

__all__ = ["NEEDLE_KINDS", "needle", "needle_batches"]

NEEDLE_KINDS = {"pass key": string.digits, "number": string.digits, "word": "0123456789abcdef"}
"""The symbols that the values of a kind are made of."""
_PASSAGE = b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_KEYS = np.frombuffer(string.ascii_letters.encode(), np.uint8)
_MARKER = 1


def needle(
    seed: int,
    index: int,
    *,
    batch_size: int,
    length: int,
    symbols: int,
    text: UInt8[np.ndarray, " bytes"],
    kinds: Sequence[str] = tuple(NEEDLE_KINDS),
) -> dict[str, np.ndarray]:
    """Batch number `index`: haystack, marker, key, value, haystack, marker, key, and the value but for its last symbol.

    Kinds take turns from row to row. Where the haystack starts in its text (or passage), the needle's depth, the key
    and the symbols are uniform.

    Args:
        seed: seed of the whole stream.
        index: which batch; a pure function of (seed, index).
        batch_size: sequences per batch.
        length: tokens per sequence, at least those of needle and query, ``2 * symbols + 3``.
        symbols: of a value.
        text: of the haystacks that are not the passage, without the marker, as `load_text` has it.
        kinds: of `NEEDLE_KINDS`.

    Returns:
        `tokens` and `targets`, both int32 `[batch, length]`; targets are -1 but at the end, where they are the value.

    Raises:
        ValueError: a size is out of its range, an unknown kind, or a text with the marker in it.
    """
    hay = _check(batch_size, length, symbols, text, kinds)
    rng = np.random.default_rng((seed, index))
    passages = np.resize(np.frombuffer(_PASSAGE, np.uint8), hay + len(_PASSAGE) - 1)
    tokens, targets = np.empty((batch_size, length), np.int32), np.full((batch_size, length), -1, np.int32)
    for row in range(batch_size):
        kind = kinds[row % len(kinds)]
        source = passages if kind == "pass key" else text
        start, depth = rng.integers(len(source) - hay + 1), rng.integers(hay + 1)
        value = rng.choice(np.frombuffer(NEEDLE_KINDS[kind].encode(), np.uint8), symbols)
        found = np.concatenate([[_MARKER, rng.choice(_KEYS)], value])
        tokens[row] = np.concatenate([source[start:][:depth], found, source[start + depth : start + hay], found[:-1]])
        targets[row, -symbols:] = value
    return {"tokens": tokens, "targets": targets}


def needle_batches(batch_size: int, *, seed: int | Sequence[int], **options) -> grain.MapDataset:
    """Endless batches of `needle` with random access; a sequence of seeds gives a leading members axis."""
    needle(0, 0, batch_size=1, **options)  # refuses misfits
    return stack_members(partial(needle, batch_size=batch_size, **options), seed)


def _check(batch_size, length, symbols, text, kinds):
    """Bytes of hay."""
    for name, value, low, high in (
        ("batch_size", batch_size, 1, sys.maxsize),
        ("symbols", symbols, 1, sys.maxsize),
        ("length", length, 2 * symbols + 3, sys.maxsize),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}")
    unknown = [kind for kind in kinds if kind not in NEEDLE_KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds: expected some of {', '.join(NEEDLE_KINDS)}, got {', '.join(unknown) or 'none'}")
    hay = length - 2 * symbols - 3
    if len(text) < hay:
        raise ValueError(f"text: expected at least {hay} bytes, got {len(text)}")
    if np.any(text == _MARKER):
        raise ValueError(f"text: expected no byte {_MARKER}, which marks a needle")
    return hay
