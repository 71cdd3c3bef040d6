"""Vector environments for agents of Stable-Baselines3, which ask for its own kind."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from diffrl.errors import InputError
from diffrl.extras import require

__all__ = ["sb3_vec_env"]


def sb3_vec_env(env: VectorEnv[Any, Any, Any]) -> Any:
    """A vector environment of Gymnasium as a `VecEnv` of Stable-Baselines3, without one process or object a chain.

    >>> import diffrl, gymnasium
    >>> from diffrl.envs import sb3_vec_env
    >>> env = gymnasium.make_vec("DiffusionMDP-v0", num_envs=8, autoreset_mode="SameStep")
    >>> sb3_vec_env(env).reset()["x_t"].shape
    (8, 2)

    Args:
        env: with autoreset_mode="SameStep", which is what Stable-Baselines3 expects, and scalar rewards.

    Raises:
        MissingExtra: Stable-Baselines3 is not installed.
        ValueError: another autoreset mode, or vector rewards.
    """
    base = require("stable_baselines3.common.vec_env", "agents").VecEnv
    mode = env.metadata.get("autoreset_mode")
    if mode is not AutoresetMode.SAME_STEP:
        raise InputError(f"autoreset_mode is {mode and mode.value!r}: make the environment with 'SameStep'")
    if hasattr(env.unwrapped, "reward_space"):
        raise InputError("the rewards are vectors: make the environment with reward_mode='sum'")
    return type("ChainVecEnv", (_Adapter, base), {})(env)


class _Adapter:
    """What a `VecEnv` must do; the base class is known only when Stable-Baselines3 is."""

    num_envs: int
    _seeds: list[int | None]
    _options: list[dict[str, Any]]

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.env = env
        spaces: Any = (env.single_observation_space, env.single_action_space)
        super().__init__(env.num_envs, *spaces)  # type: ignore[call-arg]

    def reset(self) -> Any:
        if any(self._options):
            raise InputError(
                "options of a reset are not passed on: set them at the vector environment itself"
            )
        seeds = self._seeds if any(s is not None for s in self._seeds) else None
        observation, infos = self.env.reset(seed=seeds)  # type: ignore[arg-type]
        self._seeds, self.reset_infos = [None] * self.num_envs, self._rows(infos)
        return observation

    def step_async(self, actions: Any) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, Any, Any, list[dict[str, Any]]]:
        observation, reward, terminated, truncated, infos = self.env.step(self._actions)
        done = terminated | truncated
        last, last_infos = infos.pop("final_obs", None), self._rows(infos.pop("final_info", {}))
        rows = self._rows(infos)
        for i in np.flatnonzero(done).tolist():
            cut = bool(truncated[i] and not terminated[i])
            rows[i] = last_infos[i] | {"terminal_observation": last[i], "TimeLimit.truncated": cut}
        return observation, reward, done, rows

    def _rows(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        """The infos chain by chain."""
        known = {key: values for key, values in infos.items() if not key.startswith("_")}
        return [{key: values[i] for key, values in known.items()} for i in range(self.num_envs)]

    def close(self) -> None:
        self.env.close()

    def get_images(self) -> Sequence[Any]:
        return list(self.env.render() or ())

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        return [getattr(self.env.unwrapped, attr_name)] * len(self._indices(indices))

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        if len(self._indices(indices)) < self.num_envs:
            raise InputError(f"indices is {indices!r}: the chains share {attr_name}; set it for all of them")
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: int | Iterable[int] | None = None, **kwargs: Any
    ) -> list[Any]:
        answer = getattr(self.env.unwrapped, method_name)(*args, **kwargs)
        return [answer[i] for i in self._indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: int | Iterable[int] | None = None) -> list[bool]:
        return [False] * len(self._indices(indices))

    def _indices(self, given: int | Iterable[int] | None) -> list[int]:
        if given is None:
            return list(range(self.num_envs))
        return [given] if isinstance(given, int) else list(given)
