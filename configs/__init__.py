"""Hydra's config groups and recipes; imported as diffrl.configs."""
