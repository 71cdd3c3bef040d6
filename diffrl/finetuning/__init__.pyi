from . import recipes as recipes
from .check_report import CheckFailed as CheckFailed
from .checks import check as check
from .finetuner import Finetuner as Finetuner
from .finetuner import Iterations as Iterations
from .policy import DenoisingPolicy as DenoisingPolicy
from .rollouts.chains import collect_rollout as collect_rollout
from .tune import finetune as finetune
