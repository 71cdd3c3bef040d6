"""Chains as TensorDicts: drawn whole, with the keys of `diffrl.keys`, in the order from noise to data."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.starts import Starts, UniformStarts
from diffrl.errors import InputError, InputKeyError
from diffrl.ranges import require_int
from diffrl.shapes import require_data, require_finite

__all__ = ["ChainSampler", "add_coefficients", "by_time", "draw_chain", "draw_states", "sample_chain"]


def sample_chain(
    process: Schedule,
    x0: Tensor,
    *,
    coupling: float | str = "markov",
    window: int | None = None,
    cond: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    **chain: Any,  # noqa: ANN401
) -> TensorDict:
    """Draw whole chains of the reward process, or windows of them, from clean data.

    Stepping `diffrl.envs.DiffusionMRP` draws from the same law, and gives the same numbers for the same noise.

    >>> import diffrl, torch
    >>> chain = diffrl.sample_chain(diffrl.EDM(), torch.randn(4, 2), num_steps=18)
    >>> chain.batch_size, chain["next", "reward"].shape
    (torch.Size([4, 18]), torch.Size([4, 18, 2]))

    Args:
        process: noise schedule.
        x0: clean data, floating dtype, shape [B, *E].
        coupling: η ∈ [0, 1], or "markov" (1), "shared" (0).
        chain: num_steps, and optionally span, stride, value, offset, t_max, of `diffrl.diffusion.chains.Chain`.
        window: keep this many transitions of each chain, ≥ 1; where they begin is drawn uniformly for each
            chain. 1 gives single transitions that are independent of each other. None keeps whole chains.
        cond: condition of each datum, shape [B, ...].
        noise: standard normal numbers to use, shape [B, K, *E] (a window: [B, window+1, *E]): entry 0 makes
            the first state, entry k is the fresh noise of the step into state k.
        generator: source of randomness.

    Returns:
        TensorDict of batch size [B, K] (or [B, window]); keys and shapes are those of `diffrl.keys`.

    Raises:
        TypeError: x0 is no tensor, or holds integers.
        ValueError: x0 has no batch dim, is empty, or holds NaN or infinity; an argument is outside its range.
    """
    require_data(x0, cond)
    require_finite("x0", x0)
    return draw_chain(
        Chain(process, coupling=coupling, **chain),
        x0,
        window=window,
        cond=cond,
        noise=noise,
        generator=generator,
    )


def draw_chain(
    chain: Chain,
    x0: Tensor,
    *,
    window: int | None = None,
    start: Tensor | None = None,
    cond: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TensorDict:
    """As `sample_chain`, for a `Chain` that exists already, so that its coefficients are computed once.

    Args:
        chain: the levels and the coupling.
        x0: clean data, floating dtype, shape [B, *E].
        window: number of transitions to keep of each chain; None keeps whole chains.
        start: where each window begins, integers in [0, K - window], shape [B]; None draws them uniformly.
        cond: condition of each datum, shape [B, ...].
        noise: standard normal numbers to use, as in `sample_chain`.
        generator: source of randomness.

    Returns:
        TensorDict of batch size [B, K] or [B, window].

    Raises:
        TypeError: x0 holds integers.
        ValueError: x0 has no batch dim, or an argument does not fit it.
    """
    require_data(x0, cond)
    if window is not None:
        require_int("window", window)
    B, K, E = x0.shape[0], chain.num_transitions, x0.shape[1:]
    whole = window is None or window >= K
    W = K if whole or window is None else window
    position, table = torch.arange(W + 1, device=x0.device), chain.table.to(x0)
    if whole:
        num_noise, index = K, position  # the clean state has no noise
    else:
        num_noise = W + 1
        if start is None:
            start = torch.randint(K - W + 1, (B,), generator=generator, device=x0.device)
        index = start.unsqueeze(1) + position
        table = table[:, index]
    table, index = table.view(len(table), -1, W + 1, 1), index.view(-1, W + 1, 1)
    if noise is None:
        noise = torch.randn(B, num_noise, *E, generator=generator, device=x0.device, dtype=x0.dtype)
    elif noise.shape != (B, num_noise, *E):
        raise InputError(f"noise has shape {tuple(noise.shape)}, the chain needs {(B, num_noise, *E)}")
    columns = by_time(table, x0)
    x = draw_states(columns, x0, noise)
    reward = _rewards(columns, x0, x)
    return _transitions(chain, table, index, x.transpose(0, 1), reward.transpose(0, 1), x0, cond)


def by_time(table: Tensor, x0: Tensor) -> Tensor:
    """The columns of `Chain.table` at states of rows, [9, B or 1, W+1, 1], ready for `draw_states` of x0 [B, *E]."""
    return table.transpose(1, 2).reshape(len(table), table.shape[2], -1, *[1] * (x0.ndim - 1))


def draw_states(table: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """The states of a window.

    Args:
        table: the columns of `Chain.table` at its states, `by_time`: [9, W+1, B or 1, *1].
        x0: clean data, shape [B, *E].
        noise: shape [B, W, *E] for a whole chain, whose last state is x0, else [B, W+1, *E].

    Returns:
        [W+1, B, *E]: in memory, the states of one time lie side by side, so that a step runs over the whole batch in
        one piece.
    """
    num_noise, (alpha, sigma, kept, fresh, P, g) = noise.shape[1], table[3:].unbind()
    x, z = x0.new_empty(table.shape[1], *x0.shape), noise.transpose(0, 1)
    n = x[:num_noise]
    if num_noise < len(x) and _is_small(noise) and float(P[num_noise - 1]) > 1e-30:
        n.copy_(z * g[:num_noise]).cumsum_(0).mul_(P[:num_noise])
    else:
        torch.mul(z, fresh[:num_noise], out=n)
        n[0] = z[0]  # wherever a window starts, its first state is a marginal draw
        states, mixing = n.unbind(), kept.unbind()
        for k in range(1, num_noise):  # n_s = c n_t + √(1-c²) z
            states[k].addcmul_(mixing[k], states[k - 1])
    n.mul_(sigma[:num_noise]).addcmul_(alpha[:num_noise], x0)
    if num_noise < len(x):
        x[-1] = x0
    return x


def _is_small(noise: Tensor) -> bool:
    """Whether the steps of a whole chain cost more one by one, each over the batch, than its running sums."""
    return noise.device.type == "cpu" and noise.numel() <= 2**14 and noise.dtype.itemsize >= 4


def _rewards(table: Tensor, x0: Tensor, x: Tensor) -> Tensor:
    """What is paid between the states x [W+1, B, *E] of `draw_states`: [W, B, *E]."""
    _, A, kappa, *_ = table.unbind()
    mu = (A * x0).addcmul(kappa, x)  # μ_i = A_i x0 + κ_i x_i; 0 at the clean state
    return mu[:-1] - mu[1:]


def _transitions(
    chain: Chain, table: Tensor, index: Tensor, x: Tensor, reward: Tensor, x0: Tensor, cond: Tensor | None
) -> TensorDict:
    """The transitions between states x [B, W+1, *E] at positions `index` [B or 1, W+1, 1]: batch size [B, W]."""
    B, W, *E = reward.shape
    columns = table[:3].expand(3, B, W + 1, 1)
    terminated = index[:, 1:] == chain.num_transitions
    done = (torch.arange(1, W + 1, device=x.device) == W).unsqueeze(-1)  # the clean state is the last one too
    truncated = done & ~terminated
    index = index.expand(B, W + 1, 1)
    state = (keys.T, keys.A, keys.KAPPA)
    left = {
        keys.X_T: x[:, :-1],
        keys.X0: x0.unsqueeze(1).expand(B, W, *E),
        keys.INDEX: index[:, :-1],
        **dict(zip(state, columns[:, :, :-1].unbind(), strict=True)),
    }
    if cond is not None:
        left[keys.COND] = cond.unsqueeze(1).expand(B, W, *cond.shape[1:])
    reached = {
        keys.X_T: x[:, 1:],
        keys.INDEX: index[:, 1:],
        **dict(zip(state, columns[:, :, 1:].unbind(), strict=True)),
        keys.REWARD: reward,
        keys.TERMINATED: terminated.expand(B, W, 1),
        keys.TRUNCATED: truncated.expand(B, W, 1),
        keys.DONE: done.expand(B, W, 1),
    }
    return TensorDict({**left, keys.NEXT: TensorDict(reached, [B, W])}, [B, W])


def add_coefficients(states: TensorDict, chain: Chain) -> TensorDict:
    """Write A and κ, by which a loss knows the value A E[x0 | x_t] + κ x_t, into steps that were recorded without them.

    They follow from the times and the chain; what coupling, stride and kind of value it had cannot be seen in the data.

    >>> import gymnasium
    >>> import diffrl, torch
    >>> from tensordict import TensorDict
    >>> env = gymnasium.make("DiffusionMRP-v0", data="rings", num_steps=6)
    >>> seen, _ = env.reset(seed=0)
    >>> ended, steps = False, []
    >>> while not ended:
    ...     reached, reward, terminated, truncated, _ = env.step(0)
    ...     ended = terminated or truncated
    ...     flags = {"terminated": [terminated], "truncated": [truncated], "done": [ended]}
    ...     steps.append(TensorDict({**seen, "next": {**reached, "reward": reward, **flags}}))
    ...     seen = reached
    >>> rollout = add_coefficients(torch.stack(steps), env.unwrapped.reward_process.chain)
    >>> loss = diffrl.objectives.ValueLoss(diffrl.Denoiser(diffrl.networks.MLP((2,)), diffrl.EDM()))
    >>> rollout.batch_size, loss(rollout)["loss_value"].shape
    (torch.Size([6]), torch.Size([]))

    Args:
        states: steps with the times ``t`` and ``("next", "t")``, each [*b, 1].
        chain: the chain that they are steps of; an environment has it as ``reward_process.chain``.

    Returns:
        The same TensorDict, with the entries ``A`` and ``kappa`` of both states, each [*b, 1].

    Raises:
        KeyError: a time is missing.
        ValueError: a time is none of the chain's.
    """
    for part in (states, states[keys.NEXT]):
        t = part.get(keys.T, None)
        if t is None:
            raise InputKeyError("t missing in the steps: A and kappa follow from the times of both states")
        up = chain.t.flip(0).to(t.device)
        place = torch.searchsorted((up[1:] + up[:-1]) / 2, t.double())  # the nearest
        off = (t - up[place]).abs() > 1e-5 * (up[place].abs() + 1e-3)
        if bool(off.any()):
            raise InputError(
                f"t holds {float(t[off][0]):g}, which is no time of {chain}: give the chain of these steps"
            )
        for name, c in zip((keys.A, keys.KAPPA), chain.value_coefficients, strict=True):
            part[name] = c.flip(0).to(t)[place]
    return states


@dataclass(frozen=True)
class ChainSampler:
    """Draws the chains that training learns from.

    Args:
        chain: the levels.
        window: transitions kept of each chain; None keeps whole chains.
        jitter: shift the grid of each batch by a uniform draw from (-½, ½), so that all noise levels are
            trained. A positive shift makes the last level clean, so that a chain that visits it is one step
            shorter. None: shift if the process has continuous times.
        starts: where windows begin, see `diffrl.diffusion.starts`.

    Raises:
        ValueError: window is no whole number ≥ 1; starts other than uniform ones are given, but chains are whole; or a
            shift may leave no level.
    """

    chain: Chain
    window: int | None = None
    jitter: bool | None = None
    starts: Starts = field(default_factory=UniformStarts)

    def __post_init__(self) -> None:
        if self.window is not None:
            require_int("window", self.window)
        if self.whole and not isinstance(self.starts, UniformStarts):
            raise InputError(
                "starts say where windows of a chain begin, but chains are whole: set chain.window, e.g. to 1"
            )
        if self._shifts and self.chain.process.continuous:
            try:
                for offset in (-0.5, 0.5):
                    replace(self.chain, offset=offset)
            except InputError as error:
                raise InputError(
                    f"num_steps is {self.chain.num_steps}: where the grid is shifted from batch to batch, no noise "
                    "level may be left of so few; give more (2 at least), or jitter=False"
                ) from error

    @property
    def whole(self) -> bool:
        """Whether chains are whole, whatever the shift of their grid."""
        return self.window is None or self.window >= self.chain.num_transitions

    @property
    def _shifts(self) -> bool:
        return self.chain.process.continuous if self.jitter is None else self.jitter

    def next_chain(self, generator: torch.Generator) -> Chain:
        """The levels of the next batch: the first thing that is drawn for it."""
        if not self._shifts:
            return self.chain
        offset = float(torch.rand((), generator=generator, device=generator.device)) - 0.5
        return replace(self.chain, offset=offset)

    def __call__(self, x0: Tensor, *, cond: Tensor | None, generator: torch.Generator) -> TensorDict:
        """A batch of chains, see `sample_chain`."""
        chain = self.next_chain(generator)
        W, K = self.window, chain.num_transitions
        if W is None or W >= K:
            return draw_chain(chain, x0, window=W, cond=cond, generator=generator)
        start, importance = self.starts.draw(len(x0), K - W + 1, generator)
        drawn = draw_chain(chain, x0, window=W, start=start, cond=cond, generator=generator)
        if importance is not None:
            drawn[keys.IMPORTANCE] = importance.to(x0.dtype).view(-1, 1, 1).expand(-1, W, 1)
        return drawn

    def update(self, states: TensorDict) -> None:
        """Let the starts learn from the losses that training wrote into chains drawn here, under `diffrl.keys.LOSS`."""
        if isinstance(self.starts, UniformStarts):
            return
        self.starts.update(states[keys.INDEX][:, 0, 0], states[keys.LOSS].mean((1, 2)))

    def state_dict(self) -> dict[str, Any]:
        """The state of the starts, for a checkpoint."""
        return self.starts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.starts.load_state_dict(state)
