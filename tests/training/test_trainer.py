"""The training loop: reproducible, resumable, stopped by what is not finite, and each part as documented."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.data.dataset import Data
from diffrl.data.image_files import DataError
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.objectives.scheme import Objective
from diffrl.training.arithmetic import Arithmetic
from diffrl.training.checkpoints import CheckpointError, list_checkpoints, load_checkpoint
from diffrl.training.loop import step_generator
from diffrl.training.optim import NonFiniteLoss, Optim
from diffrl.training.trainer import Length, Target, Trainer
from tests.kit.trainers import Unfused, differing, make, state, take, unfused

BOOTSTRAPS = [
    ({"lmbda": 0.5}, Target()),
    ({"n_steps": 2, "bootstrap": "residual"}, Target()),
    ({"bootstrap": "target"}, Target(decay=0.9)),
    ({"bootstrap": "target"}, Target(every=4)),
]


@pytest.mark.parametrize(("loss", "target"), BOOTSTRAPS)
@pytest.mark.parametrize("jitter", [False, True])
def test_fused_steps_train_the_same_weights(loss: dict[str, Any], target: Target, jitter: bool) -> None:
    runs = [
        make(loss=loss, target=target, dtype=torch.float64, arithmetic=Arithmetic(reduction="sum"))
        for _ in range(2)
    ]
    draw = replace(runs[0].objective.draw, jitter=jitter)  # type: ignore[type-var]
    runs[0].objective = Objective("td", runs[0].loss, draw)
    runs[1].objective = Objective("td", runs[1].loss, Unfused(draw))
    assert (runs[0].objective.fused is None) == (loss.get("bootstrap") == "residual")
    assert runs[1].objective.fused is None
    for ours, theirs in zip(take(runs[0], 12), take(runs[1], 12), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10)
    for p, q in zip(runs[0].parameters, runs[1].parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


# Same seed, same result; stop at any moment, resume, same result


def test_same_seed_same_result() -> None:
    runs = [make(seed=seed) for seed in (0, 0, 1)]
    figures = [take(run, 12) for run in runs]
    assert figures[0] == figures[1] and figures[0] != figures[2]
    assert differing(state(runs[0]), state(runs[1])) == []
    assert any(k.startswith("model.") for k in differing(state(runs[0]), state(runs[2])))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    a, b = make(), make()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    take(a, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    take(b, 3)
    assert differing(state(a), state(b)) == []


@pytest.mark.parametrize(("loss", "target"), BOOTSTRAPS)
def test_resuming_changes_no_bit(loss: dict[str, Any], target: Target, tmp_path: Path) -> None:
    whole = make(loss=loss, target=target)
    figures = take(whole, 13)

    stopped = make(tmp_path, loss, target=target)
    take(stopped, 7)  # beyond the checkpoint of step 5: steps 6 and 7 are lost
    resumed = make(tmp_path, loss, target=target)
    assert resumed.resume() and resumed.step == 5
    assert take(resumed, 13) == figures[5:]
    assert differing(state(whole), state(resumed)) == []


def test_a_checkpoint_holds_all_that_training_goes_on_from(tmp_path: Path) -> None:
    trainer = make(tmp_path, {"bootstrap": "target"}, target=Target(every=4))
    take(trainer, 6)
    saved = state(trainer)
    trainer.save()
    resumed = make(tmp_path, {"bootstrap": "target"}, target=Target(every=4))
    resumed.resume()
    assert differing(saved, state(resumed)) == []
    assert saved["target"]["counter"] == 2 and saved["counts"][0] == 6


def test_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert make(tmp_path).resume() is False
    assert make(None).resume() is False


def test_a_step_is_saved_after_its_figures_are_taken(tmp_path: Path) -> None:
    """A kill between report and checkpoint repeats the row; the other order would lose it."""

    def report(row: dict[str, float]) -> None:
        if row["grad_steps"] == 10:
            raise KeyboardInterrupt

    trainer = make(tmp_path)
    trainer.length = Length(grad_steps=12, batch_size=8, report_every=2, checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(report=report, evaluate=lambda _: {}, progress=False)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000005"]


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    take(make(tmp_path), 6)
    file = tmp_path / "step_000005" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"step_000005: ema\.safetensors has .* bytes") as error:
        make(tmp_path).resume()
    assert "\n" not in str(error.value)


def test_checkpoint_of_another_network_is_named(tmp_path: Path) -> None:
    take(make(tmp_path), 6)
    with pytest.raises(CheckpointError, match="step_000005 is of another network") as error:
        make(tmp_path, hidden=8).resume()
    assert "\n" not in str(error.value)


# Not finite


class Poisoned:
    """Draws chains whose states are NaN at one step."""

    def __init__(self, draw: ChainSampler, step: int) -> None:
        self.draw, self.left = draw, step

    def __call__(self, x0: Tensor, *, cond: Tensor | None, generator: torch.Generator) -> TensorDict:
        chain = self.draw(x0, cond=cond, generator=generator)
        if self.left == 0:
            chain["x_t"][0, 0] = math.nan
        self.left -= 1
        return chain


def test_nan_stops_before_the_update_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    sound = unfused(make())
    take(sound, 7)

    trainer = make(tmp_path)
    trainer.objective = Objective("td", trainer.loss, Poisoned(trainer.objective.draw, 7))
    with pytest.raises(NonFiniteLoss, match=r"td: loss nan .* at gradient step 7; .*step_000005") as error:
        take(trainer, 12)
    assert "\n" not in str(error.value) and "optim.lr" in str(error.value)
    assert trainer.step == 7 and all(bool(p.isfinite().all()) for p in trainer.parameters)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000005"]
    assert load_checkpoint(tmp_path / "step_000005").step == 5
    before = {k: v for k, v in state(sound).items() if not k.startswith("counts")}
    assert differing(before, {k: v for k, v in state(trainer).items() if k in before}) == []


def test_a_far_too_large_learning_rate_is_noticed() -> None:
    optim = Optim(lr=1e30, warmup_steps=0, decay="none", clip_norm=None)
    with pytest.raises(NonFiniteLoss, match="last checkpoint: none"):
        take(make(optim=optim), 12)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    take(trainer, 3)
    with torch.no_grad():
        trainer.parameters[0][0] = math.inf
    with pytest.raises(NonFiniteLoss, match="weights that are not finite at gradient step 3"):
        trainer.save()
    assert list_checkpoints(tmp_path) == []


# The parts


def target_and_online(trainer: Trainer) -> tuple[list[Tensor], list[Tensor]]:
    found = trainer.loss.state_dict()
    targets = [k for k in found if k.startswith("target_") and isinstance(found[k], Tensor)]
    assert targets
    return [found[k].clone() for k in targets], [found[k.removeprefix("target_")].clone() for k in targets]


def test_hard_update_copies_each_so_many_steps() -> None:
    trainer = make(loss={"bootstrap": "target"}, target=Target(every=4))
    copied, old = [], target_and_online(trainer)[0]
    for _ in trainer.steps():
        new, online = target_and_online(trainer)
        copied.append(all(map(torch.equal, new, online)))
        assert copied[-1] or all(map(torch.equal, new, old))
        old = new
    assert [i + 1 for i, now in enumerate(copied) if now] == [4, 8, 12]


def test_soft_update_is_its_formula() -> None:
    trainer = make(loss={"bootstrap": "target"}, target=Target(decay=0.8))
    old, _ = target_and_online(trainer)
    for _ in trainer.steps():
        new, online = target_and_online(trainer)
        for before, now, source in zip(old, new, online, strict=True):
            torch.testing.assert_close(now, 0.8 * before + 0.2 * source)
        old = new


def test_learning_rate() -> None:
    optim = Optim(lr=0.4, warmup_steps=4, decay="cosine")
    rates = [optim.lr * optim.factor(step, 12) for step in range(12)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[8] == pytest.approx(0.2)  # half way down
    assert rates[4] == pytest.approx(0.4) and rates[11] == pytest.approx(
        0.2 * (1 + math.cos(math.pi * 7 / 8))
    )
    assert optim.factor(12, 12) == pytest.approx(0.0)
    constant = Optim(lr=0.4, warmup_steps=0, decay="none")
    assert {constant.lr * constant.factor(step, 12) for step in range(12)} == {0.4}
    used = [figures["lr"] for figures in take(make(optim=optim), 12)]
    assert used == pytest.approx(rates)


def test_gradients_are_clipped_to_their_norm() -> None:
    steps = {}
    for clip in (None, 1e-3):
        trainer = make(optim=Optim(lr=1.0, betas=(0.0, 0.0), warmup_steps=0, clip_norm=clip))
        seen: list[float] = []
        trainer.optimiser.algorithm.register_step_pre_hook(
            lambda optimiser, *_, seen=seen: seen.append(
                float(sum(p.grad.square().sum() for g in optimiser.param_groups for p in g["params"]).sqrt())
            )
        )
        reported = take(trainer, 1)[0]["grad_norm"]
        steps[clip] = (reported, seen[0])
    assert steps[None][0] == pytest.approx(steps[None][1], rel=1e-5)
    assert steps[1e-3][0] == pytest.approx(steps[None][0])  # the norm before clipping is what is reported
    assert steps[1e-3][1] == pytest.approx(1e-3, rel=1e-3)


def labelled(num_classes: int = 3) -> Data:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 2, generator=g), torch.arange(300) % num_classes
    return Data("labelled", x[:50], y[:50], x, y, num_classes)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_label_dropout(share: float) -> None:
    trainer = make(data=labelled(), num_classes=3, label_dropout=share)
    labels = torch.cat([labels for step in range(250) if (labels := trainer.batch(step)[1]) is not None])
    assert len(labels) == 2000
    null = (labels == 3).double()
    assert abs(float(null.mean()) - share) <= 4 * math.sqrt(share * (1 - share) / 2000)
    take(trainer, 2)


def test_data_do_not_depend_on_label_dropout_or_objective() -> None:
    a = make(data=labelled(), num_classes=3, label_dropout=0.0)
    b = make(loss={"lmbda": 1.0}, data=labelled(), num_classes=3, label_dropout=1.0)
    for step in range(3):
        assert torch.equal(a.batch(step)[0], b.batch(step)[0])


def test_step_generators_are_independent_streams() -> None:
    numbers = torch.stack(
        [torch.randn(1000, generator=step_generator(seed, step)) for seed in (0, 1) for step in range(4)]
    )
    correlation = np.corrcoef(numbers.numpy()) - np.eye(8)
    assert np.abs(correlation).max() < 5 / math.sqrt(1000)
    assert torch.equal(
        torch.rand(3, generator=step_generator(7, 5)), torch.rand(3, generator=step_generator(7, 5))
    )


class Replay(nn.Module):
    """Gives back one recorded output, whatever it is asked."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Tensor | None) -> Tensor:
        return self.output


