"""Every method on the same work at the same cost. See README.md."""

from secateur.comparison.rows import read_about, read_rows
from secateur.comparison.run import Compared, compare
from secateur.comparison.setup import Setup
from secateur.comparison.summary import Line, front, paired, summary

__all__ = ["Compared", "Line", "Setup", "compare", "front", "paired", "read_about", "read_rows", "summary"]
