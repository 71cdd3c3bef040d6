"""Hydra's config groups and the command line over them; recipes are the YAML files beside this one."""

if __name__ != "diffrl.configs":
    raise ImportError("import this package as diffrl.configs")
