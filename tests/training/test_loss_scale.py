"""Loss scaling in float16: exact, as PyTorch scales, saved and resumed, and refused where it was never tried."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from diffrl.errors import InputError
from diffrl.training.arithmetic import Arithmetic
from diffrl.training.loss_scale import LossScale
from diffrl.training.optim import NonFiniteLoss, Optim, Optimiser
from diffrl.training.trainer import Trainer
from tests.kit.trainers import differing, make, state, take

GRADIENTS = [1.0, math.inf, 2.0, 0.5, math.nan, math.inf, 1.0, 1.0, 1.0, 1.0, 0.25, math.inf, 3.0]


def test_a_power_of_two_changes_no_bit() -> None:
    plain, scaled = make(), make()
    scaled.optimiser.loss_scale = LossScale(2.0**20, growth_every=5)
    for one, other in zip(take(plain, 12), take(scaled, 12), strict=True):
        assert other.pop("loss_scale") >= 2**20 and one == other
    before, after = state(plain), state(scaled)
    assert before.pop("loss_scale") is None and after.pop("loss_scale") == {"value": 2.0**22, "finite": 2}
    assert differing(before, after) == []


def test_steps_and_scales_are_those_of_pytorchs_scaler() -> None:
    """Gradients that overflow are skipped by both, S halves and doubles alike, and a skipped step counts."""
    p, q = (nn.Parameter(torch.tensor([1.0], dtype=torch.float64)) for _ in range(2))
    optim = Optim(0.1, warmup_steps=4, decay="none", clip_norm=None)
    ours = Optimiser([p], optim, 20, loss_scale=LossScale(8.0, growth_every=2))
    theirs = torch.optim.AdamW([q], lr=0.1, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for step, g in enumerate(GRADIENTS):
        assert ours.loss_scale is not None and ours.loss_scale.value == scaler.get_scale()
        ours.backward(torch.tensor(0.5, dtype=torch.float64) * p.sum(), 2 * g)
        figures = ours.step(1.0)
        assert figures["lr"] == pytest.approx(0.1 * min((step + 1) / 4, 1))
        assert figures["grad_norm"] == g or not math.isfinite(g)
        theirs.param_groups[0]["lr"] = figures["lr"]
        scaler.scale(g * q.sum()).backward()
        scaler.step(theirs)
        scaler.update()
        theirs.zero_grad()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=0)
    assert ours.steps == len(GRADIENTS)


def test_what_no_scale_helps_ends_the_run() -> None:
    p = nn.Parameter(torch.ones(1))
    optimiser = Optimiser([p], Optim(), 5, loss_scale=LossScale(2.0))
    optimiser.backward(p.sum())
    with pytest.raises(NonFiniteLoss, match="loss nan"):  # the loss itself, which is not scaled
        optimiser.step(math.nan)
    for skipped in (True, False):  # at S = 2, and then at S = 1
        p.grad = torch.full_like(p, math.inf)
        if skipped:
            assert optimiser.step(1.0)["loss_scale"] == 2
            continue
        with pytest.raises(NonFiniteLoss, match="gradient norm inf"):
            optimiser.step(1.0)
    assert torch.equal(p.detach(), torch.ones(1))


def test_small_gradients_are_lost_without_a_scale() -> None:
    """Of a loss that is divided by the batch once more; float32 knows what they are."""
    found = {}
    for autocast, scaled in ((None, False), (torch.float16, True), (torch.float16, False)):
        trainer = make(autocast=autocast, arithmetic=Arithmetic(reduction="mean_over_batch"))
        for parameter in trainer.parameters:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            trainer.denoiser.network.last.weight.mul_(1e-4)  # so that the layers below get little
        if not scaled:
            trainer.optimiser.loss_scale = None
        x0, labels, generator = trainer.batch(0)
        trainer._descend(trainer.objective.draw(x0, cond=labels, generator=generator), generator)
        g = trainer.denoiser.network.first.weight.grad
        found[autocast, scaled] = g if trainer.optimiser.loss_scale is None else g / 65536
    wanted = found[None, False]
    errors = {k: float((g - wanted).norm() / wanted.norm()) for k, g in found.items()}
    assert errors[torch.float16, True] < 0.02 and errors[torch.float16, False] > 0.2


def test_a_float16_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    def begun(folder: Path | None = None) -> Trainer:
        trainer = make(folder, autocast=torch.float16)
        trainer.optimiser.loss_scale = LossScale(2.0**19, growth_every=3)  # it overflows at first
        return trainer

    whole = begun()
    figures = take(whole, 12)
    scales = [row["loss_scale"] for row in figures]
    assert scales[:2] == [2**19, 2**18] and scales.count(2**19) > 1  # halved, and doubled again
    take(begun(tmp_path), 7)
    resumed = begun(tmp_path)
    assert resumed.resume() and resumed.step == 5
    assert take(resumed, 12) == figures[5:]
    assert differing(state(whole), state(resumed)) == []


def test_the_network_computes_in_float16_and_learns_the_same() -> None:
    trainer, outputs = make(autocast=torch.float16), set()
    trainer.denoiser.network.register_forward_hook(lambda *hooked: outputs.add(hooked[-1].dtype))
    figures = take(trainer, 12)
    assert outputs == {torch.float16} and {p.dtype for p in trainer.parameters} == {torch.float32}
    assert figures[-1]["loss_value"] == pytest.approx(take(make(), 12)[-1]["loss_value"], rel=0.02)
    assert {row["loss_scale"] for row in figures} == {65536.0}


def test_other_devices_are_refused() -> None:
    with pytest.raises(InputError, match="float16 was tried on a CPU only, not on meta: set dtype=bfloat16"):
        make(device="meta", autocast=torch.float16)
    assert LossScale.of_run(torch.bfloat16, torch.device("meta")) is None
    for wrong in ({"value": 0.5}, {"growth_every": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            LossScale(**wrong)
