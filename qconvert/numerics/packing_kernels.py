"""Compiled packing of codes into 32-bit words."""

from __future__ import annotations

from numpy import uint32, uint64

from qconvert.numerics.compilation import kernel


@kernel
def pack_nibbles(codes, flip, words):
    """Words of eight 4-bit codes, from eight bytes at a time.

    Neighbours move together in pairs, fours and eights, so that whole vectors of words are made at once.

    Args:
        codes: uint64 [n], eight codes each, the first in the lowest byte; a byte's upper half does not count.
        flip: uint32, what every word is combined with by exclusive or.
        words: uint32 [n], written.
    """
    for i in range(words.size):
        word = uint64(codes[i] & uint64(0x0F0F0F0F0F0F0F0F))
        word = uint64((word | (word >> uint64(4))) & uint64(0x00FF00FF00FF00FF))
        word = uint64((word | (word >> uint64(8))) & uint64(0x0000FFFF0000FFFF))
        words[i] = uint32(word | (word >> uint64(16))) ^ flip


@kernel
def pack_bytes(codes, flip, words):
    """Words of four 8-bit codes.

    Args:
        codes: uint32 [n], four codes each.
        flip: uint32, what every word is combined with by exclusive or.
        words: uint32 [n], written.
    """
    for i in range(words.size):
        words[i] = codes[i] ^ flip
