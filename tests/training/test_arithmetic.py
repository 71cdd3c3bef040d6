"""How a step is computed changes nothing but what it says: parts, published scales, memory formats, compilation."""

import copy
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffrl.data.dataset import Data
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.networks.unet import UNet
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.starts import LossAwareStarts
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError
from diffrl.objectives import ValueLoss
from diffrl.objectives.scheme import Objective, build_objective
from diffrl.objectives.soft_update import SoftUpdate
from diffrl.training.arithmetic import Arithmetic
from diffrl.training.build import build_data, build_denoiser
from diffrl.training.ema import Average
from diffrl.training.optim import Optim
from diffrl.training.trainer import Length, Target, Trainer
from tests.kit.configs import small
from tests.kit.schemes import NAMES, WORDS
from tests.kit.trainers import differing, make, state, take

REAL_COMPILE = torch.compile
PLAIN = Optim(1e-3, warmup_steps=3, clip_norm=None)


@cache
def base() -> dict[str, Any]:
    return small("data=gmm", "data.dim=2", "data.components=3")


def objective(name: str, dtype: torch.dtype) -> tuple[Objective, Data]:
    """In the middle of its training, with a network whose last layer is not 0."""
    config = copy.deepcopy(base()) | {"objective": {"name": name}}
    for word in WORDS.get(name, ()):
        key, _, value = word.partition("=")
        group, _, option = key.partition(".")
        if option:
            config[group][option] = yaml.safe_load(value)
        elif group != "data":  # a mixture does for all
            config[group] = {"name": value}
    data = build_data(config)
    denoiser = build_denoiser(config, data).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    made = build_objective(config, denoiser, data=data)
    made.set_progress(50, 100)
    if made.loss.bootstrap_network is not made.loss.value_network:
        SoftUpdate(made.loss, eps=0.9)
    return made, data


def close(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, b[key], rtol=tolerance, atol=tolerance)
        else:
            assert value == b[key] or key == "target", key


# Parts


@pytest.mark.parametrize("parts", [2, 3])  # 8 rows in halves, and in parts that are not equal
def test_parts_make_the_step_of_the_whole(parts: int) -> None:
    """With a target network and several averages, along a schedule."""
    runs = [
        make(
            loss={"lmbda": 0.5, "bootstrap": "target", "denoising_coef": 0.3},
            dtype=torch.float64,
            optim=PLAIN,
            average=Average(40, also=(8,)),
            arithmetic=Arithmetic(accumulate=k),
        )
        for k in (1, parts)
    ]
    whole, cut = (take(run, 12) for run in runs)
    for one, other in zip(whole, cut, strict=True):
        assert one == pytest.approx(other, rel=1e-12, abs=1e-12)
    close(state(runs[0]), state(runs[1]), 1e-12)
    assert differing(state(runs[0]), state(runs[1])) != []  # it was another sum


def test_parts_teach_the_starts_what_the_whole_does() -> None:
    states: list[dict[str, Any]] = []
    for parts in (1, 2):
        trainer = make(dtype=torch.float64, optim=PLAIN, arithmetic=Arithmetic(accumulate=parts))
        chain = Chain(trainer.denoiser.process, num_steps=5, coupling="markov")
        draw = ChainSampler(chain, window=1, starts=LossAwareStarts(history=2))
        trainer.objective, trainer.adaptive = Objective("td", trainer.loss, draw), cast(Any, draw)
        take(trainer, 12)
        states.append(draw.state_dict())
    close(states[0], states[1], 1e-12)


def test_every_objective_is_a_mean_over_rows() -> None:
    """So that gradients of parts add up to that of the whole."""
    for name in NAMES:
        made, data = objective(name, torch.float64)
        generator = torch.Generator().manual_seed(0)
        states = made.draw(data.batch(8, generator)[0].double(), cond=None, generator=generator)
        gradients = []
        for parts in (1, 2):
            cut = Arithmetic(accumulate=parts).parts(states)
            assert len(cut) == parts
            for part in cut:
                (len(part) / len(states) * made.loss(part)["loss_value"]).backward()
            found = [p.grad for p in made.loss.denoiser.parameters() if p.grad is not None]
            gradients.append(torch.cat([g.flatten() for g in found]))
            made.loss.denoiser.zero_grad()
        assert float(gradients[0].norm()) > 0, name
        assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-12, name


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(InputError, match=r"trainer.accumulate is 9, but there are 8 rows"):
        take(make(arithmetic=Arithmetic(accumulate=9)), 1)
    made, data = objective("inductive_moments", torch.float32)
    generator = torch.Generator().manual_seed(0)
    states = made.draw(data.batch(8, generator)[0], cond=None, generator=generator)  # two groups of four
    assert len(Arithmetic(accumulate=2).parts(states)) == 2
    with pytest.raises(InputError, match=r"trainer.accumulate=3 cuts groups"):
        Arithmetic(accumulate=3).parts(states)
    network = MLP((2,), hidden=4)
    network.add_module("norm", nn.BatchNorm1d(2))
    with pytest.raises(InputError, match=r"BatchNorm: set it to 1"):
        Arithmetic(accumulate=2).prepare(ValueLoss(Denoiser(network, EDM())), (2,))


