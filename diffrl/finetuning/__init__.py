"""The policy and the pieces of tuning it: rollouts, placement of rewards, credit, methods."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
