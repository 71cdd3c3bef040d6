"""Tables and figures of runs and comparisons, for people."""
