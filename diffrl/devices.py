"""Devices by name, refused in one line where this machine lacks them."""

import torch

from diffrl.errors import InputError

__all__ = ["usable_device"]


def usable_device(device: torch.device | str) -> torch.device:
    """The device of that name.

    Args:
        device: such as "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: there is no such device here, or this build of torch cannot use it.
    """
    try:
        torch.zeros(1, device=device)
        return torch.device(device)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
        TypeError,
    ) as error:  # one for each way to lack it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"device is {str(device)!r}, which cannot be used ({reason}): give cpu") from error
