"""Small networks to denoise with: F_θ(x [N, *E], c_noise [N], cond [N] or None) → [N, *E]."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
