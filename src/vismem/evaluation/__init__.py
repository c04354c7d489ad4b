"""Evaluation: answers with and without memory, the paper's tables, and benchmarks through lmms-eval."""
