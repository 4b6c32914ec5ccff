"""Which scheme each part of a model gets, so that all together fit a number of bytes at the least predicted loss."""
