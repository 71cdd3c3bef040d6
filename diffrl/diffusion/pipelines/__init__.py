"""Networks of diffusers pipelines as denoisers, with low-rank adapters to train."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