# Published scales of the gradient


def test_a_sum_is_edms_published_loss() -> None:
    """Σ w (D - x0)² summed over dims and averaged over the batch, written out; and TD-EDM's mean over B once more."""
    made, data = objective("edm", torch.float64)
    parameters = [*made.loss.denoiser.parameters()]
    start = [p.detach().clone() for p in parameters]
    plain = Optim(1.0, (0.0, 0.0), warmup_steps=0, decay="none", clip_norm=None, name="sgd")
    length, B, dim = Length(grad_steps=1, batch_size=8), 8, 2
    steps: dict[str, Tensor] = {}
    for reduction in ("mean", "sum", "mean_over_batch"):
        for p, value in zip(parameters, start, strict=True):
            p.data.copy_(value)
        trainer = Trainer(
            made,
            data,
            seed=0,
            folder=None,
            length=length,
            optim=plain,
            average=Average(),
            target=Target(),
            arithmetic=Arithmetic(reduction=reduction),
        )
        take(trainer, 1)
        steps[reduction] = torch.cat(
            [(s - p.detach()).flatten() for s, p in zip(start, parameters, strict=True)]
        )
    for p, value in zip(parameters, start, strict=True):
        p.data.copy_(value)
    x0, _, generator = trainer.batch(0)
    states = made.draw(x0, cond=None, generator=generator)
    sigma, x = states["t"].flatten(), states["x_t"].flatten(0, 1)
    D, σd = made.loss.denoiser(x, sigma), 0.5
    w = (sigma**2 + σd**2) / (sigma * σd) ** 2  # EDM, Table 1
    published = (w[:, None] * (D - x0) ** 2).sum() / B
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(published, parameters)])
    torch.testing.assert_close(steps["sum"], gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(steps["mean"], gradient / dim, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(steps["mean_over_batch"], gradient / dim / B, rtol=1e-10, atol=1e-12)


def test_the_scale_is_adams_epsilon() -> None:
    """c times the gradient with ε is the gradient with ε/c; at ε = 0 it would be nothing."""
    ends, optim = {}, Optim(1e-3, warmup_steps=0, clip_norm=None, name="adam")
    for reduction, epsilon in [("mean_over_batch", 1e-3), ("mean", 8e-3), ("mean", 1e-3)]:
        trainer = make(dtype=torch.float64, optim=optim, arithmetic=Arithmetic(reduction=reduction))
        for group in trainer.optimiser.algorithm.param_groups:
            group["eps"] = epsilon
        figures = take(trainer, 12)
        ends[reduction, epsilon] = torch.cat([p.detach().flatten() for p in trainer.parameters]), figures
    scaled, same, other = ends.values()
    torch.testing.assert_close(scaled[0], same[0], rtol=1e-10, atol=1e-12)
    assert float((scaled[0] - other[0]).abs().max()) > 1e-4
    for one, two in zip(scaled[1], same[1], strict=True):
        assert one["loss_value"] == pytest.approx(two["loss_value"], rel=1e-10)  # that of L, not of c L
        assert one["grad_norm"] == pytest.approx(two["grad_norm"] / 8, rel=1e-10)


def test_radam_knows_the_scale_in_its_first_five_steps() -> None:
    """They are lr m̂, and 1/B as long; from the sixth on a step is divided by √v, where ε does not rule."""
    optim, lengths = Optim(1e-6, warmup_steps=0, decay="none", clip_norm=None, name="radam"), []
    for reduction in ("mean_over_batch", "mean"):
        trainer = make(dtype=torch.float64, optim=optim, arithmetic=Arithmetic(reduction=reduction))
        points = [torch.cat([p.detach().flatten() for p in trainer.parameters])]
        for _ in trainer.steps():
            points.append(torch.cat([p.detach().flatten() for p in trainer.parameters]))
        lengths.append([float((a - b).norm()) for a, b in pairwise(points)])
    ratios = [one / other for one, other in zip(*lengths, strict=True)]
    assert ratios[:5] == pytest.approx([1 / 8] * 5, rel=1e-2) and min(ratios[5:]) > 0.5


# Memory format and compilation


def images(arithmetic: Arithmetic, dtype: torch.dtype, folder: Path | None = None) -> Trainer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Denoiser(UNet((2, 4, 4), channels=8), EDM()).to(dtype)
    x0 = torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(1)) / 2
    draw = ChainSampler(Chain(EDM(), num_steps=3, coupling="markov"))
    return Trainer(
        Objective("td", ValueLoss(denoiser, bootstrap="target", lmbda=0.5), draw),
        Data("noise", x0[:8], train=x0),
        seed=0,
        folder=folder,
        length=Length(grad_steps=6, batch_size=4, checkpoint_every=2),
        optim=PLAIN,
        average=Average(20),
        target=Target(),
        arithmetic=arithmetic,
    )


def test_channels_last_are_the_same_numbers_in_another_format(tmp_path: Path) -> None:
    plain, last = (images(Arithmetic(channels_last=on), torch.float64) for on in (False, True))
    assert take(plain, 6)[-1] == pytest.approx(take(last, 6)[-1], rel=1e-9)
    close(state(plain), state(last), 1e-9)
    networks = (last.denoiser, last.ema.module, last.loss.bootstrap_network)
    for network, wanted in [*((network, True) for network in networks), (plain.denoiser, False)]:
        weights = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert weights and {p.is_contiguous(memory_format=torch.channels_last) for p in weights} == {wanted}

    stopped = images(Arithmetic(channels_last=True), torch.float64, tmp_path)
    take(stopped, 4)
    resumed = images(Arithmetic(channels_last=True), torch.float64, tmp_path)
    assert resumed.resume() and resumed.step == 2
    take(resumed, 6)
    assert differing(state(last), state(resumed)) == []


def test_compilation_is_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's front alone, whose numbers are the network's own, bit for bit; not of the average."""
    calls: list[Any] = []

    def compiled(function: Any, **options: Any) -> Any:
        found = REAL_COMPILE(function, backend="eager", **options)

        def call(*given: Any) -> Any:
            calls.append(given)
            return found(*given)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    options: dict[str, Any] = {"loss": {"lmbda": 0.5, "bootstrap": "target"}}
    plain, switched = make(**options), make(**options, arithmetic=Arithmetic(compile=True))
    take(plain, 2)
    assert not calls
    take(switched, 2)
    assert len(calls) == 4  # of the network and of its target, in each step
    assert differing(state(plain), state(switched)) == []
    switched.ema.module(torch.zeros(1, 2), torch.ones(1))
    assert len(calls) == 4


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's compiler of its own parts
def test_the_real_compiler_gives_the_same_run(tmp_path: Path) -> None:
    runs = [make(arithmetic=Arithmetic(compile=on)) for on in (False, True)]
    plain, compiled = (take(run, 12) for run in runs)
    assert plain[-1] == pytest.approx(compiled[-1], rel=1e-3)
    close(state(runs[0]), state(runs[1]), 1e-3)
    take(make(tmp_path, arithmetic=Arithmetic(compile=True)), 7)
    resumed = make(tmp_path, arithmetic=Arithmetic(compile=True))
    assert resumed.resume() and take(resumed, 12) == compiled[5:]
    assert differing(state(runs[1]), state(resumed)) == []


def test_a_compiler_that_fails_is_one_line() -> None:
    error = type("BackendFailed", (RuntimeError,), {"__module__": "torch._inductor.exc"})(
        "\nno compiler\nat all"
    )
    with pytest.raises(
        InputError, match=r"trainer.compile is true.*\(no compiler\): set it to false"
    ) as found:
        with Arithmetic(compile=True).compiling():
            raise error
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match="mine"), Arithmetic(compile=True).compiling():
        raise ValueError("mine")


def test_what_it_cannot_be() -> None:
    with pytest.raises(InputError, match=r"trainer.accumulate is 0"):
        Arithmetic(accumulate=0)
    with pytest.raises(
        InputError, match=r"trainer.reduction is 'max': give one of mean, sum, mean_over_batch"
    ):
        Arithmetic(reduction="max")
    with pytest.raises(InputError, match=r"trainer.channels_last is for images"):
        make(arithmetic=Arithmetic(channels_last=True))


# Half precision is the networks' alone


class HalfPrecision(TorchDispatchMode):
    """Notes operations with results in half precision, but for those of the networks that are watched."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.inside, self.within, self.outside = 0, 0, set[str]()
        for network in dict.fromkeys(networks):
            network.register_forward_pre_hook(lambda *_: self._enter(1))
            network.register_forward_hook(lambda *_: self._enter(-1))

    def _enter(self, by: int) -> None:
        self.inside += by

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, tuple | list) else [out]
        if any(isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in found):
            if self.inside:
                self.within += 1
            else:
                self.outside.add(str(func))
        return out


def test_value_arithmetic_of_every_objective_is_float32_under_autocast() -> None:
    """Targets, preconditioning, weights and losses: no operation outside of a network has a half-precision result."""
    for name in NAMES:
        made, data = objective(name, torch.float32)
        generator = torch.Generator().manual_seed(0)
        states = made.draw(data.batch(8, generator)[0], cond=None, generator=generator)
        own, target = made.loss.denoiser.network, made.loss.bootstrap_network.module.denoiser.network
        watch = HalfPrecision(own, target)
        with torch.autocast("cpu", torch.bfloat16), watch:
            loss = made.loss(states)["loss_value"]
        assert loss.dtype == torch.float32 and watch.within > 0 and watch.outside == set(), name
