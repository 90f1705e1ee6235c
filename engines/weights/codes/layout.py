"""Numbers and array types that the loops and the formats share."""

from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.signedinteger[Any]]
"""int16 or int32."""
Table = npt.NDArray[np.uint16]

BLOCK = 1 << 15
"""Elements of a block of `fast`: few enough that every count of a block fits 16 bits."""
SKIP = 255
"""A gap that ends in no change."""
MOST_SKIPS = (BLOCK - 1) // SKIP
"""Of a block: a skip is followed by a change, sooner or later."""
LARGEST = 7
"""Magnitude of the largest step that fits a nibble, as step + 8."""
ESCAPE = 0
"""The nibble of a larger one."""
MAX_CLASSES = 16
"""Of `small`."""

HASH_INDEX, HASH_BITS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
HASH_MIX_1, HASH_MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
"""Of `fingerprint`."""
