"""A readable PyTorch implementation of Qwen3.5-MoE: the yardstick that conversions are measured against."""
