"""Self-checks before the first update of fine-tuning: what must hold if rollout, policy and loss fit together."""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from diffrl import keys
from diffrl.errors import InputError
from diffrl.finetuning.check_report import Check, Report
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.surrogate import trainable_law
from diffrl.ranges import require_int
from diffrl.rewards.calls import Reward
from diffrl.rewards.weighted_sum import nondeterminism

__all__ = ["UNTAUGHT", "check"]

ROWS, STATES = 16, 64  # of the rollout that are looked at, unless an update takes more at once
PER_DIM = 50.0  # |log π| of one dim: a standard deviation of 1e-20, or ten of them away
UNTAUGHT = "all advantages are 0, as rewards that are compared are equal: nothing is learned from them"
DROPOUT = "two forwards of the policy differ: dropout is active (train mode); put it in eval mode"


def check(
    policy: DenoisingPolicy,
    loss: nn.Module | None,
    rollout: TensorDictBase,
    *,
    batch_rows: int | None = None,
    rollout_rows: int | None = None,
    reward: Reward | None = None,
    reference: DenoisingPolicy | None = None,
    autocast: torch.dtype | None = None,
    centred: Literal["group", "batch"] | None = None,
) -> Report:
    """Checks a fresh rollout against the policy and the loss that are about to be updated from it.

    - rollout: on the policy's grid, finite, some step stochastic, and no |log π| beyond 50 a dim;
    - stored log π: what the policy says of the stored actions, in the rollout's own batch shape;
    - ratio: |π/π_old - 1|, in the batch shape of an update. Above a tenth of the clip range the clip acts on noise;
    - KL to itself: of the policy to the reference, or to a second forward of its own;
    - advantages: |mean| over rms, the largest of any step (and group);
    - accumulation: the gradient of a minibatch is that of its parts, weighted by their stochastic steps;
    - reward: the largest difference when asked twice; noted, never a failure.

    ε_D = 0.0128/√D for the reduction "mean" and 0.0128 √D for "sum" is the published clip range in D dims. Ratio
    and log π may be off by a tenth of min(ε, ε_D), in half precision of min(ε, 10 ε_D); the KL by what goes with that.

    It costs a forward of all rows at 2 steps and about four of 64 states (or of one update, if that is more).
    Gradients, modes, random numbers and counts are left as they were. Put the policy in the mode of its updates.

    Args:
        policy: π as it was when the rollout was collected.
        loss: a LossModule that trains its steps, as `DDPOLoss` or `SDPOLoss`; its `clip_range` counts. None: it is
            trained on samples, so that no log-probability is needed, and what is about them is left out.
        rollout: of `collect_rollout`, batch size [B, K], with the advantage [B, K, 1].
        batch_rows: states in one forward of an update; None: the rollout's B.
        rollout_rows: chains that were drawn side by side; None: the rollout's B.
        reward: R, asked for a few clean samples, not counted.
        reference: a policy that must equal π at the start.
        autocast: the dtype of the run's autocast, if any.
        centred: whether advantages must have mean 0 in each "group" or in the "batch", step by step.

    Raises:
        ValueError: entries of the rollout are missing, or an argument is outside its range.
    """
    _refuse(rollout, batch_rows, rollout_rows, centred)
    fits = _rollout(policy, rollout, needs_noise=loss is not None)
    checks = [fits]
    others = [reference, None if loss is None else vars(loss).get("reference")]
    with _untouched([policy, *others], rollout.device):
        if loss is not None and fits.passed:  # else all that follows would fail for the same reason
            run = _Run(policy, loss, rollout, batch_rows, rollout_rows, autocast)
            checks += [_stored(run), _ratio(run), _kl(run, reference), _accumulation(run)]
        checks.append(_advantages(rollout.get(keys.ADVANTAGE), rollout.get(keys.GROUP), centred))
        if reward is not None:
            x0, cond = rollout.get(keys.ACTION)[:ROWS, -1], rollout.get(keys.COND, None)
            checks.append(_reward(reward, x0, None if cond is None else cond[:ROWS, -1]))
    return Report(tuple(checks))


