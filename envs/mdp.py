"""The denoising chain as a TorchRL decision process: the agent chooses each next latent, on any device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded

from diffrl import keys
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.schedules.base import Schedule
from diffrl.envs.arguments import as_dtype, require_states
from diffrl.envs.decision_process import ActionKind, ActionScale, DecisionProcess, Latents, RewardPlacement
from diffrl.envs.torchrl_common import ChainEnv
from diffrl.errors import InputError
from diffrl.ranges import require_int
from diffrl.rewards.calls import Reward

__all__ = ["DiffusionMDP"]


class DiffusionMDP(ChainEnv):
    """A batch of denoising chains in which a policy chooses each next latent, for a reward of the clean sample.

        x_0 ~ N(0, σ² I) at the noisiest level;    x_{i+1} = c_i a_i;    r = R(x_K, c) on reaching clean data, else 0

    With `diffrl.DenoisingPolicy` as its policy, a rollout draws that policy's samples. Rows of one group share
    their condition, and as a pair their first latent too; their steps are independent. All of the state travels
    in the TensorDict, so `step` may be given any state; past the clean one nothing changes and nothing is paid.

    `reset(td, set_state=True)` starts at the x_t of td, at its `index` (default 0), with its `cond` and `group`
    where there are any; what it lacks is drawn.

    Actions are latents, c_i = 1 and their spec unbounded, which is what a `DenoisingPolicy` writes. With an
    `action_scale` the spec is [-1, 1] and the units are those of `DiffusionMDP-v0`, for agents whose policy is bounded.

    >>> import diffrl, diffrl.envs, torch
    >>> process = diffrl.Flow()
    >>> denoiser = diffrl.GaussianDenoiser(process, torch.zeros(2), torch.eye(2))
    >>> policy = diffrl.DenoisingPolicy(denoiser, diffrl.Ancestral(), num_steps=8, reduction="mean")
    >>> reward = lambda x0, cond: -x0.square().sum(1)
    >>> env = diffrl.envs.DiffusionMDP(process, reward, event_shape=(2,), num_steps=8, batch_size=[16])
    >>> env.rollout(8, policy)["next", "reward"].shape
    torch.Size([16, 8, 1])

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2,
    https://arxiv.org/abs/2305.13301; pairs and dense rewards: Aligning Few-Step Diffusion Models with Dense Reward
    Difference Learning (Zhang et al., 2024), https://arxiv.org/abs/2411.11727.

    Args:
        process: noise schedule.
        reward: R, any callable (x0 [N, *E], cond) → N numbers; see `diffrl.rewards`.
        event_shape: *E of a latent.
        num_steps: K = N ≥ 1, the noise levels and the steps of a chain.
        sampler: draws the next latent for the action "x0_hat". Give the policy's sampler too if it has a grid of its
            own.
        batch_size: the chains, e.g. [64]; [] is a single one.
        action: "next_latent", or "x0_hat": the agent gives the clean estimate, and the environment draws the next
            latent from the sampler's law.
        reward_placement: "terminal", or "dense": every step pays R of the clean estimate that it was made from. With
            the action "next_latent", the policy must write that estimate as `x0_hat`.
        group_size: G ≥ 1, the number of neighbouring rows in one group; the batch is a multiple of it.
        pairs: groups are pairs, and rows 2p and 2p+1 share their first latent.
        conditions: the M conditions that each group's is drawn from, a tensor or array [M, ...] on the CPU; None: no
            condition.
        device: where states live.
        max_steps: cut chains at this position: truncated; None lets them run to clean data.
        action_scale: c_i: None for 1, a number > 0, or "level" for that of the level: s α + 4 σ at the latent reached,
            rounded up to a power of two (s for the action "x0_hat").
        data_scale: s > 0, the largest number of clean data, which "level" needs.
        dtype: "float32" or "float64", of latents.
        noise: standard normal numbers for a tensor of the wanted shape, as `Noise` gives: called once at
            each reset (for pairs, with one row a pair), and once at each step with the action "x0_hat"; None draws
            from the environment's own generator.
        seed: seed of its generator; None draws one from torch's global generator.

    Raises:
        TypeError: process is no schedule, the reward is not callable, or the sampler's step is not one Gaussian.
        ValueError: an argument is outside its range, the action "x0_hat" without a sampler, or a sampler that does
            not work on the process.
    """

    _supports_set_state = True

    def __init__(
        self,
        process: Schedule,
        reward: Reward,
        *,
        event_shape: Sequence[int],
        num_steps: int,
        sampler: GaussianSampler | None = None,
        batch_size: Sequence[int] = (64,),
        action: ActionKind = "next_latent",
        reward_placement: RewardPlacement = "terminal",
        group_size: int = 1,
        pairs: bool = False,
        conditions: Tensor | NDArray[Any] | None = None,
        device: torch.device | str = "cpu",
        max_steps: int | None = None,
        action_scale: ActionScale = None,
        data_scale: float = 1.0,
        dtype: torch.dtype | str = "float32",
        noise: Callable[[Tensor], Tensor] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, device=device, noise=noise)
        if require_int("group_size", group_size) not in (1, 2) and pairs:
            raise InputError(f"group_size is {group_size}: groups are pairs, and for pairs leave it out")
        self.pairs, self.group_size = pairs, 2 if pairs else group_size
        if self.group_size > 1 and (len(batch_size) != 1 or batch_size[0] % self.group_size):
            raise InputError(
                f"batch_size is {list(batch_size)}: groups of {self.group_size} rows need one dim, a multiple of it"
            )
        self.decision_process = DecisionProcess(
            process,
            reward,
            event_shape=event_shape,
            num_steps=num_steps,
            sampler=sampler,
            action=action,
            reward_placement=reward_placement,
            conditions=conditions,
            max_steps=max_steps,
            action_scale=action_scale,
            data_scale=data_scale,
            dtype=as_dtype(dtype),
        )
        self._make_specs()
        self._make_generators(seed)

    @property
    def num_transitions(self) -> int:
        """K, the steps of a whole chain: `rollout(env.num_transitions, policy)`."""
        return self.decision_process.num_steps

    @property
    def reward(self) -> Reward:
        """R, with its count of queries."""
        return self.decision_process.reward

    def _make_specs(self) -> None:
        b, d = self.batch_size, self.decision_process

        def real(*shape: int) -> Unbounded:
            return Unbounded((*b, *shape), dtype=d.dtype, device=self.device)

        def whole(high: int) -> Bounded:
            return Bounded(0, high, shape=(*b, 1), dtype=torch.int64, device=self.device)

        def composite(entries: dict[str, TensorSpec]) -> Composite:
            return Composite(entries, shape=b, device=self.device)

        def state() -> Composite:
            spec = composite(
                {
                    keys.X_T: real(*d.event_shape),
                    keys.T: real(1),
                    keys.INDEX: whole(d.num_steps),
                    keys.GROUP: whole(max(b.numel() // self.group_size - 1, 0)),
                }
            )
            if d.num_classes:
                spec[keys.COND] = Categorical(d.num_classes, shape=b, dtype=torch.int64, device=self.device)
            elif d.conditions is not None:
                shape, dtype = (*b, *d.conditions.shape[1:]), d.conditions.dtype
                spec[keys.COND] = Unbounded(shape, dtype=dtype, device=self.device)
            return spec

        self.observation_spec, self.state_spec = state(), state()
        chosen: dict[str, TensorSpec] = {keys.ACTION: real(*d.event_shape)}
        if d.units is not None:
            shape = (*b, *d.event_shape)
            chosen[keys.ACTION] = Bounded(-1, 1, shape=shape, dtype=d.dtype, device=self.device)
        if d.reward_placement == "dense" and d.action == "next_latent":
            chosen[keys.X0_HAT] = real(*d.event_shape)
        self.action_spec = composite(chosen)
        self.reward_spec = real(1)
        self.done_spec = self._flags_spec()

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        set_state: bool = False,
        **_: Any,  # TorchRL passes on further keywords of reset
    ) -> TensorDict:
        b, d, G = self.batch_size, self.decision_process, self.group_size
        td = TensorDict({}, b) if tensordict is None else tensordict
        given = td if set_state else TensorDict({}, b)
        resets = td.get("_reset", None)
        if resets is not None and G > 1 and bool((resets.view(-1, G) != resets.view(-1, G)[:, :1]).any()):
            raise InputError(f"groups of {G} rows start together: reset all rows of a group, or none")
        group = given.get(keys.GROUP, None)
        if group is None:
            group = torch.arange(b.numel(), device=self.device).div(G, rounding_mode="floor").view(*b, 1)
        cond = given.get(keys.COND, None)
        if cond is None and d.conditions is not None:
            cond = d.draw_conditions(b.numel() // G, self._cpu_generator)
            assert cond is not None
            cond = cond.to(self.device).repeat_interleave(G, 0).view(*b, *cond.shape[1:])
        elif cond is not None:
            cond = d.given_condition(cond, b)
        x = given.get(keys.X_T, None)
        if x is None:
            if keys.INDEX in given:
                raise InputError(
                    "set_state=True: the TensorDict has an 'index', but no 'x_t' for that position"
                )
            return self._observe(d.start(self._first_noise()), cond, group)
        return self._observe(self._given(x, given.get(keys.INDEX, None)), cond, group)

    def _first_noise(self) -> Tensor:
        b, d = self.batch_size, self.decision_process
        rows = (b[0] // 2,) if self.pairs else tuple(b)
        eps = self._draw_noise(torch.empty(*rows, *d.event_shape, dtype=d.dtype, device=self.device))
        return eps.repeat_interleave(2, 0) if self.pairs else eps

    def _given(self, x: Tensor, index: Tensor | None) -> Latents:
        """The latents that the caller sets, after checks."""
        d = self.decision_process
        require_states(keys.X_T, x, self.batch_size, d.event_shape)
        if index is None:
            return d.latents(
                torch.zeros(self.batch_size, dtype=torch.int64, device=self.device), x.to(d.dtype)
            )
        return d.latents(self._given_index(index, d.last), x.to(d.dtype))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        d = self.decision_process
        action, x0_hat = tensordict.get(keys.ACTION), tensordict.get(keys.X0_HAT, None)
        require_states(keys.ACTION, action, self.batch_size, d.event_shape)
        if x0_hat is not None:
            require_states(keys.X0_HAT, x0_hat, self.batch_size, d.event_shape)
        cond, group = tensordict.get(keys.COND, None), tensordict.get(keys.GROUP)
        left = d.latents(tensordict.get(keys.INDEX).squeeze(-1), tensordict.get(keys.X_T))
        latents, reward, terminated, truncated = d.step(
            left,
            action,
            cond=cond,
            x0_hat=x0_hat,
            noise=self._draw_noise,
        )
        reached = self._observe(latents, cond, group)
        return self._paid(reached, reward.unsqueeze(-1), terminated, truncated)

    def _observe(self, latents: Latents, cond: Tensor | None, group: Tensor) -> TensorDict:
        seen = {
            keys.X_T: latents.x,
            keys.T: latents.t.unsqueeze(-1),
            keys.INDEX: latents.index.unsqueeze(-1),
            keys.GROUP: group,
        }
        if cond is not None:
            seen[keys.COND] = cond
        return TensorDict(seen, self.batch_size, device=self.device)
