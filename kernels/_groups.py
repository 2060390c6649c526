"""Rows of words in Triton: which of a row can be read 16 bytes at a time, and which are read one by one."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP_BYTES = 16


@triton.jit
def whole_groups(start: tl.tensor, words: tl.tensor, GROUP: tl.constexpr) -> tl.tuple:
    """Where the whole groups of a row begin, how many words precede them, and how many words they are.

    The compiler sees that the first and the last are multiples of GROUP.
    """
    groups = (start + GROUP - 1) // GROUP * GROUP
    head = tl.minimum(groups - start, words).to(tl.int32)
    return groups, head, (words - head) // GROUP * GROUP


@triton.jit
def edge_of(head: tl.tensor, length: tl.tensor, words: tl.tensor, GROUP: tl.constexpr) -> tl.tuple:
    """The words outside of the whole groups, fewer than GROUP on either side, and which lanes hold one."""
    i = tl.arange(0, 2 * GROUP)
    word = tl.where(i < GROUP, i, head + length + i - GROUP)
    return word, tl.where(i < GROUP, i < head, word < words)