def _refuse(
    rollout: TensorDictBase, batch_rows: int | None, rollout_rows: int | None, centred: str | None
) -> None:
    needed = (keys.X_T, keys.INDEX, keys.GROUP, keys.ACTION, keys.ACTION_LOG_PROB, keys.TRAINABLE)
    if missing := [key for key in (*needed, keys.ADVANTAGE) if rollout.get(key, None) is None]:
        raise InputError(f"the rollout has no {', '.join(missing)}: collect it and set its advantages first")
    if rollout.ndim != 2:
        raise InputError(f"the rollout has batch size {tuple(rollout.shape)}: give whole chains, [B, K]")
    for name, rows in (("batch_rows", batch_rows), ("rollout_rows", rollout_rows)):
        if rows is not None:
            require_int(name, rows)
    if centred not in ("group", "batch", None):
        raise InputError(f"centred is {centred!r}: give 'group', 'batch' or None")


@contextmanager
def _untouched(policies: Sequence[DenoisingPolicy | None], device: torch.device | None) -> Iterator[None]:
    """Restore random numbers, counts and buffers (such as those of batch norms) afterwards."""
    counted = [p for p in policies if p is not None]
    nfe, buffers = [p.nfe for p in counted], [(b, b.clone()) for p in counted for b in p.buffers()]
    python, numpy = random.getstate(), np.random.get_state()  # rewards may use them
    cuda = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for p, n in zip(counted, nfe, strict=True):
            p.nfe = n


class _Run:
    """What the checks share: the states that they look at, the precision, and how far a ratio may be off."""

    def __init__(
        self,
        policy: DenoisingPolicy,
        loss: nn.Module,
        rollout: TensorDictBase,
        batch_rows: int | None,
        rollout_rows: int | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.policy, self.loss, self.rollout, self.autocast = policy, loss, rollout, autocast
        B, D = len(rollout), math.prod(rollout.get(keys.ACTION).shape[2:])
        self.batch_rows = B if batch_rows is None else batch_rows
        self.rollout_rows = B if rollout_rows is None else rollout_rows
        self.steps = rollout.get(keys.TRAINABLE).squeeze(-1).any(0).nonzero().flatten().tolist()
        """Positions of the stochastic steps."""
        want = max(STATES, self.batch_rows)
        rows = min(B, max(ROWS, math.ceil(want / len(self.steps) / 2) * 2))
        some = torch.linspace(0, len(self.steps) - 1, min(len(self.steps), math.ceil(want / rows)))
        columns = [self.steps[k] for k in some.round().long().tolist()]
        # step by step, so that the members of a pair stay side by side
        self.states: TensorDictBase = torch.cat([rollout[:rows, k] for k in columns])
        """Of some chains at some steps, the first and the last stochastic one among them: [N]."""
        if (N := len(self.states)) < self.batch_rows:  # an update is larger: its shape is what counts
            self.states = self.states[torch.arange(self.batch_rows + self.batch_rows % 2) % N]
        dtypes = {p.dtype for p in policy.parameters()} | {autocast}
        self.half = bool(dtypes & {torch.float16, torch.bfloat16})
        eps_D = 0.0128 / math.sqrt(D) * (1 if policy.reduction == "mean" else D)
        eps = float(getattr(loss, "clip_range", 0)) or eps_D
        self.limit = 0.1 * min(eps if eps > 0 else eps_D, 10 * eps_D if self.half else eps_D)
        """Of |ratio - 1|."""
        self.kl_limit = 0.5 * self.limit**2 * (D if policy.reduction == "mean" else 1)
        """The KL of a shift that makes such log-ratios: their variance is 2 KL/D or 2 KL."""

    def precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.states.get(keys.X_T).device.type, self.autocast)

    def column(self, k: int) -> tuple[TensorDictBase, ...]:
        """All chains at one step, in batches of the size that the rollout had."""
        return self.rollout[:, k].split(self.rollout_rows)

    @torch.no_grad()
    def log_ratio(self, states: TensorDictBase) -> Tensor:
        """Log π - log π_old of the stochastic states among [N]: the policy now, against what was stored."""
        with self.precision():
            _, log_p, mask = trainable_law(self.policy, states)
        return log_p - states.get(keys.ACTION_LOG_PROB)[mask]


