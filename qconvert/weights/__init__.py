"""Weights of any checkpoint that we read, for the reference model."""
