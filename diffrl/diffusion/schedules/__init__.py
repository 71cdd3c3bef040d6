"""Noise processes: α_t, σ_t and the grids of times that samplers and chains walk."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
