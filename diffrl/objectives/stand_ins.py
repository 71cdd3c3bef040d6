"""What stands in for the datum x0 along a chain: an estimate of E[x0 | x_t], or another draw of it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from diffrl import keys
from diffrl.data.dataset import Data
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.starts import UniformStarts
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError
from diffrl.objectives.chain_value import state_value
from diffrl.objectives.one_step import one_step_chains
from diffrl.objectives.posteriors import ReferenceBatch, X0Law, exact_x0_law
from diffrl.ranges import require_int
from diffrl.shapes import expand_like

__all__ = [
    "OverChains",
    "StandIn",
    "StandInChains",
    "data_generator",
    "reference_of_batch",
    "single_transitions",
    "with_x0_mean",
]

MAX_ROWS = 10**6


@dataclass(frozen=True)
class StandIn:
    """What stands in for x0 in the targets of a chain.

    | x0 | rewards | next state x' |
    |---|---|---|
    | "datum" | x0 | of the chain |
    | "reference" | S(x_t), the Stable Target Field of a reference batch | of the chain |
    | "exact" | E[x0 | x_t] itself: the floor, what regression on the exact denoiser reaches | of the chain |
    | "redrawn" | x_j, drawn by the softmax of S | drawn given x_j and x_t |
    | "plug_in" | S(x_t) | drawn as if S were x0 |

    With Monte Carlo, "reference" is STF; with TD(0) its target is (1 - A'/A) S(x_t) + (A'/A) D⁻(x'): *averaged
    rewards*. The last two are *marginal transitions*: each state is the start of a step of its own, so TD(0) is all
    that they can be used for, and D⁻(x') takes a further evaluation. Given x_t, x_j is distributed as x0, so that
    "redrawn" has the law of plain single transitions, and each target has the variance of TD(0): states of one batch
    share data, that is all. "plug_in" is a step along the batch's ODE under shared noise; with fresh noise x' lacks the
    spread of x0, by A² Var(x0 | x_t), and the target is biased.

    Args:
        x0: "datum", "reference", "exact", "redrawn" or "plug_in". "exact" needs data whose law is a mixture, or
            finitely many rows, whose exact denoiser memorises them.
        reference: rows of the reference batch in all, those of the batch among them, at most a million; 0: the batch
            alone.

    Raises:
        ValueError: an argument outside its range, or `reference` where no batch is referred to.
    """

    x0: Literal["datum", "reference", "exact", "redrawn", "plug_in"] = "datum"
    reference: int = 0

    def __post_init__(self) -> None:
        known = ("datum", "reference", "exact", "redrawn", "plug_in")
        if self.x0 not in known:
            raise InputError(f"x0 is {self.x0!r}: give one of {', '.join(known)}")
        require_int("reference", self.reference, 0, MAX_ROWS)
        if self.reference and self.x0 in ("datum", "exact"):
            raise InputError(
                f"reference is {self.reference}, but x0={self.x0} uses no reference batch: set x0=reference, or "
                "reference=0"
            )

    @property
    def single(self) -> bool:
        """Whether each state becomes a step of its own."""
        return self.x0 in ("redrawn", "plug_in")

    def label(self, target: str) -> str:
        """Name for people of a target with this stand-in, such as "TD(0) + STF 256"."""
        rows = str(self.reference) if self.reference else "own batch"
        plain = target == "Monte Carlo"
        return {
            "datum": target,
            "reference": f"STF {rows}" if plain else f"{target} + STF {rows}",
            "exact": "Exact denoiser (floor)" if plain else f"{target} + exact mean",
            "redrawn": f"{target}, x0 redrawn from {rows}",
            "plug_in": f"{target}, plug-in step of STF {rows}",
        }[self.x0]


class OverChains:
    """A `Draw` that makes its states of the chains that a sampler draws: levels and starts are the sampler's.

    Args:
        sampler: draws the chains.
    """

    def __init__(self, sampler: ChainSampler) -> None:
        self.sampler = sampler

    @property
    def chain(self) -> Chain:
        """The levels."""
        return self.sampler.chain

    def _refuse_learning_starts(self, what: str) -> None:
        """Where chains are taken apart, starts that learn would not know where a state was drawn.

        Raises:
            ValueError: there are such starts, and windows are longer than a step.
        """
        if self.sampler.window != 1 and not isinstance(self.sampler.starts, UniformStarts):
            raise InputError(f"{what} takes chains apart: starts that learn need chain.window=1")

    def update(self, states: TensorDict) -> None:
        """As the sampler's."""
        self.sampler.update(states)

    def state_dict(self) -> dict[str, Any]:
        """As the sampler's."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As the sampler's."""
        self.sampler.load_state_dict(state)


class StandInChains(OverChains):
    """Draws chains, then what stands in for their x0.

    The chains are those that `sampler` would draw alone from the same generator, to the last bit.

    Args:
        sampler: draws the chains.
        stand_in: what stands in for x0.
        data: where the further rows of a reference batch come from, and what "exact" is about.
        num_classes: of the labels, if there are any: the null label.
        device: where states are drawn.

    Raises:
        ValueError: data are needed and missing, or have no exact denoiser; starts that learn, where each state is a
            step of its own, unless windows are single steps.
    """

    def __init__(
        self,
        sampler: ChainSampler,
        stand_in: StandIn,
        data: Data | None = None,
        *,
        num_classes: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(sampler)
        self.stand_in, self.num_classes, self._device = stand_in, num_classes, device
        if data is None and (stand_in.x0 == "exact" or stand_in.reference):
            asked = f"x0={stand_in.x0}" if stand_in.x0 == "exact" else f"reference={stand_in.reference}"
            raise InputError(f"{asked} needs the data: give them too, as data=...")
        if stand_in.single:
            self._refuse_learning_starts(f"x0={stand_in.x0}")
        self.refer_to(data)

    def refer_to(self, data: Data | None) -> None:
        """Take further rows, and what is exact, from these data: those that training draws from, and no others."""
        self.data = data
        self.exact: X0Law | None = None
        """The law that "exact" asks."""
        if self.stand_in.x0 == "exact" and data is not None:
            self.exact = exact_x0_law(self.chain.process, data, self._device)

    def __call__(self, x0: Tensor, *, cond: Tensor | None, generator: Generator) -> TensorDict:
        """A batch of chains [B, K]; of single steps [B K, 1] where the stand-in takes chains apart."""
        chain = self.sampler(x0, cond=cond, generator=generator)
        return self.stood_in(chain, self._law(x0, cond, generator), generator=generator)

    def stood_in(self, chain: TensorDict, law: X0Law, *, generator: Generator) -> TensorDict:
        """What the stand-in makes of chains [B, K], by a law of x0 given the states that steps leave."""
        how = self.stand_in.x0
        if how == "datum":
            return chain
        x_t, t = chain[keys.X_T].flatten(0, 1), chain[keys.T].flatten()
        cond = chain.get(keys.COND, None)
        cond = None if cond is None else cond.flatten(0, 1)
        if how == "redrawn":
            datum = law.draw(x_t, t, cond, generator=generator)
        else:
            datum = law.mean(x_t, t, cond)
        if self.stand_in.single:
            return single_transitions(chain, datum, self.chain.process, self.chain.eta, generator)
        return with_x0_mean(chain, datum.view_as(chain[keys.X_T]))

    def _law(self, x0: Tensor, cond: Tensor | None, generator: Generator) -> X0Law:
        if self.exact is not None:
            return self.exact
        process, n = self.chain.process, self.stand_in.reference
        return reference_of_batch(
            process, x0, cond, n, data=self.data, num_classes=self.num_classes, generator=generator
        )


def reference_of_batch(
    process: Schedule,
    x0: Tensor,
    cond: Tensor | None,
    reference: int,
    *,
    data: Data | None,
    num_classes: int,
    generator: Generator,
) -> ReferenceBatch:
    """The law of x0 given x_t by the rows of a batch and further ones, which come from the data.

    Args:
        process: noise schedule.
        x0: the batch, shape [B, *E].
        cond: its labels, [B], or None.
        reference: rows in all, at least B; 0: the batch alone.
        data: where the further rows come from.
        num_classes: of the labels: the null label.
        generator: source of the further rows.

    Raises:
        ValueError: fewer rows than the batch has, or more than there are training rows.
    """
    rows, labels, n = x0, cond, reference
    if 0 < n < len(x0):
        raise InputError(
            f"reference is {n}, but a batch has {len(x0)} rows, which are all among them: give more, or 0 for "
            "the batch alone"
        )
    if n > len(x0) and data is not None:
        if data.num_train is not None and n - len(x0) > data.num_train:
            raise InputError(
                f"reference is {n}, but {data.name} has {data.num_train} training rows: set "
                "x0=exact, which takes them all"
            )
        more, known = data.batch(n - len(x0), data_generator(generator))
        rows = torch.cat([x0, more.to(x0)])
        if cond is not None and known is not None:
            labels = torch.cat([cond, known.to(cond)])
    return ReferenceBatch(process, rows, labels, num_classes)


def with_x0_mean(chain: TensorDict, x0_mean: Tensor) -> TensorDict:
    """Let an estimate S of E[x0 | x_t] stand in for x0 in the rewards of chains; `ValueLoss` does the rest.

        r_i = A_i S_i + κ_i x_i - (A_{i+1} S_i + κ_{i+1} x_{i+1})

    The target of TD(0) for D(x_i) is then (1 - A_{i+1}/A_i) S_i + (A_{i+1}/A_i) D⁻(x_{i+1}).

    Args:
        chain: what `diffrl.sample_chain` gives, batch size [B, K].
        x0_mean: S at every state left, of x0's shape [B, K, *E].

    Returns:
        The same TensorDict, with ``x0_mean`` and the new ``("next", "reward")``.

    Raises:
        ValueError: S has another shape than x0.
    """
    x0, reached = chain[keys.X0], chain[keys.NEXT]
    if x0_mean.shape != x0.shape:
        raise InputError(f"x0_mean has shape {tuple(x0_mean.shape)}, expected that of x0, {tuple(x0.shape)}")
    change = expand_like(chain[keys.A] - reached[keys.A], x0)
    reached[keys.REWARD] = reached[keys.REWARD] + change * (x0_mean - x0)
    chain[keys.X0_MEAN] = x0_mean
    return chain


def single_transitions(
    chain: TensorDict, x0: Tensor, process: Schedule, eta: float, generator: Generator | None = None
) -> TensorDict:
    """Take chains apart: from every state a step of its own, as if x0 were another datum.

        x' = A x0 + κ x_t + std z    of the step t → t' and the coupling η

    Args:
        chain: what `diffrl.sample_chain` gives, batch size [B, K].
        x0: what each state's step leads to, shape [B K, *E], in the order of ``chain.flatten()``.
        process: noise schedule.
        eta: η ∈ [0, 1].
        generator: source of z.

    Returns:
        TensorDict of batch size [B K, 1]: chains of one step, cut there unless it reaches the datum.
    """
    states = chain.flatten(0, 1).unsqueeze(1)
    reached = states[keys.NEXT].select(keys.T, keys.A, keys.KAPPA, keys.INDEX)
    x_t, datum, terminated = states[keys.X_T], x0.unsqueeze(1), states[keys.NEXT, keys.TERMINATED]
    A, kappa, std = posterior(process, states[keys.T], reached[keys.T], eta)
    z = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=x_t.device)
    A, kappa, std = (expand_like(c.to(x_t), x_t) for c in (A, kappa, std))
    reached[keys.X_T] = A * datum + kappa * x_t + std * z
    reward = state_value(states, datum) - state_value(reached, datum)
    left = {name: states[name] for name in (keys.X_T, keys.T, keys.A, keys.KAPPA, keys.INDEX)}
    if keys.IMPORTANCE in states.keys():
        left[keys.IMPORTANCE] = states[keys.IMPORTANCE]
    cond = states.get(keys.COND, None)
    out = one_step_chains(
        datum,
        left,
        dict(reached.items()),
        reward=reward,
        terminated=False,
        cond=None if cond is None else cond[:, 0],
    )
    out[keys.NEXT, keys.TERMINATED], out[keys.NEXT, keys.TRUNCATED] = terminated, ~terminated
    return out


def data_generator(generator: Generator) -> Generator:
    """A generator of the CPU, from which data are drawn: itself, or one seeded by that of another device."""
    if generator.device.type == "cpu":
        return generator
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return Generator().manual_seed(int(seed))
