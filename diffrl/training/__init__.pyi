from .checkpoints import CheckpointError as CheckpointError
from .optim import NonFiniteLoss as NonFiniteLoss
from .runs import Run as Run
from .runs import RunFolder as RunFolder
from .runs import RunFolderError as RunFolderError
from .runs import load as load
from .trainer import Trainer as Trainer
