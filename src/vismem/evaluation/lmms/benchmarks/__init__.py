"""What the tasks that come with the package need besides their YAML: prompts, and scores by rules.

A file per benchmark, and `pictures`, which finds a sample's images in a folder, an archive or on the hub. They know
lmms-eval's conventions - what `doc_to_messages` and `process_results` take and give - and no model.
"""
