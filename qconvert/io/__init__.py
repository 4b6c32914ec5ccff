"""Bytes without meaning: safetensors headers, checkpoints, shards."""
