"""Measured comparisons: alternatives in turn, in one run, against the machine's own limits."""
