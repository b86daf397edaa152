"""Hashes by which examples are drawn and told apart: the same on every machine and in any order."""

import numpy as np

_ODD = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64 (Steele, Lea & Flood 2014)


def mix(x) -> np.ndarray:
    """Returns 64 bits of each integer of an array that look random: splitmix64, a bijection."""
    x = np.atleast_1d(np.asarray(x)).astype(np.uint64) + _ODD
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def priorities(seed: int, latents: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """Returns the priority of each pair of a latent and a sequence, uint64.

    Of any set of pairs, those with the largest priorities are a uniform sample without replacement.
    """
    return mix(mix(mix(seed) + latents.astype(np.uint64)) + sequences.astype(np.uint64))


def row_hashes(rows: np.ndarray) -> np.ndarray:
    """Returns a hash of each row below 2^32, uint32; no two rows have the same.

    It is the last step of MurmurHash3, a bijection.
    """
    x = rows.astype(np.uint32) + np.uint32(0x9E3779B9)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


class WindowHashes:
    """Hashes of windows of token sequences, each from two sums of a prefix."""

    def __init__(self, tokens: np.ndarray, before: int, after: int):
        """Takes tokens (n, T), and how many tokens of a window lie before and after its peak."""
        self._before, self._after = before, after
        n, length = tokens.shape
        self._powers = np.full(length + 1, _ODD, np.uint64)
        self._powers[0] = 1
        self._powers = np.multiply.accumulate(self._powers)
        self._prefix = np.zeros((n, length + 1), np.uint64)
        for i in range(length):
            self._prefix[:, i + 1] = self._prefix[:, i] * _ODD + mix(tokens[:, i])

    def __call__(self, sequences: np.ndarray, peaks: np.ndarray) -> np.ndarray:
        """Returns a hash (m,) uint64 of each window's tokens and of where its peak is."""
        length = self._prefix.shape[1] - 1
        start = np.maximum(peaks - self._before, 0)
        stop = np.minimum(peaks + self._after + 1, length)
        whole = self._prefix[sequences, stop]
        tokens = whole - self._prefix[sequences, start] * self._powers[stop - start]
        return mix(
            mix(tokens + (stop - start).astype(np.uint64)) + (peaks - start).astype(np.uint64)
        )
