"""How a quantized tensor is named and laid out on disk, one file per format, and what engines read."""
