"""Calibrated quantization: each layer is run, rounded by its inputs, written, and its outputs go on to the next."""
