"""Networks that the library did not make: the contract of one's own, and those that were trained elsewhere."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffrl
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.foreign import wrap_network
from diffrl.diffusion.networks import MLP
from diffrl.diffusion.samplers.ode import Heun
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.diffusion.trajectories import sample_chain
from diffrl.errors import InputError, InputTypeError
from tests.kit.oracles import randn


class Theirs(nn.Module):
    """ε, v or a velocity as others publish it: of the unscaled state and the time itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen = [x, t]
        return torch.tanh(self.layer(torch.cat([x, t[:, None].to(x) / 100], 1)))


# x0 from a prediction F, as textbooks have it
FORMS: dict[str, tuple[Schedule, str, Callable[..., Tensor], Tensor]] = {
    "DDPM ε": (DDPM(), "eps", lambda x, F, a, s: (x - s * F) / a, torch.tensor([0.0, 10.0, 500.0, 999.0])),
    "DDPM v": (DDPM(), "v", lambda x, F, a, s: a * x - s * F, torch.tensor([0.0, 10.0, 500.0, 999.0])),
    "VP ε": (VP(), "eps", lambda x, F, a, s: (x - s * F) / a, torch.tensor([0.001, 0.1, 0.5, 0.999])),
    "VP score": (
        VP(),
        "score",
        lambda x, F, a, s: (x + s**2 * F) / a,
        torch.tensor([0.001, 0.1, 0.5, 0.999]),
    ),
    "flow velocity": (Flow(), "velocity", lambda x, F, a, s: x - s * F, torch.tensor([0.01, 0.3, 0.9, 1.0])),
    "EDM's D": (EDM(), "x0", lambda x, F, a, s: F, torch.tensor([0.002, 0.5, 5.0, 80.0])),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_somebody_elses_network_agrees_with_its_own_estimate(form: str, dtype: torch.dtype) -> None:
    process, prediction, x0_of, t = FORMS[form]
    t, net = t.to(dtype), Theirs().to(dtype)
    x = randn(len(t), 2).to(dtype)
    denoiser = wrap_network(net, process, prediction)
    D = denoiser(x, t)
    assert torch.equal(net.seen[0], x)  # nothing scales its input
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    wanted = x0_of(x, net(x, t), alpha, sigma)
    scale = float(((x.abs() + 1) / alpha.clamp(min=1e-3)).max())  # what cancels in (x - σ ε)/α
    limit = 1e-12 if dtype == torch.float64 else 1e-6
    assert float((D - wanted).detach().abs().max()) < limit * scale


@pytest.mark.parametrize(("process", "dtype"), [(DDPM(), torch.int64), (VP(), torch.float32)])
def test_times_are_given_as_the_network_knows_them(process: Schedule, dtype: torch.dtype) -> None:
    net, t = Theirs().float(), torch.tensor([0.0, 1.0])
    wrap_network(net, process)(torch.ones(2, 2), t)
    assert net.seen[1].dtype == dtype and net.seen[1].tolist() == [0, 1]
    wrap_network(net, VP(), time_scale=999.0)(torch.ones(2, 2), t)
    assert net.seen[1].tolist() == [0, 999]


def test_scaling_the_input_is_what_went_wrong() -> None:
    """The same network in a `Denoiser` that scales its input is another function, and says how it is to be had."""
    net, x, t = Theirs(), randn(3, 2), torch.tensor([0.1, 0.5, 0.9]).double()

    class Named(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None) -> Tensor:
            return net(x, c_noise)

    options: dict[str, Any] = {"prediction_type": "eps", "time_input": "t", "sigma_data": 1.7}
    wanted = wrap_network(net, VP())(x, t)
    assert torch.equal(Denoiser(Named(), VP(), scale_input=False, **options)(x, t), wanted)
    assert float((Denoiser(Named(), VP(), **options)(x, t) - wanted).detach().abs().max()) > 0.01


def test_a_condition_and_other_ways_of_returning() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, int]:
            return (x if cond is None else cond[:, None] * x), 0

    denoiser, x, t = wrap_network(Pair(), EDM(), "x0"), randn(3, 2), torch.ones(3)
    assert torch.equal(denoiser(x, t), x)
    assert torch.equal(denoiser(x, t, torch.tensor([0, 1, 2])), torch.tensor([0, 1, 2])[:, None] * x)
    for wrong, message in ((lambda x, t: None, "NoneType"), (lambda x, t: {"a": x}, "dict")):
        with pytest.raises(InputTypeError, match=f"returned a {message}"):
            wrap_network(wrong, EDM(), "x0")(x, t)
    with pytest.raises(InputError, match="time_scale is nan"):
        wrap_network(Pair(), EDM(), time_scale=float("nan"))


