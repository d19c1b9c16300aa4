"""Plots (PNG) and summaries (Markdown) of runs."""
