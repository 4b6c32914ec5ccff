"""What `bench_scale.py` is made of: checkpoints without weights, the arithmetic of growth, the page and its plot."""