def test_a_unet_of_diffusers_in_one_line() -> None:
    """It agrees with its own ε, and with the clean estimate of diffusers' DDIM scheduler."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    ).eval()
    denoiser = diffrl.wrap_network(unet, diffrl.DDPM(1000, "linear"))
    scheduler = diffusers.DDIMScheduler(1000, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(1000)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for t in (0, 10, 300, 700, 999):
            eps = unet(x, t).sample
            D = denoiser(x, torch.full((2,), float(t)))
            alpha, sigma = (
                c(torch.tensor(float(t))) for c in (denoiser.process.alpha, denoiser.process.sigma)
            )
            theirs = scheduler.step(eps, t, x).pred_original_sample
            # relative to 1/α, by which a rounded ε is multiplied; their table of ᾱ is in float32
            assert float((D - (x - sigma * eps) / alpha).abs().max()) < 1e-6 / float(alpha)
            assert float((D - theirs).abs().max()) < 5e-6 / float(alpha)
    with pytest.raises(InputTypeError, match=r"returned a UNet2DOutput.*diffrl\.wrap_network"):
        Denoiser(unet, DDPM(), prediction_type="eps", time_input="t")(x, torch.zeros(2))


# The contract of one's own


def test_a_network_of_another_arity_is_told_the_contract() -> None:
    with pytest.raises(InputTypeError, match=r"Theirs.forward\(.*network\(x, c_noise, cond\).*wrap_network"):
        Denoiser(Theirs(), EDM())

    class Keywords(nn.Module):
        def forward(self, *args: Tensor, **more: Any) -> Tensor:
            return args[0]

    x = randn(2, 2)
    assert Denoiser(Keywords(), EDM(), prediction_type="x0")(x, torch.ones(2)).shape == x.shape
    assert Denoiser(lambda x, c_noise, cond: x, EDM())(x, torch.ones(2)).shape == x.shape


@pytest.mark.parametrize("returned", [(2, 1), (1, 2), (2, 4), (2,)])
def test_a_network_of_another_shape_is_not_broadcast(returned: tuple[int, ...]) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None) -> Tensor:
            return torch.zeros(returned)

    with pytest.raises(InputError, match=r"returned shape .* for states of shape \(2, 2\)"):
        Denoiser(Odd(), EDM())(torch.zeros(2, 2), torch.ones(2))


def test_a_process_is_a_schedule() -> None:
    for process in ("edm", None, EDM):
        with pytest.raises(InputTypeError, match="give a schedule such as"):
            Denoiser(MLP((2,)), process)
    with pytest.raises(InputTypeError, match="give a schedule such as"):
        diffrl.sample(lambda x, t, cond: x, (2, 2), sampler=Heun(), num_steps=3, seed=0, process="edm")


# Data and states of another kind


def test_numpy_and_float64_are_answered_in_one_line() -> None:
    array = np.zeros((4, 2))
    with pytest.raises(InputTypeError, match=r"x0 is a ndarray: give a tensor, torch\.as_tensor\(x0, dtype"):
        sample_chain(EDM(), array, num_steps=3)
    with pytest.raises(InputTypeError, match="x0 is a list"):
        sample_chain(EDM(), [[0.0, 1.0]], num_steps=3)
    with pytest.raises(InputTypeError, match="cond is a ndarray"):
        sample_chain(EDM(), torch.zeros(4, 2), num_steps=3, cond=np.zeros(4))
    denoiser = Denoiser(MLP((2,)), EDM())
    with pytest.raises(InputTypeError, match="x_t is a ndarray"):
        denoiser(array, torch.ones(4))
    chain = sample_chain(EDM(), torch.as_tensor(array), num_steps=3)
    loss = diffrl.objectives.ValueLoss(denoiser)
    for use in (lambda: loss(chain), lambda: diffrl.sample(denoiser, (4, 2), **SAMPLED, dtype=torch.float64)):
        with pytest.raises(
            InputTypeError, match=r"x_t has dtype torch.float64, .* weights have torch.float32"
        ):
            use()
    denoiser.double()
    assert loss(chain)["loss_value"].dtype == torch.float64


def test_half_precision_and_labels_of_another_kind_are_answered_in_one_line() -> None:
    chain = sample_chain(EDM(), torch.zeros(4, 2).half(), num_steps=3)
    with pytest.raises(InputTypeError, match=r"x_t has dtype float16, in which squares overflow"):
        diffrl.objectives.ValueLoss(Denoiser(MLP((2,)), EDM()))(chain)
    labelled = Denoiser(MLP((2,), num_classes=3), EDM())
    for cond in ([0, 1], np.zeros(2, int), torch.zeros(2), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(InputTypeError, match="give labels as a tensor of int64"):
            labelled(torch.zeros(2, 2), torch.ones(2), cond)


def test_a_pipeline_is_no_network() -> None:
    class Pipeline:
        def __call__(self, batch_size: int = 1, generator: Any = None) -> None:
            raise AssertionError

    with pytest.raises(
        InputTypeError, match=r"network is a Pipeline: give a module or a function, .* pipe\.unet"
    ):
        wrap_network(Pipeline(), DDPM())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_refused(value: float) -> None:
    x0 = torch.zeros(4, 2)
    x0[2, 1] = value
    objectives = diffrl.objectives
    for draw in (
        lambda: sample_chain(EDM(), x0, num_steps=3),
        lambda: objectives.sample_td_edm_pairs(EDM(), x0),
        lambda: objectives.sample_consistency_pairs(EDM(), x0, num_scales=5),
        lambda: objectives.sample_log_normal_states(EDM(), x0),
        lambda: objectives.sample_uniform_states(EDM(), x0),
    ):
        with pytest.raises(InputError, match="x0 holds NaN or infinity, first in row 2 of 4"):
            draw()
    with pytest.raises(InputError, match="the batch is empty"):
        sample_chain(EDM(), torch.zeros(0, 2), num_steps=3)


# Sampling

SAMPLED: dict[str, Any] = {"sampler": Heun(), "num_steps": 3, "seed": 0}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_steps": 2.5}, "num_steps is 2.5"),
        ({"num_steps": True}, "num_steps is True"),
        ({"num_steps": 10**12}, "num_steps is 1000000000000"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"sampler": "heun"}, "sampler is 'heun'"),
        ({"sampler": Heun}, r"give one such as diffrl\.Heun\(\)"),
        ({"dtype": torch.int64}, "dtype is torch.int64"),
        ({"shape": (0, 2)}, "shape is 0"),
        ({"shape": (4.0, 2)}, "shape is 4.0"),
        ({"cond": torch.zeros(3)}, "cond has 3 entries, but shape asks for 4"),
        ({"cond": 3}, "cond is 3: give a tensor with a row for each of 4 samples"),
        ({"cond": torch.tensor(3)}, r"cond is tensor\(3\): give a tensor with a row"),
        ({"cond": [3] * 4}, r"cond is \[3, 3, 3, 3\]: give a tensor with a row"),
        ({"seed": None}, "seed or noise"),
        ({"shape": 4}, "shape is 4"),
        ({"shape": ()}, r"shape is \(\)"),
        ({"device": "nowhere"}, "device is 'nowhere'"),
    ],
)
def test_what_cannot_be_sampled_is_named(changed: dict[str, Any], says: str) -> None:
    with pytest.raises((InputError, InputTypeError), match=says):
        diffrl.sample(Denoiser(MLP((2,)), EDM()), **{"shape": (4, 2), **SAMPLED, **changed})
