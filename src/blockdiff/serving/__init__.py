"""Models that answer over the network."""
