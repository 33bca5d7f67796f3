"""Records made readable: plain tables for a terminal, an HTML page with a plot for a browser."""

from tersor.report.page import comparison_page, comparison_plot
from tersor.report.table import format_bytes, text_table

__all__ = ["comparison_page", "comparison_plot", "format_bytes", "text_table"]
