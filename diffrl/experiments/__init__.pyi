from .finetune import TunedRun as TunedRun
from .finetune import load_tuned as load_tuned
from .finetune import run_finetuning as run_finetuning
from .studies import run_comparison as run_comparison
from .train import run_experiment as run_experiment
