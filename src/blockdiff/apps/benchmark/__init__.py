"""Measured comparisons: alternatives in turn, in one run, against the machine's own limits.

compare.py   worker processes that take turns, ratios pair by pair, what the machine can do
naive.py     the obvious way of everything, as the paper describes it
works.py     what is timed: training steps, sampling, attention, likelihoods
report.py    one record of a comparison, for people and as JSON
"""
