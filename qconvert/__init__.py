"""Convert and quantize Qwen3.5-MoE checkpoints, and prove what the conversion cost."""

__version__ = "0.1.0"
