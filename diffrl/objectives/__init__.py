"""Where the two towers meet: one file for each way to train a denoiser."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
