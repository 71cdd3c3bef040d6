import diffrl.finetuning.methods.ddpo
import diffrl.finetuning.methods.sdpo

from .cdm import ShortRollouts as ShortRollouts
from .cdm import reverse_sde as reverse_sde
from .consistency import ConsistencyLoss as ConsistencyLoss
from .consistency_pairs import sample_consistency_pairs as sample_consistency_pairs
from .continuous_ct import ContinuousConsistencyLoss as ContinuousConsistencyLoss
from .continuous_ct import sample_trigflow_states as sample_trigflow_states
from .denoising import sample_log_normal_states as sample_log_normal_states
from .denoising import sample_uniform_states as sample_uniform_states
from .distillation import DistillationPairs as DistillationPairs
from .double_sampling import DoubleSamplingLoss as DoubleSamplingLoss
from .ect import ECTLoss as ECTLoss
from .ect_pairs import ECTPairs as ECTPairs
from .lambda_schedule import LambdaSchedule as LambdaSchedule
from .posteriors import ExactLaw as ExactLaw
from .posteriors import ReferenceBatch as ReferenceBatch
from .posteriors import exact_x0_law as exact_x0_law
from .posteriors import reference_mean as reference_mean
from .progressive import HalvingSteps as HalvingSteps
from .progressive import ProgressiveLoss as ProgressiveLoss
from .soft_update import SoftUpdate as SoftUpdate
from .stable_ct import StablePairs as StablePairs
from .stand_ins import StandIn as StandIn
from .stand_ins import StandInChains as StandInChains
from .stand_ins import single_transitions as single_transitions
from .stand_ins import with_x0_mean as with_x0_mean
from .td_edm import sample_td_edm_pairs as sample_td_edm_pairs
from .td_edm import td_edm_loss as td_edm_loss
from .transitions import Transition as Transition
from .transitions import ode_step as ode_step
from .twins import TwinSteps as TwinSteps
from .twins import reverse_rollout as reverse_rollout
from .twins import twins_of_laws as twins_of_laws
from .twins import twins_of_rollouts as twins_of_rollouts
from .value import ValueLoss as ValueLoss

DDPOLoss = diffrl.finetuning.methods.ddpo.DDPOLoss
SDPOLoss = diffrl.finetuning.methods.sdpo.SDPOLoss
