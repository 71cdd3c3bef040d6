"""Training objectives: a TorchRL LossModule each, and what draws the states it is fed with."""

from diffrl.objectives.consistency import ConsistencyLoss as ConsistencyLoss
from diffrl.objectives.consistency_pairs import sample_consistency_pairs as sample_consistency_pairs
from diffrl.objectives.ddpo import DDPOLoss as DDPOLoss
from diffrl.objectives.denoising import sample_log_normal_states as sample_log_normal_states
from diffrl.objectives.denoising import sample_uniform_states as sample_uniform_states
from diffrl.objectives.lambda_schedule import LambdaSchedule as LambdaSchedule
from diffrl.objectives.sdpo import SDPOLoss as SDPOLoss
from diffrl.objectives.soft_update import SoftUpdate as SoftUpdate
from diffrl.objectives.td_edm import sample_td_edm_pairs as sample_td_edm_pairs
from diffrl.objectives.td_edm import td_edm_loss as td_edm_loss
from diffrl.objectives.value import ValueLoss as ValueLoss

__all__ = [
    "ConsistencyLoss",
    "DDPOLoss",
    "LambdaSchedule",
    "SDPOLoss",
    "SoftUpdate",
    "ValueLoss",
    "sample_consistency_pairs",
    "sample_log_normal_states",
    "sample_td_edm_pairs",
    "sample_uniform_states",
    "td_edm_loss",
]