def test_bfloat16_is_the_networks_alone() -> None:
    trainer = make(autocast=torch.bfloat16)
    outputs: list[Tensor] = []
    trainer.denoiser.network.register_forward_hook(lambda *hooked: outputs.append(hooked[-1].detach()))
    x0, labels, generator = trainer.batch(0)
    chain = trainer.objective.draw(x0, cond=labels, generator=generator)
    with trainer.precision():
        loss = trainer.loss(chain)["loss_value"]
    assert outputs[0].dtype == torch.bfloat16 and loss.dtype == torch.float32

    # the same network output, and no autocast: if value arithmetic was float32, nothing changes
    trainer.denoiser.network = Replay(outputs[0])
    assert torch.equal(trainer.loss(chain)["loss_value"], loss)

    trainer = make(autocast=torch.bfloat16)
    figures = take(trainer, 12)
    assert all(math.isfinite(step["loss_value"]) for step in figures)
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    assert figures[-1]["loss_value"] == pytest.approx(take(make(), 12)[-1]["loss_value"], rel=0.05)


def test_float64() -> None:
    trainer = make(dtype=torch.float64)
    x0, labels, generator = trainer.batch(0)
    assert trainer.objective.draw(x0, cond=labels, generator=generator)["x_t"].dtype == torch.float64
    take(trainer, 12)
    assert {p.dtype for p in trainer.parameters} == {torch.float64}
    assert {p.dtype for p in trainer.ema.module.parameters()} == {torch.float64}


