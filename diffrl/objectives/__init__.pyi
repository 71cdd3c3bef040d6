import diffrl.finetuning.methods.ddpo
import diffrl.finetuning.methods.sdpo

from .consistency import ConsistencyLoss as ConsistencyLoss
from .consistency_pairs import sample_consistency_pairs as sample_consistency_pairs
from .denoising import sample_log_normal_states as sample_log_normal_states
from .denoising import sample_uniform_states as sample_uniform_states
from .ect import ECTLoss as ECTLoss
from .ect_pairs import ECTPairs as ECTPairs
from .lambda_schedule import LambdaSchedule as LambdaSchedule
from .soft_update import SoftUpdate as SoftUpdate
from .td_edm import sample_td_edm_pairs as sample_td_edm_pairs
from .td_edm import td_edm_loss as td_edm_loss
from .value import ValueLoss as ValueLoss

DDPOLoss = diffrl.finetuning.methods.ddpo.DDPOLoss
SDPOLoss = diffrl.finetuning.methods.sdpo.SDPOLoss
