"""How rewards of a rollout become advantages: one file for each way."""
