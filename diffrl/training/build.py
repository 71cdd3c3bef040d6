"""From a configuration to the data, the denoiser and the sampler of a run."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.data.registry import DATASETS
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import EmpiricalDenoiser, MixtureDenoiser
from diffrl.diffusion.networks.registry import build_network
from diffrl.diffusion.samplers.base import Sampler
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.errors import of_group
from diffrl.registry import Config

__all__ = [
    "Events",
    "build_data",
    "build_denoiser",
    "build_oracle",
    "build_sampler",
]

PRIOR_ROWS, PRIOR_SEED = 10_000, 2_236_067_977  # for a prior's mean and std, of what is not in memory


class Events(NamedTuple):
    """What a network is built for.

    Args:
        event_shape: *E, the shape of a sample.
        num_classes: number of labels; 0: none.
        class_shares: of each class among the training samples, if it is known.
    """

    event_shape: tuple[int, ...]
    num_classes: int = 0
    class_shares: tuple[float, ...] = ()


def build_data(config: Config) -> Data:
    """The data set of ``config["data"]``."""
    data: Data = DATASETS.build(config["data"])
    return data


def build_sampler(config: Config) -> Sampler:
    """The sampler of ``config["sampler"]``."""
    sampler: Sampler = SAMPLERS.build(config["sampler"])
    return sampler


def build_denoiser(config: Config, data: Data | Events) -> Denoiser:
    """A fresh denoiser in the run's dtype, its weights drawn from ``config["seed"]``, all else left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        network = build_network(config["network"], event_shape=data.event_shape, num_classes=data.num_classes)
    with of_group("denoiser", config["denoiser"]):
        denoiser = Denoiser(network, PROCESSES.build(config["process"]), **config["denoiser"])
    if denoiser.prior is not None and isinstance(data, Data):
        denoiser.prior.fit(*_rows_for_prior(data))
    return denoiser.to(torch.float64) if config["dtype"] == "float64" else denoiser


def _rows_for_prior(data: Data) -> tuple[Tensor, Tensor | None]:
    """Training rows and their labels: all that are in memory, or 10,000 that are drawn, the same for every run."""
    if data.train is not None:
        return data.train, data.train_labels
    n = PRIOR_ROWS if data.num_train is None else min(PRIOR_ROWS, data.num_train)
    return data.batch(n, torch.Generator().manual_seed(PRIOR_SEED))


def build_oracle(data: Data, process: Schedule) -> MixtureDenoiser | None:
    """The exact denoiser of the data: of its law, or of its training points; None if neither is at hand."""
    if data.mixture is not None:
        m = data.mixture
        return MixtureDenoiser(process, m.means, m.stds, m.weights)
    return None if data.train is None else EmpiricalDenoiser(process, data.train)
