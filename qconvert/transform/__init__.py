"""Rewrites of weights that have an inverse or a proof."""
