"""Training objectives: a TorchRL LossModule each, and what draws the states it is fed with."""

from diffrl.objectives.td_edm import sample_td_edm_pairs as sample_td_edm_pairs
from diffrl.objectives.td_edm import td_edm_loss as td_edm_loss
from diffrl.objectives.value import ValueLoss as ValueLoss

__all__ = ["ValueLoss", "sample_td_edm_pairs", "td_edm_loss"]
