"""Returns against their definition, TorchRL's loops, and one another."""

import doctest
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrl.objectives.value.functional import (
    td0_return_estimate,
    td1_return_estimate,
    td_lambda_return_estimate,
)

import diffrl.rl.returns
from diffrl.rl.returns import is_truncated, lambda_returns, monte_carlo_returns, n_step_returns

Chain = tuple[Tensor, Tensor, Tensor, Tensor]
ENDINGS = ("open", "terminal", "cut inside")
EXACT = {"rtol": 0.0, "atol": 1e-12}


def chain(
    K: int, event: tuple[int, ...] = (3,), ending: str = "cut inside", B: int = 4, seed: int = 0
) -> Chain:
    """reward, next_value, terminated, done of B chains; "cut inside" terminates and truncates anywhere."""
    generator = torch.Generator().manual_seed(seed)
    reward, next_value = torch.randn(2, B, K, *event, dtype=torch.float64, generator=generator)
    terminated = torch.zeros(B, K, 1, dtype=torch.bool)
    done = terminated.clone()
    if ending == "terminal":
        terminated[:, -1] = True
    if ending == "cut inside":
        terminated = torch.rand(B, K, 1, generator=generator) < 0.25
        done = torch.rand(B, K, 1, generator=generator) < 0.25
    return reward, next_value, terminated, done | terminated


# The definition, step by step, in plain Python: no recursion, no mask.


def window(terminated: Tensor, done: Tensor, b: int, k: int) -> int:
    """The number of rewards from step k to where chain b stops."""
    K = done.shape[1]
    return next(j for j in range(k, K) if done[b, j] or terminated[b, j] or j == K - 1) - k + 1


def one_n_step_return(data: Chain, b: int, k: int, n: int, gamma: float) -> Tensor:
    reward, next_value, terminated, done = data
    n = min(n, window(terminated, done, b, k))
    G = sum((gamma**i * reward[b, k + i] for i in range(n)), torch.zeros_like(reward[b, k]))
    return G if terminated[b, k + n - 1] else G + gamma**n * next_value[b, k + n - 1]


def one_lambda_return(data: Chain, b: int, k: int, lmbda: Callable[[int], float], gamma: float) -> Tensor:
    """Σₙ (1 - λ) λⁿ⁻¹ G⁽ⁿ⁾ with all that remains, λᵀ⁻¹, on the longest; λ may differ from step to step."""
    T = window(data[2], data[3], b, k)
    G, rest = torch.zeros_like(data[0][b, k]), 1.0
    for n in range(1, T):
        G = G + rest * (1 - lmbda(k + n - 1)) * one_n_step_return(data, b, k, n, gamma)
        rest *= lmbda(k + n - 1)
    return G + rest * one_n_step_return(data, b, k, T, gamma)


def by_hand(data: Chain, one: Callable[[int, int], Tensor]) -> Tensor:
    B, K = data[0].shape[:2]
    return torch.stack([torch.stack([one(b, k) for k in range(K)]) for b in range(B)])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(
    "returns",
    [
        lambda *a, **k: lambda_returns(*a, lmbda=0.0, **k),
        lambda *a, **k: lambda_returns(*a, lmbda=0.6, **k),
        lambda *a, **k: lambda_returns(*a, lmbda=1.0, **k),
        lambda *a, **k: n_step_returns(*a, n_steps=2, **k),
        lambda *a, **k: monte_carlo_returns(*a, **k),
    ],
)
def test_no_reward_is_a_reward_of_zero(returns: Callable[..., Tensor], gamma: float, ending: str) -> None:
    reward, *rest = chain(5, ending=ending)
    nothing = returns(None, *rest, gamma=gamma)
    torch.testing.assert_close(nothing, returns(torch.zeros_like(reward), *rest, gamma=gamma), **EXACT)


@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(
    "returns",
    [
        lambda *a, **k: lambda_returns(*a, lmbda=0.0, **k),
        lambda *a, **k: lambda_returns(*a, lmbda=0.6, **k),
        lambda *a, **k: lambda_returns(*a, lmbda=torch.full((1, len(a[1][0]), 1), 0.3), **k),
        lambda *a, **k: n_step_returns(*a, n_steps=1, **k),
        lambda *a, **k: n_step_returns(*a, n_steps=2, **k),
        lambda *a, **k: monte_carlo_returns(*a, **k),
    ],
)
def test_no_flags_are_those_of_whole_chains(returns: Callable[..., Tensor], gamma: float, K: int) -> None:
    reward, next_value, terminated, done = chain(K, ending="terminal")
    next_value[:, -1] = torch.nan  # never read
    for r in (reward, None):
        whole = returns(r, next_value, None, gamma=gamma)
        assert torch.equal(whole, returns(r, next_value, terminated, done, gamma=gamma))
        assert bool(whole.isfinite().all())


