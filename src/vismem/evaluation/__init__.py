"""Evaluation: answers with and without memory, the paper's tables, the audit, and benchmarks through lmms-eval.

`answering` writes records of answers, `tables` makes tables of them, `audit` asks whether memory is really used.
"""