def _largest(*values: Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    return max((float(v.detach().abs().max()) for v in values if v.numel()), key=_nan_first, default=0.0)


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _rollout(policy: DenoisingPolicy, rollout: TensorDictBase, *, needs_noise: bool) -> Check:
    name, limit = "rollout: |log π| a dim", PER_DIM
    entries = [keys.X_T, keys.ACTION, keys.X0_HAT, keys.ACTION_LOG_PROB]
    bad = [e for e in entries if e in rollout and not bool(rollout.get(e).isfinite().all())]
    D = math.prod(rollout.get(keys.ACTION).shape[2:]) if policy.reduction == "sum" else 1
    value = _largest(rollout.get(keys.ACTION_LOG_PROB)) / D
    if bad:
        why = (
            f"{', '.join(bad)} hold NaN or infinity: the denoiser overflowed, or a step divides by a std of 0"
        )
        return Check(name, False, math.nan, limit, why)
    if not _on_grid(policy, rollout):
        why = "its states are at other times than the policy's grid: process, sampler or num_steps differ"
        return Check(name, False, math.nan, limit, why)
    if needs_noise and not bool(rollout.get(keys.TRAINABLE).any()):
        why = "no step is stochastic: give the sampler noise (η > 0) or the policy a std_floor"
        return Check(name, False, math.nan, limit, why)
    why = "a step has almost no noise, or the actions are not this policy's: raise std_floor"
    return Check(name, value <= limit, value, limit, "" if value <= limit else why)


def _on_grid(policy: DenoisingPolicy, rollout: TensorDictBase) -> bool:
    index, t = rollout.get(keys.INDEX).flatten().cpu(), rollout.get(keys.T, None)
    if int(index.max()) >= policy.num_steps:
        return False
    return t is None or policy.is_on_grid(index, t.flatten())


@torch.no_grad()
def _stored(run: _Run) -> Check:
    """Compare all rows at the first and at the last step, in the batches in which they were collected."""
    parts = [part for k in sorted({run.steps[0], run.steps[-1]}) for part in run.column(k)]
    value = _largest(*(run.log_ratio(part) for part in parts))
    passed = value <= run.limit
    return Check("stored log π", passed, value, run.limit, "" if passed else _why(run, parts[-1]))


def _ratio(run: _Run) -> Check:
    # parts without a stochastic step are left out of updates too
    parts = [p for p in run.states.split(run.batch_rows) if bool(p.get(keys.TRAINABLE).any())]
    value = _largest(*(run.log_ratio(part).expm1() for part in parts))
    if value <= run.limit:
        return Check("ratio - 1", True, value, run.limit)
    own = _largest(*(run.log_ratio(part) for part in run.column(run.steps[-1])))
    why = _why(run, parts[-1])
    if own <= run.limit and _repeats(run, parts[-1]):
        why = (
            f"the log-probability depends on the batch size: {run.batch_rows} states an update, {run.rollout_rows} a "
            "step of the rollout. Use one size for both, float32, or a wider clip range"
        )
    return Check("ratio - 1", False, value, run.limit, why)


@torch.no_grad()
def _repeats(run: _Run, states: TensorDictBase) -> bool:
    return torch.equal(run.log_ratio(states), run.log_ratio(states))


@torch.no_grad()
def _why(run: _Run, states: TensorDictBase) -> str:
    """Why stored log-probabilities are probably not those of the policy, judged by what else does not fit."""
    policy, stored = run.policy, states.get(keys.ACTION_LOG_PROB)
    if not _repeats(run, states):
        return DROPOUT
    for key in (keys.X_T, keys.ACTION):
        x = states.get(key)
        for half in (torch.bfloat16, torch.float16):
            if x.dtype == half or (x.numel() and torch.equal(x.to(half).to(x), x)):
                return f"the stored {key} is rounded to {str(half)[6:]}: store latents in float32"
    law, log_p, mask = trainable_law(policy, states)
    if not bool(law.stochastic.all()):
        return "steps that were stochastic are not any more: std_floor or the sampler's η differ"
    D = states.get(keys.ACTION)[0].numel()
    other = log_p * D if policy.reduction == "mean" else log_p / D
    if D > 1 and torch.allclose(other, stored[mask], rtol=1e-3, atol=1e-4):
        return f"the rollout's reduction over dims is not the policy's, {policy.reduction!r}"
    return (
        "the policy is not the one that acted: its weights, its condition, guidance (used in only one of rollout "
        "and training), its sampler's η, its std_floor or its precision differ"
    )


@torch.no_grad()
def _kl(run: _Run, reference: DenoisingPolicy | None) -> Check:
    name, other_policy = "KL to itself", run.policy if reference is None else reference
    x, index, cond = (run.states.get(key, None) for key in (keys.X_T, keys.INDEX, keys.COND))
    value = 0.0
    for rows in torch.arange(len(x), device=x.device).split(run.batch_rows):
        given = x[rows], index[rows].squeeze(-1), None if cond is None else cond[rows]
        with run.precision():
            law, other = run.policy.law(*given), other_policy.law(*given)
        if not torch.allclose(law.std, other.std):
            why = "the reference has other standard deviations: its sampler, num_steps or std_floor differ"
            return Check(name, False, math.inf, run.kl_limit, why)
        kl = law.kl(other, run.policy.reduction)[law.stochastic]
        value = max(value, _largest(kl), key=_nan_first)
    if value <= run.kl_limit:
        return Check(name, True, value, run.kl_limit)
    why = "the reference's weights, mode (dropout), guidance or precision are not the policy's"
    if reference is None or not _repeats(run, run.states[: run.batch_rows]):
        why = DROPOUT
    return Check(name, False, value, run.kl_limit, why)


def _advantages(adv: Tensor, group: Tensor, centred: str | None) -> Check:
    adv = adv.detach().double().squeeze(-1)
    rows = group[:, 0].flatten() if centred == "group" else torch.zeros(len(adv), device=adv.device)
    rms = adv.square().mean().sqrt().clamp(min=1e-12)
    value = _largest(*(adv[rows == g].mean(0) / rms for g in rows.unique()))
    where = "group" if centred == "group" else "batch"
    name, limit = f"advantages: mean of a {where}", math.inf if centred is None else 1e-3
    if value <= limit:
        return Check(name, True, value, limit, "" if bool(adv.any()) else UNTAUGHT)
    why = "credit was not taken step by step over this batch: over earlier rollouts too, or without a mean"
    if centred == "group":
        why = "rows were shuffled apart from their group, or credit was taken over the batch or earlier rollouts"
    return Check(
        name, False, value, limit, "advantages are NaN: see the rewards" if math.isnan(value) else why
    )


def _gradient(run: _Run, states: TensorDictBase) -> list[Tensor]:
    """Gradient of the sum of all entries "loss_...", for the parameters of the policy that it reaches."""
    trained = [p for p in run.policy.parameters() if p.requires_grad]
    if not trained:
        raise InputError("no parameter of the policy requires a gradient")
    with torch.enable_grad():
        with run.precision():
            out = run.loss(states)
        total = torch.stack([out.get(key) for key in out.keys() if str(key).startswith("loss_")]).sum()
        found = torch.autograd.grad(total, trained, allow_unused=True) if total.requires_grad else ()
    if all(g is None for g in found):
        raise InputError("the loss has no gradient for this policy: is it built on another one?")
    return [g for g in found if g is not None]


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors))


