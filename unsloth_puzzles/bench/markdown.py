"""Data frames as Markdown tables."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas


def table(frame: "pandas.DataFrame") -> str:
    """The columns of `frame` as a Markdown table, a line a row. The index is left out."""
    lines = [frame.columns, ["---"] * len(frame.columns), *frame.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
