"""The one definition of a percentile, for tables and figures alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def percentile(ordered: Sequence[float] | npt.NDArray[np.float64], share: float) -> float:
    """The smallest value that has ``share`` percent of all at or below it; ``ordered`` ascends and is not empty.

    Nothing is interpolated. It is definition 1 of Hyndman and Fan, Sample Quantiles in Statistical Packages, The
    American Statistician 50 (1996), 361-365, https://doi.org/10.2307/2684934, and numpy's ``method="inverted_cdf"``.

    Example:
        >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
        2.0
    """
    return float(ordered[max(math.ceil(len(ordered) * share / 100) - 1, 0)])