def _accumulation(run: _Run) -> Check:
    """Whether g = Σ (n_m/n) g_m, over parts of unequal size."""
    name, limit = "accumulation: error of the gradient", 5e-2 if run.half else 1e-3
    mask = run.states.get(keys.TRAINABLE).flatten()
    N = min(len(mask), STATES, max(run.batch_rows, 4)) // 2 * 2 or 1
    whole = run.states[-N:]
    first = max(N // 6 * 2, 2)  # whole pairs
    try:
        parts = [p for p in (whole[:first], whole[first:]) if len(p) and bool(p.get(keys.TRAINABLE).any())]
        counts = [float(p.get(keys.TRAINABLE).sum()) for p in parts]
        rest, scale = _gradient(run, whole), 0.0
        for n, part in zip(counts, parts, strict=True):
            share = [n / sum(counts) * g for g in _gradient(run, part)]
            rest = [r - g for r, g in zip(rest, share, strict=True)]
            scale += _norm(share)
    except ValueError as error:  # of the loss: it says what is wrong with the batch
        return Check(name, False, math.nan, limit, str(error))
    value = _norm(rest) / max(scale, 1e-30)
    if value <= limit:
        return Check(name, True, value, limit)
    why = "the loss is not a mean over stochastic steps (a sum, or rows that depend on each other across a batch)"
    return Check(name, False, value, limit, why if _repeats(run, whole) else DROPOUT)


def _reward(reward: Reward, x0: Tensor, cond: Any) -> Check:
    value = nondeterminism(reward, x0, cond)
    why = f"it is random: the same samples got rewards up to {value:.3g} apart; do not cache it, and average more"
    return Check("reward, asked twice", True, value, math.inf, why if value > 0 else "")
