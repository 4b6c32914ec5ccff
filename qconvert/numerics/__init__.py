"""Pure functions on tensors: rounding, packing, activation rounding, errors. Nothing here knows a name."""
