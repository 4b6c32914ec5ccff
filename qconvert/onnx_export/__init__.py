"""Checkpoints as ONNX packages: graphs built from the configuration, weights streamed beside them."""
