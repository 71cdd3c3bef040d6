"""Is my run right? What must hold of a training run, whatever it is configured to be, measured in seconds."""

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.trajectories import draw_chain
from diffrl.experiments.train import TrainingJob
from diffrl.finetuning.check_report import Check, Report
from diffrl.metrics.diagnostics import Oracle, target_errors
from diffrl.objectives.denoiser_loss import FAR_OFF, far_off
from diffrl.objectives.target_choice import lmbda_of_chain
from diffrl.objectives.value import ValueLoss
from diffrl.registry import accepted
from diffrl.shapes import expand_like
from diffrl.training.build import build_data
from diffrl.training.loop import step_generator
from diffrl.training.trainer import Trainer

__all__ = ["check_run"]

STEPS, STOPPED_AFTER = 4, 2  # gradient steps of the trial runs
STATES, DRAWS = 16, 64  # for each noise level, of the exact targets
DIM_LIMIT = 4096  # event dims up to which exact targets take seconds


def check_run(config: Mapping[str, Any]) -> Report:
    """Check a training run before it is started.

    - data: the ratio of the data's standard deviation to sigma_data, or the other way round;
    - first level: what is left of the data there, α std(x0)/σ;
    - grid: how many levels have less noise than the one before them (all must), or a last state that is not clean;
    - flags: states at which a chain ends by its flags, but not by what it holds;
    - rewards: Σ r of a chain against A x0 + κ x of its first state, relative;
    - λ = 1: its gradient against that of denoising written out by hand, relative;
    - fixed point: the bias of the target at the exact denoiser, in standard errors; where the exact denoiser is known;
    - gradients: parameters that a step does not reach;
    - determinism, resuming: the largest difference between weights that must be equal.

    Args:
        config: what `diffrl.configs` composes for the command `train`.

    Raises:
        ValueError, DataError, MissingExtra, NonFiniteLoss: the run cannot be started at all.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sigma_data is")  # the table says it
        return Report(tuple(_checks(config)))


def _checks(config: Mapping[str, Any]) -> list[Check]:
    config = {
        **config,
        "trainer": {**config["trainer"], "grad_steps": STEPS, "checkpoint_every": STOPPED_AFTER},
    }
    data = build_data(config)

    def job() -> TrainingJob:
        return TrainingJob(config, data, config["objective"]["name"])

    first = job()
    first.check()
    trainer = first.trainer
    process, sigma_data = trainer.denoiser.process, trainer.denoiser.sigma_data
    chain = Chain(process, **accepted(Chain, config["chain"]))
    x0, labels, generator = trainer.batch(0)
    drawn = draw_chain(chain, x0, cond=labels, generator=generator)
    return [
        _data(cast(float, trainer.loss.data_std), sigma_data),
        _first_level(chain, x0),
        _grid(chain),
        _flags(drawn),
        _rewards(drawn),
        *_monte_carlo(trainer, drawn),
        *_fixed_point(config, chain, first.oracle, data.test, sigma_data),
        *_trials(job),
    ]


def _check(name: str, value: float, limit: float, cause: str) -> Check:
    passed = value <= limit  # NaN does not
    return Check(name, passed, value, limit, "" if passed else cause)


def _data(std: float, sigma_data: float) -> Check:
    off, remedy = far_off(std, sigma_data)
    return _check("data: std against sigma_data", off, FAR_OFF, remedy)


def _first_level(chain: Chain, x0: Tensor) -> Check:
    alpha, sigma = (float(c[0]) for c in chain.scales)
    left = alpha * float(x0.double().std()) / sigma
    cause = "sampling starts from pure noise, but training sees data there: give the schedule more noise"
    return _check("first level: data left", left, 0.1, cause)


def _grid(chain: Chain) -> Check:
    alpha, sigma = chain.scales
    noise = sigma / alpha.clamp(min=torch.finfo(alpha.dtype).tiny)
    wrong = int((noise.diff() >= 0).sum()) + int(alpha[-1] != 1) + int(sigma[-1] != 0)
    return _check("grid: steps without less noise", wrong, 0, "the schedule does not fall to clean data")


def _flags(drawn: TensorDict) -> Check:
    reached = drawn[keys.NEXT]
    clean = (reached[keys.X_T] == drawn[keys.X0]).flatten(2).all(-1, keepdim=True)
    terminated, truncated, done = (reached[k] for k in (keys.TERMINATED, keys.TRUNCATED, keys.DONE))
    wrong = (terminated & ~clean) | (done != (terminated | truncated))
    wrong[:, -1] |= ~terminated[:, -1]  # a whole chain ends at clean data
    return _check(
        "flags: ends that are none",
        int(wrong.sum()),
        0,
        "a chain must terminate at clean data, and only there",
    )


def _rewards(drawn: TensorDict) -> Check:
    """G of the first state is Σ r = A x0 + κ x, since the value of the clean state is 0."""
    first = drawn[:, 0]
    x = first[keys.X_T]
    G = expand_like(first[keys.A], x) * first[keys.X0] + expand_like(first[keys.KAPPA], x) * x
    found = drawn[keys.NEXT, keys.REWARD].sum(1)
    size = drawn[keys.NEXT, keys.REWARD].abs().sum(1).max().clamp(min=1e-12)
    limit = 100 * torch.finfo(x.dtype).eps
    return _check(
        "rewards: sum against the return",
        float((found - G).abs().max() / size),
        limit,
        "the chain's rewards are not those of its states",
    )


def _monte_carlo(trainer: Trainer, drawn: TensorDict) -> list[Check]:
    """At λ = 1 the loss is mean A²‖x0 - D(x)‖²/max(A² c_out², 1e-8): denoising, whatever the chain."""
    trainer.denoiser.eval()  # dropout would make two forward passes differ
    denoiser, x, t, cond = trainer.denoiser, drawn[keys.X_T], drawn[keys.T], drawn.get(keys.COND, None)
    D = denoiser(x.flatten(0, 1), t.flatten(), None if cond is None else cond.flatten(0, 1)).view_as(x)
    A, c_out = (expand_like(c, x) for c in (drawn[keys.A], denoiser.scalings(t).c_out))
    by_hand = ((A * (drawn[keys.X0] - D)).square() / (A * c_out).square().clamp(min=1e-8)).mean()
    by_value = ValueLoss(denoiser, lmbda=1.0, weight="edm")(drawn.clone())["loss_value"]
    g, h = (torch.autograd.grad(loss, trainer.parameters, allow_unused=True) for loss in (by_hand, by_value))
    reached = [(a.double(), b.double()) for a, b in zip(g, h, strict=True) if a is not None and b is not None]
    size = sum(float(a.square().sum()) for a, _ in reached)
    off = math.sqrt(sum(float((a - b).square().sum()) for a, b in reached) / size) if size > 0 else math.nan
    limit = 1e-4 if x.dtype == torch.float32 else 1e-10
    why = "values and denoising disagree: the chain's A and κ, or the network's scalings"
    unused = "a part of the network has no influence on what it predicts"
    return [
        _check("λ = 1: gradient against denoising", off, limit, why),
        _check("gradients: parameters without one", len(g) - len(reached), 0, unused),
    ]


def _fixed_point(
    config: Mapping[str, Any], chain: Chain, oracle: Oracle | None, x0: Tensor, sigma_data: float
) -> list[Check]:
    """Only where the exact denoiser is known, and for the targets that are those of a chain."""
    name, options = "fixed point: bias of the target (s.e.)", config["objective"]
    if oracle is None or x0[0].numel() > DIM_LIMIT or not {"lmbda", "n_steps", "lookahead"} <= options.keys():
        return []
    last = {option: values[-1] for option, values in (options.get("anneal") or {}).items()}
    options = {**options, **last}  # as they are at the end of the training
    n = options["n_steps"]
    lmbda = 0.0 if n is not None else lmbda_of_chain(options, chain.num_steps)
    target = f"n_steps={n}" if n is not None else f"lmbda={lmbda:g}"
    rows = torch.arange(STATES) % len(
        x0
    )  # of few rows again, with other noise: a standard error needs many states
    found = target_errors(
        oracle,
        oracle,
        x0.cpu()[rows],
        chain.process,
        sigma_data=sigma_data,
        gamma=options["gamma"],
        lmbdas=(lmbda,),
        n_steps=() if n is None else (n,),
        draws=DRAWS,
        generator=step_generator(config["seed"], 0),
        **accepted(Chain, config["chain"]),
    )
    errors = [level["targets"][target] for level in found["levels"]]
    z = max(abs(e["bias_sq"]) / max(e["bias_sq_error"], 1e-12) for e in errors)
    if chain.eta < 1 and (n is not None or lmbda < 1):
        return [
            Check(
                name,
                True,
                z,
                math.inf,
                "with η < 1 the target is biased given the state: another fixed point, on purpose",
            )
        ]
    return [
        _check(
            name,
            z,
            6.0,
            "the exact denoiser is not the fixed point: γ < 1, or a stride that the chain does not take",
        )
    ]


def _trials(job: Callable[[], TrainingJob]) -> list[Check]:
    """Short runs: twice the same, and once stopped and continued."""
    with tempfile.TemporaryDirectory() as folder:
        whole, again, stopped, continued = (job().trainer for _ in range(4))
        stopped.folder = continued.folder = Path(folder)
        for trainer in (whole, again):
            _steps(trainer, STEPS)
        _steps(stopped, STOPPED_AFTER)
        stopped.save()
        continued.resume()
        _steps(continued, STEPS)
    equal = "the same seed gives other weights: an operation is not deterministic, or keeps a state that is not saved"
    return [
        _check("determinism: two runs", _difference(whole, again), 0.0, equal),
        _check("resuming: stopped and continued", _difference(whole, continued), 0.0, equal),
    ]


def _steps(trainer: Trainer, end: int) -> None:
    """Train up to a step; a checkpoint is due when the next one is asked for."""
    for _ in trainer.steps():
        if trainer.step == end:
            return


def _difference(a: Trainer, b: Trainer) -> float:
    pairs = zip(a.parameters, b.parameters, strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)
