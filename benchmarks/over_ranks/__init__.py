"""The sections of benchmarks/expert_parallel.py."""
