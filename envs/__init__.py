"""Environments over the denoising chain, for TorchRL and Gymnasium; import them as diffrl.envs."""

import lazy_loader

if __name__ != "diffrl.envs":
    raise ImportError(f"this package is not {__name__!r}: import it as diffrl.envs")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