def test_a_return_is_made_of_something() -> None:
    with pytest.raises(ValueError, match="reward and next_value are both None"):
        monte_carlo_returns(None, None, chain(3)[2])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("event", [(), (3,), (1, 4, 4)])
@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_lambda_returns_are_the_mixture_of_n_step_returns(
    lmbda: float, gamma: float, K: int, event: tuple[int, ...], ending: str
) -> None:
    data = chain(K, event, ending)
    expected = by_hand(data, lambda b, k: one_lambda_return(data, b, k, lambda _: lmbda, gamma))
    torch.testing.assert_close(lambda_returns(*data, lmbda=lmbda, gamma=gamma), expected, **EXACT)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("event", [(), (3,), (1, 4, 4)])
@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("n_steps", [1, 3, 7, 11])
def test_n_step_returns_are_their_definition(
    n_steps: int, gamma: float, K: int, event: tuple[int, ...], ending: str
) -> None:
    data = chain(K, event, ending)
    expected = by_hand(data, lambda b, k: one_n_step_return(data, b, k, n_steps, gamma))
    torch.testing.assert_close(n_step_returns(*data, n_steps=n_steps, gamma=gamma), expected, **EXACT)


@settings(max_examples=60, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**31),
    B=st.integers(1, 3),
    K=st.integers(1, 9),
    event=st.lists(st.integers(1, 3), max_size=3).map(tuple),
    n_steps=st.integers(1, 12),
    gamma=st.floats(0, 1),
    per_step=st.booleans(),
)
def test_any_chain(
    seed: int, B: int, K: int, event: tuple[int, ...], n_steps: int, gamma: float, per_step: bool
) -> None:
    data = chain(K, event, B=B, seed=seed)
    lmbda = torch.rand(
        B if per_step else 1, K, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    G = by_hand(data, lambda b, k: one_n_step_return(data, b, k, n_steps, gamma))
    torch.testing.assert_close(n_step_returns(*data, n_steps=n_steps, gamma=gamma), G, **EXACT)
    rows = lmbda.expand(B, K, 1)
    G = by_hand(data, lambda b, k: one_lambda_return(data, b, k, lambda j: rows[b, j].item(), gamma))
    torch.testing.assert_close(lambda_returns(*data, lmbda=lmbda, gamma=gamma), G, **EXACT)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("event", [(3,), (1, 4, 4)])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_agrees_with_the_loops_of_torchrl(gamma: float, event: tuple[int, ...], ending: str) -> None:
    reward, next_value, terminated, done = data = chain(8, event, ending)
    shape = (4, 8, *(1 for _ in event))
    flags = {
        "done": done.view(shape).expand_as(reward),
        "terminated": terminated.view(shape).expand_as(reward),
    }
    per_step = torch.linspace(0, 1, 32, dtype=torch.float64).view(4, 8, 1)
    for lmbda in (0.0, 0.5, 1.0, per_step):
        weight = lmbda.view(shape).expand_as(reward) if isinstance(lmbda, Tensor) else lmbda
        theirs = td_lambda_return_estimate(gamma, weight, next_value, reward, **flags, time_dim=1)
        torch.testing.assert_close(lambda_returns(*data, lmbda=lmbda, gamma=gamma), theirs, **EXACT)
    exact = torch.tensor(gamma, dtype=torch.float64)  # they round a number to float32
    theirs = td0_return_estimate(exact, next_value, reward, **flags)
    torch.testing.assert_close(n_step_returns(*data, n_steps=1, gamma=gamma), theirs, **EXACT)
    theirs = td1_return_estimate(exact, next_value, reward, **flags, time_dim=1)
    torch.testing.assert_close(monte_carlo_returns(*data, gamma=gamma), theirs, **EXACT)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_ends_of_the_families_meet(gamma: float, K: int, ending: str) -> None:
    data = chain(K, ending=ending)
    td0 = n_step_returns(*data, n_steps=1, gamma=gamma)
    monte_carlo = monte_carlo_returns(*data, gamma=gamma)
    ones = torch.ones(1, K, 1)
    for lmbda, expected in ((0, td0), (0 * ones, td0), (1, monte_carlo), (ones, monte_carlo)):
        torch.testing.assert_close(lambda_returns(*data, lmbda=lmbda, gamma=gamma), expected, **EXACT)
    for n_steps in (K, K + 3, 10**9):
        torch.testing.assert_close(n_step_returns(*data, n_steps=n_steps, gamma=gamma), monte_carlo, **EXACT)


def test_without_future_the_return_is_the_reward() -> None:
    data = chain(8)
    for lmbda in (0.0, 0.7, 1.0):
        assert torch.equal(lambda_returns(*data, lmbda=lmbda, gamma=0.0), data[0])
    assert torch.equal(n_step_returns(*data, n_steps=4, gamma=0.0), data[0])


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_the_true_value_is_a_fixed_point_of_every_return(gamma: float) -> None:
    # Rewards that a potential explains, r = Φ - γ Φ': every return from the true value Φ is Φ.
    potential = torch.randn(4, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    terminated = torch.rand(4, 8, 1, generator=torch.Generator().manual_seed(2)) < 0.2
    reward = potential[:, :-1] - gamma * potential[:, 1:] * ~terminated
    for lmbda in (0.0, 0.4, 1.0, torch.linspace(0, 1, 8).view(1, 8, 1)):
        G = lambda_returns(reward, potential[:, 1:], terminated, lmbda=lmbda, gamma=gamma)
        torch.testing.assert_close(G, potential[:, :-1], **EXACT)
    for n_steps in (1, 3, 8):
        G = n_step_returns(reward, potential[:, 1:], terminated, n_steps=n_steps, gamma=gamma)
        torch.testing.assert_close(G, potential[:, :-1], **EXACT)


@pytest.mark.parametrize("terminal", [False, True])
def test_two_chains_in_one_row_do_not_see_each_other(terminal: bool) -> None:
    first, second = chain(3, ending="open", seed=3), chain(5, ending="terminal", seed=4)
    reward, next_value, terminated, done = (torch.cat(pair, 1) for pair in zip(first, second, strict=True))
    terminated[:, 2], done[:, 2] = terminal, True
    first[2][:, -1] = terminal
    for f, options in (
        (lambda_returns, {"lmbda": 0.6}),
        (n_step_returns, {"n_steps": 4}),
        (monte_carlo_returns, {}),
    ):
        apart = torch.cat([f(*x[:3], gamma=0.9, **options) for x in (first, second)], 1)
        torch.testing.assert_close(
            f(reward, next_value, terminated, done, gamma=0.9, **options), apart, **EXACT
        )


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_a_terminal_value_is_never_read(garbage: float) -> None:
    reward, next_value, terminated, done = chain(8)
    spoilt = next_value.masked_fill(terminated, garbage)
    for f, options in (
        (lambda_returns, {"lmbda": 0.0}),
        (lambda_returns, {"lmbda": 0.6}),
        (lambda_returns, {"lmbda": torch.full((1, 8, 1), 0.6)}),
        (n_step_returns, {"n_steps": 3}),
        (monte_carlo_returns, {}),
    ):
        expected = f(reward, next_value, terminated, done, **options)
        assert torch.equal(f(reward, spoilt, terminated, done, **options), expected)


def test_termination_implies_done() -> None:
    reward, next_value, terminated, _ = chain(8)
    for done in (None, torch.zeros_like(terminated)):
        expected = lambda_returns(reward, next_value, terminated, terminated, lmbda=0.6)
        assert torch.equal(lambda_returns(reward, next_value, terminated, done, lmbda=0.6), expected)


def test_monte_carlo_needs_no_value_of_a_complete_chain() -> None:
    reward, next_value, terminated, _ = chain(8, ending="terminal")
    expected = monte_carlo_returns(reward, next_value, terminated)
    assert torch.equal(monte_carlo_returns(reward, None, terminated), expected)
    assert not is_truncated(terminated)
    cut_inside = chain(8, ending="terminal")
    cut_inside[3][0, 2] = True
    for data in (chain(8, ending="open"), cut_inside):
        assert is_truncated(*data[2:])
        with pytest.raises(ValueError, match="a chain is truncated"):
            monte_carlo_returns(data[0], None, *data[2:])


@pytest.mark.parametrize(
    "f",
    [
        lambda r, V, *flags: lambda_returns(r, V, *flags, lmbda=0.6, gamma=0.9),
        lambda r, V, *flags: lambda_returns(r, V, *flags, lmbda=torch.full((1, 5, 1), 0.6), gamma=0.9),
        lambda r, V, *flags: n_step_returns(r, V, *flags, n_steps=3, gamma=0.9),
        lambda r, V, *flags: monte_carlo_returns(r, V, *flags, gamma=0.9),
    ],
)
def test_gradients_and_compilation(f: Callable[..., Tensor]) -> None:
    reward, next_value, terminated, done = chain(5, (2,))
    plain = f(reward, next_value, terminated, done)
    inputs = (reward.requires_grad_(), next_value.requires_grad_())
    assert torch.equal(f(*inputs, terminated, done), plain)
    assert torch.autograd.gradcheck(lambda r, V: f(r, V, terminated, done), inputs)
    with torch.no_grad():
        compiled = torch.compile(f, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs, terminated, done), plain, **EXACT)


def test_inputs_are_left_alone() -> None:
    data = chain(8)
    copies = [x.clone() for x in data]
    lambda_returns(*data, lmbda=0.6)
    n_step_returns(*data, n_steps=3)
    monte_carlo_returns(*data)
    assert all(torch.equal(x, y) for x, y in zip(data, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    reward, next_value, *flags = chain(8)
    G = lambda_returns(reward.to(dtype), next_value.to(dtype), *flags, lmbda=0.6)
    assert G.dtype == dtype
    expected = lambda_returns(reward, next_value, *flags, lmbda=0.6)
    torch.testing.assert_close(G.double(), expected, rtol=0.0, atol=16 * torch.finfo(dtype).eps)


R, END = torch.zeros(2, 4, 3), torch.zeros(2, 4, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lambda_returns(R, R, END, lmbda=1.1), "lmbda is 1.1"),
        (lambda: lambda_returns(R, R, END, lmbda=-0.1), "lmbda is -0.1"),
        (lambda: lambda_returns(R, R, END, lmbda=float("nan")), "lmbda is nan"),
        (lambda: lambda_returns(R, R, END, lmbda=torch.full((2, 4, 1), 1.1)), "outside"),
        (lambda: lambda_returns(R, R, END, lmbda=torch.full((2, 4, 1), float("nan"))), "outside"),
        (lambda: lambda_returns(R, R, END, lmbda=torch.ones(2, 4)), "lmbda has shape"),
        (lambda: lambda_returns(R, R, END, lmbda=0.5, gamma=1.1), "gamma is 1.1"),
        (lambda: n_step_returns(R, R, END, n_steps=2, gamma=-1.0), "gamma is -1.0"),
        (lambda: monte_carlo_returns(R, R, END, gamma=float("nan")), "gamma is nan"),
        (lambda: n_step_returns(R, R, END, n_steps=0), "n_steps is 0"),
        (lambda: n_step_returns(R, R, END, n_steps=1.5), "n_steps is 1.5"),
        (lambda: n_step_returns(R, R, END, n_steps=True), "n_steps is True"),
        (lambda: n_step_returns(R.long(), R.long(), END, n_steps=1), "reward has dtype torch.int64"),
        (lambda: n_step_returns(R, R.double(), END, n_steps=1), "next_value has dtype torch.float64"),
        (lambda: n_step_returns(R, R[:, :3], END, n_steps=1), "next_value has shape"),
        (lambda: n_step_returns(R[0, 0], R[0, 0], END, n_steps=1), "reward has shape"),
        (lambda: n_step_returns(R[:, :0], R[:, :0], END[:, :0], n_steps=1), "reward has shape"),
        (lambda: n_step_returns(R, R, END.expand_as(R), n_steps=1), "terminated has shape"),
        (lambda: n_step_returns(R, R, END.squeeze(-1), n_steps=1), "terminated has shape"),
        (lambda: n_step_returns(R, R, END.float(), n_steps=1), "terminated has dtype torch.float32"),
        (lambda: n_step_returns(R, R, END, END[:1], n_steps=1), "done has shape"),
        (lambda: lambda_returns(R, R, None, END, lmbda=0.5), "done is given without terminated"),
    ],
)
def test_refuses_what_does_not_fit(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_docstring_examples() -> None:
    attempted = doctest.testmod(diffrl.returns)
    assert attempted.attempted > 0
    assert attempted.failed == 0
