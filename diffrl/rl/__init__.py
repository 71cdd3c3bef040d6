"""Reinforcement learning on tensors: returns, value estimators for TorchRL, and advantages."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
