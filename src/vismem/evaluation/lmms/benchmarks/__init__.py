"""Prompts and rule-based scores of the packaged tasks, one file per benchmark.

`pictures` finds a sample's images. These modules follow lmms-eval's conventions for `doc_to_messages` and
`process_results`, and know no model.
"""
