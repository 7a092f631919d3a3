"""Tables of the cells of a grid, as pandas data frames."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hooked_lm._support.extras import require_pandas

__all__ = ["data_frame", "make_df_from_ranges"]


# A DataFrame, here and below; naming its type would import pandas.
def data_frame(indices: Sequence[Sequence[object]], names: Sequence[str]) -> Any:
    """Return a data frame of indices. Needs pandas.

    Args:
        indices: a row for each cell.
        names: the columns.
    """
    return require_pandas("a table of indices").DataFrame(indices, columns=list(names))


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> Any:
    """Return a data frame with a row for every cell of a grid, the last column counting fastest. Needs pandas.

    Args:
        column_max_ranges: how many entries each axis has.
        column_names: the axes.

    Raises:
        ValueError: the two are not equally many.
    """
    if len(column_max_ranges) != len(column_names):
        raise ValueError(f"{len(column_max_ranges)} ranges for {len(column_names)} columns")
    return data_frame(list(itertools.product(*map(range, column_max_ranges))), column_names)
