"""What ``bench_quantize.py`` is made of, in the standard library only: light beside what it measures."""
