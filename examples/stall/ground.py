"""One training run of the study: a mixture, a small network, a target, an optimiser; and its error at every level."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.objectives import HardUpdate

import diffrl
from diffrl import keys
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.predictions import PredictionType, scalings
from diffrl.objectives.soft_update import SoftUpdate
from diffrl.objectives.value import ValueLoss
from diffrl.training.loop import step_generator
from diffrl.training.optim import Optim
from stall.optimisers import Correction, Optimiser

HEADLINE = (0.1, 0.3, 1.0)  # noise-to-signal ratios whose nearest levels make the one figure of a run
POINTS = 400
PROCESSES: dict[str, tuple[Any, PredictionType, int]] = {
    "edm": (diffrl.EDM(), "edm", 18),
    "flow": (diffrl.Flow(), "velocity", 18),
    "ddpm": (diffrl.DDPM(train_steps=100, beta_start=1e-3, beta_end=0.2), "eps", 100),
}
"""Process, prediction type and number of levels: EDM as in the study, flow and DDPM as in configs/plan/default.yaml."""


@dataclass(frozen=True)
class Run:
    """All that a run depends on. The defaults are the ground on which TD(0) from own predictions stalls."""

    target: Literal["monte_carlo", "own", "slow"] = "own"
    """x0; the network's own prediction at the next state; that of a target network."""
    beta1: float = 0.9
    lr: float = 2e-3
    seed: int = 21
    """Of the mixture, the network, data and noise."""
    optimiser: Literal["adam", "sgd"] = "adam"
    correction: Correction = "none"
    batch: int = 32
    steps: int = 2000
    decay: float = 0.0
    """Of a target network; 0 copies it every `every` steps."""
    every: int = 1
    lmbda: float = 0.0
    levels: Literal["shared", "apart"] = "shared"
    """One network for all noise levels, or one for each."""
    exact: bool = False
    """Whether x0 in the target is replaced by its conditional mean: the drift alone, hardly any noise."""
    step_of: Literal["", "monte_carlo", "own"] = ""
    """Take Adam's second moment from a run with this target, which goes along."""
    moment_of: Literal["", "monte_carlo", "own"] = ""
    """Take Adam's second moment from the gradients that this target would have at the same weights."""
    process: str = "edm"
    value: Literal["posterior_mean", "clean"] = "posterior_mean"
    first: float = 1.0
    """Factor on the loss of the noisiest level."""
    then: float = 0.9
    """β1 from step `at` on, if that is not 0."""
    at: int = 0
    after: Literal["", "monte_carlo"] = ""
    """The target from that step on."""
    warmup: int = 100
    forget: bool = False
    """Whether the optimiser's averages are cleared at step `at`."""
    recentre: bool = False
    """Whether the bias of each hidden unit is moved at step `at`, so that its input has mean 0 over all states."""
    norm: bool = False
    """Whether hidden layers are normalised (layer normalisation without weights) before they bend."""
    dim: int = 32
    width: int = 128


class Apart(nn.Module):
    """F with weights of its own at each of K levels, of which inputs hold as many states each."""

    codes: Tensor

    def __init__(self, event_shape: tuple[int, ...], codes: Tensor, hidden: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        nets = [MLP(event_shape, hidden=hidden) for _ in codes]
        self.features = nets[0].requires_grad_(False)  # only its random features are used
        linear = [[net.first, *(m for m in net.middle if isinstance(m, nn.Linear)), net.last] for net in nets]
        layers = list(zip(*linear, strict=True))
        self.weights = nn.ParameterList(
            torch.stack([one.weight.detach().T for one in layer]) for layer in layers
        )
        self.biases = nn.ParameterList(
            torch.stack([one.bias.detach()[None] for one in layer]) for layer in layers
        )

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """The network of the level nearest to each c_noise."""
        order = (c_noise[:, None] - self.codes).abs().argmin(1).argsort(stable=True)
        x_features, noise_features = self.features.x_embedding, self.features.noise_embedding
        assert x_features is not None
        h = torch.cat([x, x_features(x), noise_features(c_noise[:, None])], 1)[order]
        h = h.view(len(self.codes), -1, h.shape[1])
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, nn.functional.silu(h) if k else h, weight)
        return h.flatten(0, 1)[order.argsort()]


