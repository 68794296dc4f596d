"""Models that answer others: one request after the other, or many lines on many machines."""
