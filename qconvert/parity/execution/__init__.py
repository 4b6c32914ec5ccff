"""Faults of execution: which block of which layer an engine computes otherwise, and what it does instead."""