class Ground:
    """The mixture, its exact denoiser, chains, and errors on points that no run is trained on."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.process, self.prediction, self.num_steps = PROCESSES[run.process]
        self.data = diffrl.data.gmm(dim=run.dim, mixture_seed=run.seed, test_size=POINTS)
        assert self.data.mixture is not None
        self.exact = diffrl.MixtureDenoiser(self.process, **vars(self.data.mixture))
        self.grid = Chain(self.process, self.num_steps, "markov", value=run.value)
        self.t = self.grid.t[:-1].float()
        self.test = self._test_states()
        self.truth = self.exact(*self.test)
        ratio = (self.process.sigma(self.grid.t) / self.process.alpha(self.grid.t))[:-1]
        self.headline = [int((ratio.log() - math.log(s)).abs().argmin()) for s in HEADLINE]
        c_out = scalings(self.process, self.grid.t[:-1], "edm", 0.5).c_out
        self.unit = c_out.float()[:, None, None]

    def _test_states(self) -> tuple[Tensor, Tensor]:
        """The same noise of each point at every level: states [K M, D] and times [K M]."""
        x0, K = self.data.test, len(self.t)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        alpha, sigma = self.process.alpha(self.t)[:, None, None], self.process.sigma(self.t)[:, None, None]
        return (alpha * x0 + sigma * noise).flatten(0, 1), self.t.repeat_interleave(len(x0)).view(K * len(x0))

    def denoiser(self) -> diffrl.Denoiser:
        """A new one; networks of one seed are alike at the start."""
        torch.manual_seed(self.run.seed)
        if self.run.levels == "apart":
            network: nn.Module = Apart(self.data.event_shape, self.process.c_noise(self.t), self.run.width)
        else:
            network = MLP(self.data.event_shape, hidden=self.run.width)
            if self.run.norm:
                network.middle = normalised(network.middle, self.run.width)
        return diffrl.Denoiser(network, self.process, 0.5, self.prediction)

    def chain(self, step: int, batch: int | None = None) -> TensorDict:
        """The data and noise of one step, which are the same for all methods."""
        generator = step_generator(self.run.seed, step)
        x0, _ = self.data.batch(batch or self.run.batch, generator)
        return diffrl.sample_chain(
            self.process,
            x0,
            coupling="markov",
            num_steps=self.num_steps,
            value=self.run.value,
            generator=generator,
        )

    @torch.no_grad()
    def errors(self, denoiser: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Σ_dims ‖D - D*‖²/c_out² at each level, mean over points: [K], in the units of `metrics.value_error`."""
        D = denoiser(*self.test)
        square = ((D - self.truth).view(len(self.t), POINTS, -1) / self.unit).square()
        return square.sum(-1).mean(-1)

    def figure(self, errors: Tensor) -> float:
        """The mean of the errors nearest to σ = 0.1, 0.3 and 1."""
        return float(errors[self.headline].mean())


def exact_loss(ground: Ground, denoiser: diffrl.Denoiser, chain: TensorDict, bootstrap: bool) -> Tensor:
    """The loss of `ValueLoss` with weight "edm", and E[x0 | state] in place of x0 in what each state's error is.

        δ_i = A_i (D*(x_i) - D(x_i)) - A_{i+1} (D*(x_{i+1}) - D⁻(x_{i+1}))

    Its mean given x_i is that of the TD error; its noise falls with the error of D⁻.
    """
    B, K = chain.batch_size
    flat = chain[keys.X_T].flatten(0, 1), chain[keys.T].flatten()
    A, c_out = chain[keys.A], denoiser.scalings(chain[keys.T]).c_out
    error = A * (ground.exact(*flat) - denoiser(*flat)).view(B, K, -1)
    boot = error.detach().roll(-1, 1)
    boot[:, -1] = 0  # the clean state
    delta = error - boot if bootstrap else error
    return (delta.square().mean(-1, keepdim=True) / ((A * c_out) ** 2).clamp(min=1e-8)).mean()


def normalised(middle: nn.Sequential, width: int) -> nn.Sequential:
    """The same layers with a normalisation before each that bends."""
    layers: list[nn.Module] = []
    for layer in middle:
        norm = [nn.LayerNorm(width, elementwise_affine=False)] if isinstance(layer, nn.SiLU) else []
        layers += [*norm, layer]
    return nn.Sequential(*layers)


@torch.no_grad()
def recentre(denoiser: diffrl.Denoiser, states: tuple[Tensor, Tensor]) -> None:
    """Move the biases of hidden layers, from the first on, so that units' inputs have mean 0 on these states."""
    hidden = [m for m in denoiser.network.modules() if isinstance(m, nn.Linear)][:-1]
    for layer in hidden:
        kept: list[Tensor] = []
        hook = layer.register_forward_hook(lambda module, inputs, out, kept=kept: kept.append(out.mean(0)))
        denoiser(*states)
        hook.remove()
        layer.bias.sub_(kept[0])


