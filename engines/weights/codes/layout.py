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
