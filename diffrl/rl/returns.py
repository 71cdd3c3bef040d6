"""Returns along chains of K steps, as functions of tensors.

Row k of every argument belongs to the step from state k to state k+1: rₖ is its reward, Vₖ₊₁ (`next_value[:, k]`)
is the value of the state that it reaches, and `terminated[:, k]` and `done[:, k]` say whether the chain stops there.
The three returns share one recursion and differ in X, the estimate of what follows:

    Gₖ = rₖ + γ Xₖ₊₁,    Xₖ₊₁ = 0 where terminatedₖ,    Xₖ₊₁ = Vₖ₊₁ where doneₖ or k = K-1

A chain may thus be cut inside the window, and the end of the window cuts every chain. Without flags, `terminated`
None, every chain terminates with its last step, and not before.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffrl.errors import InputError
from diffrl.ranges import require_int, require_number
from diffrl.shapes import expand_like

__all__ = ["is_truncated", "lambda_returns", "mixed_returns", "monte_carlo_returns", "n_step_returns"]


def lambda_returns(
    reward: Tensor | None,
    next_value: Tensor,
    terminated: Tensor | None,
    done: Tensor | None = None,
    *,
    lmbda: float | Tensor,
    gamma: float = 1.0,
) -> Tensor:
    """λ-returns of every step.

        Gₖ = rₖ + γ (1 - terminatedₖ) [(1 - λₖ) Vₖ₊₁ + λₖ Gₖ₊₁],    Gₖ₊₁ = Vₖ₊₁ where doneₖ or k = K-1

    λ = 0 is TD(0), λ = 1 is Monte Carlo. A tensor holds one λ for each step: λₖ, in the row of rₖ, weighs the two
    estimates of the state that step k reaches, as TorchRL's loop version has it; the source calls it λₖ₊₁.

    Args:
        reward: rₖ, shape [B, K, *E]; None if no step pays anything.
        next_value: Vₖ₊₁, shape [B, K, *E]; anything, even NaN, where `terminated`.
        terminated: whether step k reaches the end of the chain (nothing follows), bool, shape [B, K, 1]; None: the
            last one does.
        done: whether the chain is cut after step k, bool, shape [B, K, 1]; `terminated` implies it, and
            stands for it if it is not given.
        lmbda: λ in [0, 1], a number or a tensor of shape [B, K, 1] or [1, K, 1].
        gamma: discount γ in [0, 1].

    Returns:
        Gₖ, shape [B, K, *E].

    Raises:
        ValueError: if a shape, a dtype or a range is not as above.

    Source: Reinforcement Learning: An Introduction, 2nd ed. (Sutton & Barto, 2018), §12.8,
    http://incompleteideas.net/book/the-book-2nd.html.

    >>> r, V, end = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 9.0]]), torch.tensor([[[False], [True]]])
    >>> lambda_returns(r, V, end, lmbda=0.5)
    tensor([[0.7500, 1.0000]])
    """
    if not isinstance(lmbda, Tensor):
        require_number("lmbda", lmbda, 0, 1)
        if lmbda == 0:
            return n_step_returns(reward, next_value, terminated, done, n_steps=1, gamma=gamma)
        if lmbda == 1:
            return monte_carlo_returns(reward, next_value, terminated, done, gamma=gamma)
    r, V, cut = _steps(reward, next_value, terminated, done, gamma)
    lmbdas = _lambdas(lmbda, next_value)
    out, G = _slots(next_value, reward, lmbda)
    X, unpaid = V[-1], reward is None and gamma == 1
    for k in reversed(range(len(r))):
        X = torch.lerp(V[k], _restart(X, V[k], cut[k]), lmbdas[k], out=G[k])  # (1 - λ) V + λ G
        X = G[k] = X if unpaid else _paid(r[k], gamma, X, G[k])
    return torch.stack(G, 1) if out is None else out


def n_step_returns(
    reward: Tensor | None,
    next_value: Tensor,
    terminated: Tensor | None,
    done: Tensor | None = None,
    *,
    n_steps: int,
    gamma: float = 1.0,
) -> Tensor:
    """n-step returns of every step.

        Gₖ = rₖ + γ rₖ₊₁ + … + γⁿ⁻¹ rₖ₊ₙ₋₁ + γⁿ Vₖ₊ₙ

    The sum stops earlier where the chain does: with the value of the state reached where `done`, or at the
    end of the window, and without it where `terminated`. n = 1 is TD(0), n ≥ K is Monte Carlo.

    Args:
        reward: rₖ, shape [B, K, *E]; None if no step pays anything.
        next_value: Vₖ₊₁, shape [B, K, *E]; anything, even NaN, where `terminated`.
        terminated: whether step k reaches the end of the chain (nothing follows), bool, shape [B, K, 1]; None: the
            last one does.
        done: whether the chain is cut after step k, bool, shape [B, K, 1]; `terminated` implies it, and
            stands for it if it is not given.
        n_steps: n ≥ 1, the number of rewards in the sum.
        gamma: discount γ in [0, 1].

    Returns:
        Gₖ, shape [B, K, *E].

    Raises:
        ValueError: if a shape, a dtype or a range is not as above.

    Source: Reinforcement Learning: An Introduction, 2nd ed. (Sutton & Barto, 2018), eq. 7.1,
    http://incompleteideas.net/book/the-book-2nd.html.

    >>> r, V, end = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 9.0]]), torch.tensor([[[False], [True]]])
    >>> n_step_returns(r, V, end, n_steps=1)
    tensor([[0.5000, 1.0000]])
    """
    require_int("n_steps", n_steps)
    if n_steps == 1:  # no recursion
        require_number("gamma", gamma, 0, 1)
        _check_chain(reward, next_value, terminated, done)
        V_next = _until_end(next_value, terminated)
        return V_next if reward is None and gamma == 1 else _paid(reward, gamma, V_next)
    if next_value.ndim >= 2 and n_steps >= next_value.shape[1]:
        return monte_carlo_returns(reward, next_value, terminated, done, gamma=gamma)
    r, V, cut = _steps(reward, next_value, terminated, done, gamma)
    out, G = _slots(next_value, reward)
    for k in range(len(r)):
        last = min(k + n_steps, len(r)) - 1
        X = V[last]
        for j in reversed(range(k, last + 1)):
            X = _paid(r[j], gamma, _restart(X, V[j], cut[j]), G[k])
        G[k] = X
    return torch.stack(G, 1) if out is None else out


def monte_carlo_returns(
    reward: Tensor | None,
    next_value: Tensor | None,
    terminated: Tensor | None,
    done: Tensor | None = None,
    *,
    gamma: float = 1.0,
) -> Tensor:
    """Monte Carlo returns of every step: all rewards up to where the chain stops.

        Gₖ = rₖ + γ Gₖ₊₁,    Gₖ₊₁ = 0 where terminatedₖ,    Gₖ₊₁ = Vₖ₊₁ where doneₖ or k = K-1

    Values are read only where a chain is cut.

    Args:
        reward: rₖ, shape [B, K, *E]; None if no step pays anything.
        next_value: Vₖ₊₁, shape [B, K, *E]; anything, even NaN, where `terminated`; None if no chain is
            truncated (see `is_truncated`).
        terminated: whether step k reaches the end of the chain (nothing follows), bool, shape [B, K, 1]; None: the
            last one does.
        done: whether the chain is cut after step k, bool, shape [B, K, 1]; `terminated` implies it, and
            stands for it if it is not given.
        gamma: discount γ in [0, 1].

    Returns:
        Gₖ, shape [B, K, *E].

    Raises:
        ValueError: if a shape, a dtype or a range is not as above, or a truncated chain has no next_value.

    Source: Reinforcement Learning: An Introduction, 2nd ed. (Sutton & Barto, 2018), eq. 3.9,
    http://incompleteideas.net/book/the-book-2nd.html.

    >>> r, end = torch.tensor([[0.0, 1.0]]), torch.tensor([[[False], [True]]])
    >>> monte_carlo_returns(r, None, end, gamma=0.9)
    tensor([[0.9000, 1.0000]])
    """
    if next_value is not None:
        values = next_value
    elif reward is not None:
        values = reward.new_zeros(()).expand_as(reward)
    else:
        raise InputError("reward and next_value are both None: a return is made of one of them at least")
    r, V, cut = _steps(reward, values, terminated, done, gamma)
    if next_value is None and not torch.compiler.is_compiling() and is_truncated(terminated, done):
        raise InputError("next_value is None, but a chain is truncated: give the values it bootstraps from")
    out, G = _slots(values, reward)
    X = V[-1]
    for k in reversed(range(len(r))):
        X = G[k] = _paid(r[k], gamma, _restart(X, V[k], cut[k]), G[k])
    return torch.stack(G, 1) if out is None else out


def mixed_returns(
    G: Tensor,
    share: float,
    reward: Tensor | None,
    terminated: Tensor | None,
    done: Tensor | None = None,
    *,
    gamma: float = 1.0,
) -> Tensor:
    """Any returns with Monte Carlo ones: (1-s) G^MC + s G.

    Args:
        G: returns, shape [B, K, *E].
        share: s in [0, 1]; at 1 they are given back as they are.
        reward: as in `monte_carlo_returns`, and so are the next three; None: G^MC is 0.
        terminated: where chains end.
        done: where chains end; none may be cut.
        gamma: discount γ in [0, 1].

    Raises:
        ValueError: as `monte_carlo_returns`.

    >>> r, end = torch.tensor([[0.0, 1.0]]), torch.tensor([[[False], [True]]])
    >>> mixed_returns(torch.tensor([[0.5, 1.0]]), 0.5, r, end)
    tensor([[0.7500, 1.0000]])
    """
    if share == 1:
        return G
    if reward is None:
        return share * G
    return torch.lerp(monte_carlo_returns(reward, None, terminated, done, gamma=gamma), G, share)


def is_truncated(terminated: Tensor | None, done: Tensor | None = None) -> bool:
    """Whether a chain is cut before it has terminated, inside the window or at its end.

    If none is, Monte Carlo returns need no values.

    Args:
        terminated: bool, shape [B, K, 1]; None: with the last step.
        done: bool, shape [B, K, 1]; `terminated` if it is not given.
    """
    if terminated is None:
        return False
    cut_inside = done is not None and bool((done & ~terminated).any())
    return cut_inside or not bool(terminated[:, -1].all())


def _until_end(next_value: Tensor, terminated: Tensor | None) -> Tensor:
    """V of the states that steps reach, 0 where nothing follows."""
    if terminated is None:
        return torch.cat([next_value[:, :-1], torch.zeros_like(next_value[:, -1:])], 1)
    return next_value.masked_fill(expand_like(terminated.squeeze(-1), next_value), 0.0)


def _steps(
    reward: Tensor | None, next_value: Tensor, terminated: Tensor | None, done: Tensor | None, gamma: float
) -> tuple[Sequence[Tensor | None], list[Tensor], list[Tensor | None]]:
    """For each step the reward, the value (0 where terminated), and where chains stop (None: nowhere)."""
    require_number("gamma", gamma, 0, 1)
    _check_chain(reward, next_value, terminated, done)
    V = list(next_value.unbind(1))
    K = len(V)
    cut: list[Tensor | None] = [None] * K
    r: Sequence[Tensor | None] = [None] * K if reward is None else reward.unbind(1)
    if terminated is None:
        V[-1] = torch.zeros_like(V[-1])
        return r, V, cut
    ended = terminated if done is None or done is terminated else terminated | done
    # Most steps end no chain. Reading the flags once saves a mask over [B, *E] at each of those steps.
    somewhere = [True] * K if torch.compiler.is_compiling() else ended.squeeze(-1).any(0).tolist()
    for k, v in enumerate(V):
        if somewhere[k]:
            V[k] = v.masked_fill(expand_like(terminated[:, k, 0], v), 0.0)  # not multiplied: 0 · NaN is NaN
            if k < K - 1:  # after the last step all chains stop
                cut[k] = expand_like(ended[:, k, 0], v)
    return r, V, cut


def _restart(X: Tensor, V: Tensor, cut: Tensor | None) -> Tensor:
    """The estimate of what follows a step: X, or V where the chain stops."""
    return X if cut is None else torch.where(cut, V, X)


def _paid(r: Tensor | None, gamma: float, X: Tensor, out: Tensor | None = None) -> Tensor:
    """The return r + γ X."""
    return torch.mul(X, gamma, out=out) if r is None else torch.add(r, X, alpha=gamma, out=out)


def _slots(V: Tensor, *others: float | Tensor | None) -> tuple[Tensor | None, list[Any]]:
    """An output [B, K, *E] and its K rows to write into; no output if gradients or a compiler record the steps."""
    inputs = [x for x in (V, *others) if isinstance(x, Tensor)]
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if graph or torch.compiler.is_compiling():
        return None, [None] * V.shape[1]
    out = V.new_empty(V.shape)
    return out, list(out.unbind(1))


def _lambdas(lmbda: float | Tensor, V: Tensor) -> tuple[Any, ...]:
    """λₖ of every step: a number, or a tensor that broadcasts against [B, *E]."""
    B, K = V.shape[:2]
    if not isinstance(lmbda, Tensor):
        return (lmbda,) * K
    if lmbda.shape not in {(B, K, 1), (1, K, 1)}:
        shape = list(lmbda.shape)
        raise InputError(f"lmbda has shape {shape}, expected a number, [{B}, {K}, 1] or [1, {K}, 1]")
    if not torch.compiler.is_compiling() and not bool(((lmbda >= 0) & (lmbda <= 1)).all()):
        raise InputError("lmbda has entries outside [0, 1]")
    return expand_like(lmbda.to(V).squeeze(-1), V).unbind(1)


def _check_chain(
    reward: Tensor | None, next_value: Tensor, terminated: Tensor | None, done: Tensor | None
) -> None:
    name, x = ("next_value", next_value) if reward is None else ("reward", reward)
    if x.ndim < 2 or x.shape[1] < 1:
        raise InputError(f"{name} has shape {list(x.shape)}, expected [B, K, *E] with K of at least 1")
    if not x.is_floating_point():
        raise InputError(f"{name} has dtype {x.dtype}, but returns need a floating dtype: {name}.float()")
    if next_value.shape != x.shape:
        raise InputError(
            f"next_value has shape {list(next_value.shape)}, expected that of reward, {list(x.shape)}"
        )
    if next_value.dtype != x.dtype:
        raise InputError(f"next_value has dtype {next_value.dtype}, expected that of reward, {x.dtype}")
    if terminated is None and done is not None:
        raise InputError("done is given without terminated: give both, or neither where chains are whole")
    for name, flag in (("terminated", terminated), ("done", done)):
        if flag is None:
            continue
        if flag.dtype != torch.bool:
            raise InputError(f"{name} has dtype {flag.dtype}, expected torch.bool: use {name}.bool()")
        if flag.shape != (*x.shape[:2], 1):
            raise InputError(
                f"{name} has shape {list(flag.shape)}, expected one flag per step, {[*x.shape[:2], 1]}"
            )