class Learner:
    """A denoiser with its loss, optimiser and target network."""

    def __init__(self, ground: Ground, run: Run, target: str) -> None:
        self.ground, self.run, self.target = ground, run, target
        self.denoiser = ground.denoiser()
        self.loss = ValueLoss(
            self.denoiser,
            lmbda=1.0 if target == "monte_carlo" else run.lmbda,
            bootstrap="target" if target == "slow" else "own",
        )
        adam = run.optimiser == "adam"
        self.optimiser = Optimiser(self.denoiser, run.beta1, run.correction, normalise=adam)
        self.schedule = Optim(lr=run.lr, warmup_steps=run.warmup, decay="cosine", clip_norm=None)
        self.other: ValueLoss | None = None
        self.moment = torch.zeros_like(self.optimiser.theta)
        self.follow: Callable[[], None] = lambda: None
        if target == "slow":
            soft = run.decay > 0
            moved = (
                SoftUpdate(self.loss, eps=run.decay)
                if soft
                else HardUpdate(self.loss, value_network_update_interval=run.every)
            )
            self.follow = moved.step

    def loss_of(self, chain: TensorDict) -> Tensor:
        """The loss of a minibatch at the weights of the moment."""
        if self.run.exact:
            return exact_loss(self.ground, self.denoiser, chain, self.target != "monte_carlo")
        if self.run.first != 1:  # importance is the library's entry for weights of states
            importance = torch.ones_like(chain[keys.T])
            importance[:, 0] = self.run.first
            chain[keys.IMPORTANCE] = importance
        return self.loss(chain)["loss_value"]

    def step(self, k: int, chain: TensorDict, moment: Tensor | None = None) -> float:
        """One step; the second moment may be another's. Returns the loss."""
        rate = self.run.lr * self.schedule.factor(k, self.run.steps)
        if self.run.at and k == self.run.at:
            self.optimiser.beta1 = self.run.then
            if self.run.forget:
                self.optimiser.forget()
            if self.run.recentre:
                recentre(self.denoiser, self.ground.test)
            if self.run.after:
                self.loss = ValueLoss(self.denoiser, lmbda=1.0)
        if self.run.moment_of:
            lmbda = 1.0 if self.run.moment_of == "monte_carlo" else 0.0
            self.other = self.other or ValueLoss(self.denoiser, lmbda=lmbda)
            g = self.optimiser.gradient(self.other(chain)["loss_value"])
            self.moment = torch.lerp(g.square(), self.moment, self.optimiser.beta2)
            moment = self.moment / (1 - self.optimiser.beta2 ** (k + 1))
        loss = self.optimiser.step(rate, lambda: self.loss_of(chain), lambda: self._probe(chain), moment)
        self.follow()
        return loss

    def _probe(self, chain: TensorDict) -> tuple[Tensor, Tensor]:
        """For the diagonal correction: u·F and (u - P̂ᵀu)·F with random signs u, in the units of the loss."""
        net, x, t = self.denoiser.network, chain[keys.X_T], chain[keys.T]
        _, c_out, c_in = self.denoiser.scalings(t)
        F = net((c_in * x).flatten(0, 1), self.ground.process.c_noise(t).flatten()).view_as(x)
        generator = torch.Generator().manual_seed(int(x[0, 0, 0].abs() * 1e6))
        u = torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1
        back = torch.zeros_like(u)
        if self.target != "monte_carlo":
            g = chain[keys.A] * c_out
            back[:, 1:] = (g[:, 1:] / g[:, :-1]) * u[:, :-1]
        scale = 2 / u.numel()
        return (scale * u * F).sum(), ((u - back) * F).sum()


def train(
    run: Run, watch: Callable[[int, Learner], None] = lambda k, learner: None, until: int | None = None
) -> dict[str, Any]:
    """Train once.

    Args:
        run: what to train.
        watch: is shown the learner before every step.
        until: the step to stop at, of a schedule that goes on; None: the end.

    Returns:
        ``error`` at the end, ``levels`` (all levels at the end), ``curve`` (step, error); NaN where it diverged.
    """
    torch.set_num_threads(1)
    ground = Ground(run)
    learner = Learner(ground, run, run.target)
    donor = Learner(ground, run, run.step_of) if run.step_of else None
    curve = []
    for k, chain in _minibatches(ground, until or run.steps):
        if k % 100 == 0:
            curve.append((k, ground.figure(ground.errors(learner.denoiser))))
        watch(k, learner)
        moment = None
        if donor is not None:
            donor.step(k, chain)
            moment = donor.optimiser.second_moment()
        if not math.isfinite(learner.step(k, chain, moment)):
            break
    errors = ground.errors(learner.denoiser)
    curve.append((run.steps, ground.figure(errors)))
    return {"error": ground.figure(errors), "levels": errors.tolist(), "curve": curve}


def _minibatches(ground: Ground, steps: int) -> Iterator[tuple[int, TensorDict]]:
    for k in range(steps):
        yield k, ground.chain(k)
