"""Training a memory: supervised warm-up, stage I (what it holds) and stage II (when it is invoked).

From a row to its loss: `rows.py` checks and orders the rows; `experience.py` decodes trajectories of them
(`rollout.py`), scores them (`rewards/`) and compares them within their group; `trainer.py` replays the trajectories
with gradient (`replay.py`) and minimises `grpo.grpo_loss`. `run.py` takes a stage from settings to a saved memory.
"""
