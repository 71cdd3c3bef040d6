"""Where the two towers meet: one file for each way to train a denoiser."""

from importlib import import_module
from typing import Any

import lazy_loader

_getattr, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# Losses of a policy live a room higher; a table of strings, as an import would lead upwards.
_POLICY_LOSSES = {
    "DDPOLoss": "diffrl.finetuning.methods.ddpo",
    "SDPOLoss": "diffrl.finetuning.methods.sdpo",
}
__all__ += _POLICY_LOSSES


def __getattr__(name: str) -> Any:
    return getattr(import_module(_POLICY_LOSSES[name]), name) if name in _POLICY_LOSSES else _getattr(name)
