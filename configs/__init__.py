"""Hydra's config groups, and the commands that read them."""

if __name__ != "diffrl.configs":
    raise ImportError("import this package as diffrl.configs")
