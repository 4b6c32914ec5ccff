"""How quantized matrices are named and laid out on disk, and what engines demand of a whole checkpoint."""
