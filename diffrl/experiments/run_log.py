"""What a run shows beside its metrics.csv: figures and sheets of samples, in TensorBoard or Weights & Biases."""

import os
from typing import Any

import numpy as np
from torch import Tensor

from diffrl.errors import InputError
from diffrl.experiments.image_sheets import image_sheet, square_columns
from diffrl.extras import require, require_installed

__all__ = ["RunLog", "check_log"]

KINDS = ("csv", "tensorboard", "wandb")


def check_log(kind: str) -> None:
    """Refuse a kind that is not known, or whose library is not there.

    Raises:
        ValueError: it is not known.
        MissingExtra: what it needs is not installed.
    """
    if kind not in KINDS:
        raise InputError(f"logger is {kind!r}: give {', '.join(KINDS)}")
    if kind == "tensorboard":
        require_installed("tensorboard", extra=kind)
    if kind == "wandb":
        require_installed("wandb", "PIL", extra=kind)


class RunLog:
    """Scalars and sheets of images by names; of "csv" nothing is kept, as metrics.csv and samples/ have all of it.

    Args:
        kind: "csv", "tensorboard" or "wandb"; the environment variable WANDB_MODE says whether the latter is online.
        folder: of the run.
        name: of the job.
    """

    def __init__(self, kind: str, folder: str, name: str) -> None:
        self.kind = kind
        self._logger = None if kind == "csv" else _opened(kind, folder, name)

    def scalar(self, name: str, value: float, step: int) -> None:
        """A figure of a step, such as "td/loss_value"."""
        if self._logger is not None:
            self._logger.log_scalar(name, value, step=step)

    def sheet(self, name: str, x: Tensor, *, nfe: str, seed: int, step: int) -> None:
        """Images [n, C, H, W] in [-1, 1] side by side, under "NAME/samples_nfe_9_n_64_seed_0"; other samples are none.

        Args:
            name: whose they are.
            x: the images.
            nfe: network evaluations of each.
            seed: sample j was drawn with seed + j.
            step: of the training.
        """
        if self._logger is None or x.ndim != 4 or x.shape[1] not in (1, 3):
            return
        pixels = image_sheet(x.float().cpu().numpy(), square_columns(len(x)))
        tag = f"{name}/samples_nfe_{nfe}_n_{len(x)}_seed_{seed}"
        if self.kind == "tensorboard":
            self._logger.experiment.add_image(tag, pixels, step, dataformats="HWC")
            self._logger.experiment.flush()
            return
        bytes_ = (255 * pixels).round().astype(np.uint8)
        image = require("wandb", "wandb").Image(bytes_ if bytes_.shape[2] == 3 else bytes_[..., 0])
        self._logger.experiment.log({tag: image, f"{name}/step": step})  # TorchRL's axis of the other figures


def _opened(kind: str, folder: str, name: str) -> Any:
    """TorchRL's logger of that kind."""
    from torchrl.record.loggers import get_logger  # costs seconds

    mode = {"wandb_kwargs": {"mode": os.environ.get("WANDB_MODE", "online")}} if kind == "wandb" else {}
    return get_logger(kind, logger_name=f"{folder}/{kind}", experiment_name=name, **mode)
