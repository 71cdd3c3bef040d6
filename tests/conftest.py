"""What every test process does once."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")  # read when torchrl is imported

import torch  # noqa: E402

torch.set_num_threads(1)  # the test processes run side by side

collect_ignore = ["toys"]  # doctests would import them, and so register them
