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
from .fused import FusedStep as FusedStep
from .fused import fused as fused
from .hybrid import HybridLoss as HybridLoss
from .lambda_schedule import LambdaSchedule as LambdaSchedule
from .maps.alpha_flow import AlphaFlowLoss as AlphaFlowLoss
from .maps.improved_mean_flow import ImprovedMeanFlowLoss as ImprovedMeanFlowLoss
from .maps.improved_mean_flow import ImprovedMeanFlowPairs as ImprovedMeanFlowPairs
from .maps.inductive_moments import InductiveMomentLoss as InductiveMomentLoss
from .maps.inductive_moments import MomentGroups as MomentGroups
from .maps.mean_flow import MeanFlowLoss as MeanFlowLoss
from .maps.self_distillation import EulerianMapLoss as EulerianMapLoss
from .maps.self_distillation import LagrangianMapLoss as LagrangianMapLoss
from .maps.self_distillation import ProgressiveMapLoss as ProgressiveMapLoss
from .maps.self_distillation import ProgressivePairs as ProgressivePairs
from .maps.self_distillation import SelfDistillationPairs as SelfDistillationPairs
from .maps.shortcut import ShortcutLoss as ShortcutLoss
from .maps.shortcut import ShortcutPairs as ShortcutPairs
from .maps.td_map import MapChains as MapChains
from .maps.td_map import TDMapLoss as TDMapLoss
from .physics_residual import PhysicsResidualLoss as PhysicsResidualLoss
from .posteriors import ExactLaw as ExactLaw
from .posteriors import ReferenceBatch as ReferenceBatch
from .posteriors import exact_x0_law as exact_x0_law
from .posteriors import reference_mean as reference_mean
from .priorgrad import PriorGradLoss as PriorGradLoss
from .priorgrad import PriorStates as PriorStates
from .progressive import HalvingSteps as HalvingSteps
from .progressive import ProgressiveLoss as ProgressiveLoss
from .scheduled_sampling import RollbackStates as RollbackStates
from .shortdf import ShortDFLoss as ShortDFLoss
from .shortdf import sample_shortdf_pairs as sample_shortdf_pairs
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
