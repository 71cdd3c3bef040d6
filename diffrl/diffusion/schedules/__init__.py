"""Noise schedules: α_t and σ_t, and the grids of times that chains and samplers visit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
