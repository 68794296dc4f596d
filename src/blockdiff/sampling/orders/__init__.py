"""Which positions an evaluation fixes, and with which tokens: an order is one small object."""
