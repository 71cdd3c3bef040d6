"""A cache of rewards: each is found again by the exact bytes of its sample and condition."""

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["CACHE_SIZE", "RewardCache", "cache_keys"]

CACHE_SIZE = 100_000  # rewards that one cache holds; the ones not used for longest are forgotten
KEY_BYTES = 16  # length of the digest that stands for a sample and its condition


def _row_bytes(x: Tensor) -> tuple[str, list[bytes]]:
    """Dtype and shape of the rows of a tensor, as text, and the bytes of each row."""
    kind = f"{x.dtype}{tuple(x.shape[1:])}"
    if not x.numel():
        return kind, [b""] * len(x)
    rows = x.detach().cpu().reshape(len(x), -1).contiguous().view(torch.uint8).numpy()
    return kind, [row.tobytes() for row in rows]


def cache_keys(x0: Tensor, cond: Any) -> list[bytes]:
    """A digest for each sample; two are equal if shape, dtype and bytes of sample and condition are.

    Args:
        x0: samples, shape [N, *E].
        cond: tensor [N, ...], list of N picklable objects, or None.
    """
    kind, rows = _row_bytes(x0)
    if isinstance(cond, Tensor):
        cond_kind, conds = _row_bytes(cond)
    else:
        cond_kind = "none" if cond is None else "objects"
        conds = [b""] * len(rows) if cond is None else [pickle.dumps(c) for c in cond]
    start = hashlib.blake2b(f"{kind}|{cond_kind}|".encode(), digest_size=KEY_BYTES)
    keys = []
    for row, c in zip(rows, conds, strict=True):
        digest = start.copy()
        digest.update(row + c)
        keys.append(digest.digest())
    return keys


class RewardCache:
    """The `CACHE_SIZE` rewards that were used last."""

    def __init__(self) -> None:
        self._rewards: OrderedDict[bytes, float] = OrderedDict()

    def find(self, keys: list[bytes]) -> dict[bytes, float]:
        """The known ones of these keys, with their rewards."""
        return {key: self._rewards[key] for key in keys if key in self._rewards}

    def remember(self, rewards: Mapping[bytes, float]) -> None:
        """Add rewards, or mark them as used; the ones not used for longest are forgotten."""
        for key, reward in rewards.items():
            self._rewards[key] = reward
            self._rewards.move_to_end(key)
        while len(self._rewards) > CACHE_SIZE:
            self._rewards.popitem(last=False)

    def state_dict(self) -> dict[str, Tensor]:
        """Keys uint8 [M, 16] and rewards float64 [M], in the order of their last use."""
        keys = torch.frombuffer(bytearray(b"".join(self._rewards) or b"\0" * KEY_BYTES), dtype=torch.uint8)
        rewards = torch.tensor(list(self._rewards.values()), dtype=torch.float64)
        return {"keys": keys.view(-1, KEY_BYTES)[: len(rewards)].clone(), "rewards": rewards}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the rewards of a checkpoint."""
        keys = [row.tobytes() for row in state["keys"].cpu().numpy()]
        self._rewards = OrderedDict(zip(keys, state["rewards"].tolist(), strict=True))
