"""No RL word: schedules, posteriors, chains, denoisers (exact ones too), networks, samplers, pipelines."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