def test_figures_count_data_and_states(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    trainer = make()
    trainer.length = Length(grad_steps=12, batch_size=8, report_every=5, eval_every=6)
    assert trainer.fit(report=rows.append, evaluate=lambda t: {"value_error_1": 1.0}, progress=False)
    assert [row["grad_steps"] for row in rows] == [0, 5, 6, 10, 12]
    assert [row["grad_steps"] for row in rows if "value_error_1" in row] == [0, 6, 12]
    assert rows[-1]["samples"] == 12 * 8 and rows[-1]["network_evaluations"] == 12 * 8 * 5
    assert trainer.ema.samples == 12 * 8  # its half-life is counted in data
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[-1] > 0


def test_asked_to_stop_it_saves_and_says_that_it_did_not_end(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    ended = trainer.fit(
        report=lambda _: None, evaluate=lambda _: {}, stop=lambda: trainer.step == 7, progress=False
    )
    assert not ended and [path.name for path in list_checkpoints(tmp_path)] == ["step_000005", "step_000007"]
    resumed = make(tmp_path)
    resumed.resume()
    assert resumed.fit(report=lambda _: None, evaluate=lambda _: {}, progress=False)
    whole = make()
    take(whole, 12)
    assert differing(state(whole), state(resumed)) == []


def test_progress_bar_names_loss_value_error_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make()
    trainer.fit(report=lambda _: None, evaluate=lambda _: {"value_error_1": 0.25, "value_error_3": 0.75})
    shown = capsys.readouterr().err
    assert "td: 100%" in shown and "value error 0.5," in shown and "samples/s" in shown and "loss" in shown


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        (Optim, {"lr": 0.0}),
        (Optim, {"lr": math.nan}),
        (Optim, {"betas": (0.9,)}),
        (Optim, {"betas": (0.9, 1.0)}),
        (Optim, {"warmup_steps": -1}),
        (Optim, {"decay": "linear"}),
        (Optim, {"clip_norm": 0.0}),
        (Target, {"decay": 1.5}),
        (Target, {"every": 0}),
        (Length, {"grad_steps": 0}),
        (Length, {"batch_size": 0}),
        (Length, {"report_every": 0}),
        (Length, {"eval_every": -1}),
        (Length, {"checkpoint_every": 0}),
        (Length, {"keep_checkpoints": 0}),
        (Length, {"label_dropout": 1.1}),
    ],
)
def test_numbers_out_of_range_are_named(part: type, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))) as error:
        part(**wrong)
    assert "\n" not in str(error.value)


def test_fewer_data_than_a_batch_is_refused_before_training() -> None:
    few = Data("few", torch.randn(4, 2), train=torch.randn(5, 2))
    with pytest.raises(DataError, match="batch_size 8 > 5"):
        make(data=few)
