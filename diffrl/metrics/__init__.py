"""How good a denoiser, a sample, a target, a handful of seeds is."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
