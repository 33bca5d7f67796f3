"""Slow loops written from the papers and the drawn layouts. They import nothing of tersor."""
