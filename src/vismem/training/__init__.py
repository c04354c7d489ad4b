"""Training: rewards, rollouts and the trainer."""
