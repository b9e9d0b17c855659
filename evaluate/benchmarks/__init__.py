"""The benchmarks, one file each; evaluate/benchmark.py says what such a file holds."""
