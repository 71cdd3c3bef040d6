"""The denoising chain as a TorchRL environment: a batch of Markov reward processes on any device."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from diffrl import keys
from diffrl.data.dataset import Data
from diffrl.diffusion.schedules.base import Schedule
from diffrl.envs.arguments import require_states
from diffrl.envs.reward_process import RewardProcess, States
from diffrl.envs.torchrl_common import ChainEnv
from diffrl.errors import InputError

__all__ = ["DiffusionMRP"]


class DiffusionMRP(ChainEnv):
    """A batch of denoising chains without decisions: each step pays how far the posterior mean moved.

    A chain starts at the noisiest level of a datum x0 that only the environment knows, and ends at x0 itself:

        x_s ~ N(A x0 + κ x_t, std²),    r_i = μ_i - μ_{i+k},    μ_i = A_i x0 + κ_i x_i

    `rollout(K)` draws from the same law as `diffrl.sample_chain`, and gives the same numbers for the same noise;
    training uses the latter, which is faster. The only action is 0, to wait. All of the state travels in the
    TensorDict, so `step` may be given any state; past the clean one nothing changes and nothing is paid.

    `reset(td, set_state=True)` starts at the x0 of td (and its `cond`); with an `index` too, at that
    position; with `x_t` too, at that state.

    >>> import diffrl, diffrl.envs, torch
    >>> env = diffrl.envs.DiffusionMRP(diffrl.EDM(), torch.randn(100, 2), num_steps=18, batch_size=[64])
    >>> env.rollout(18)["next", "reward"].shape
    torch.Size([64, 18, 2])

    Source: Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048.

    Args:
        process: noise schedule.
        data: what x0 is drawn from: a data set, or points of a floating dtype, a tensor or array [M, *E].
        num_steps: N ≥ 1, the noise levels; see `diffrl.diffusion.chains.Chain`.
        coupling: η ∈ [0, 1], or "markov" (1), "shared" (0): how successive states share their noise.
        span: k ≥ 1, levels between successive states; K = ⌈N/k⌉ steps reach clean data.
        stride: Δ > 0, levels of the step whose posterior mean is the value.
        value: "posterior_mean", or "clean": A = 1, κ = 0, and only the last step pays.
        batch_size: the chains, e.g. [64]; [] is a single one.
        device: where states live; data are drawn on the CPU.
        reward_mode: "vector", of the event's shape, or "sum" over it, [*b, 1].
        max_steps: cut chains at this position: truncated; None lets them run to clean data.
        noise: standard normal numbers for a tensor of the wanted shape, as `Noise` gives: called
            once at each reset and each step; None draws from the environment's own generator.
        seed: seed of its generator; None draws one from torch's global generator.

    Raises:
        TypeError: process is no schedule, or data holds integers or is something else.
        ValueError: an argument is outside its range.
        DataError: data holds NaN or infinity, or is smaller than the batch.
    """

    _supports_set_state = True

    def __init__(
        self,
        process: Schedule,
        data: Data | Tensor | NDArray[Any],
        *,
        num_steps: int,
        coupling: float | str = "markov",
        span: int = 1,
        stride: float = 1.0,
        value: Literal["posterior_mean", "clean"] = "posterior_mean",
        batch_size: Sequence[int] = (64,),
        device: torch.device | str = "cpu",
        reward_mode: Literal["vector", "sum"] = "vector",
        max_steps: int | None = None,
        noise: Callable[[Tensor], Tensor] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, device=device, noise=noise)
        if reward_mode not in ("vector", "sum"):
            raise InputError(f"reward_mode is {reward_mode!r}: give 'vector' or 'sum'")
        self.reward_process = RewardProcess(
            process,
            data,
            num_steps=num_steps,
            coupling=coupling,
            span=span,
            stride=stride,
            value=value,
            max_steps=max_steps,
        )
        self.reward_mode = reward_mode
        self._make_specs()
        self._make_generators(seed)

    @property
    def num_transitions(self) -> int:
        """K, the steps of a whole chain: `rollout(env.num_transitions)`."""
        return self.reward_process.chain.num_transitions

    def _make_specs(self) -> None:
        b, r = self.batch_size, self.reward_process

        def real(*shape: int) -> Unbounded:
            return Unbounded((*b, *shape), dtype=r.dtype, device=self.device)

        def state() -> Composite:
            index = Bounded(0, r.chain.num_transitions, shape=(*b, 1), dtype=torch.int64, device=self.device)
            spec = Composite(
                {
                    keys.X_T: real(*r.event_shape),
                    keys.T: real(1),
                    keys.X0: real(*r.event_shape),
                    keys.A: real(1),
                    keys.KAPPA: real(1),
                    keys.INDEX: index,
                },
                shape=b,
                device=self.device,
            )
            if r.num_classes:
                spec[keys.COND] = Categorical(r.num_classes, shape=b, dtype=torch.int64, device=self.device)
            return spec

        self.observation_spec, self.state_spec = state(), state()
        self.action_spec = Categorical(1, shape=b, dtype=torch.int64, device=self.device)
        self.reward_spec = real(1) if self.reward_mode == "sum" else real(*r.event_shape)
        self.done_spec = self._flags_spec()

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """The only action, which takes no random number."""
        td = TensorDict({}, self.batch_size, device=self.device) if tensordict is None else tensordict
        return td.update(self.full_action_spec.zero())

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        set_state: bool = False,
        **_: Any,  # TorchRL passes on what the caller gave to reset
    ) -> TensorDict:
        b, r = self.batch_size, self.reward_process
        index = torch.zeros(b, dtype=torch.int64, device=self.device)
        if set_state and tensordict is not None:
            return self._observe(*self._given(tensordict, index))
        x0, cond = r.draw(b.numel(), self._cpu_generator)
        x0 = x0.to(self.device).view(*b, *r.event_shape)
        cond = None if cond is None else cond.to(self.device).view(b)
        return self._observe(r.start(index, x0, self._draw_noise(x0)), x0, cond)

    def _given(self, td: TensorDictBase, index: Tensor) -> tuple[States, Tensor, Tensor | None]:
        """States, x0 and labels that the caller sets; the noise of a state that is not given is drawn."""
        r = self.reward_process
        x0, x, at = (td.get(key, None) for key in (keys.X0, keys.X_T, keys.INDEX))
        if x0 is None or (x is not None and at is None):
            missing = keys.X0 if x0 is None else keys.INDEX
            raise InputError(f"set_state=True: the TensorDict has no {missing!r}, which the state needs")
        x0, cond = r.given(x0, td.get(keys.COND, None), self.batch_size)
        if at is not None:
            index = self._given_index(at, r.last)
        if x is not None:
            require_states(keys.X_T, x, self.batch_size, r.event_shape)
        states = r.start(index, x0, self._draw_noise(x0)) if x is None else r.states(index, x.to(r.dtype))
        return states, x0, cond

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        x0, x, index = (tensordict.get(key) for key in (keys.X0, keys.X_T, keys.INDEX))
        left = self.reward_process.states(index.squeeze(-1), x)
        states, reward, terminated, truncated = self.reward_process.step(left, x0, self._draw_noise(x))
        if self.reward_mode == "sum":
            reward = reward.flatten(self.batch_dims).sum(-1, keepdim=True)
        reached = self._observe(states, x0, tensordict.get(keys.COND, None))
        return self._paid(reached, reward, terminated, truncated)

    def _observe(self, states: States, x0: Tensor, cond: Tensor | None) -> TensorDict:
        seen = {
            keys.X_T: states.x,
            keys.T: states.t.unsqueeze(-1),
            keys.X0: x0,
            keys.A: states.A.unsqueeze(-1),
            keys.KAPPA: states.kappa.unsqueeze(-1),
            keys.INDEX: states.index.unsqueeze(-1),
        }
        if cond is not None:
            seen[keys.COND] = cond
        return TensorDict(seen, self.batch_size, device=self.device)
