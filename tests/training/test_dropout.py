"""Dropout is drawn from the step's generator: the same in every run, after resuming too, and the global one stays."""

from pathlib import Path

import torch

from diffrl import EDM, Denoiser
from diffrl.data.synthetic import rings
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.networks.unet import UNet
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.objectives import ValueLoss
from diffrl.objectives.ect import ECTLoss
from diffrl.objectives.ect_pairs import ECTPairs
from diffrl.objectives.scheme import Objective
from diffrl.training.dropout import has_dropout
from diffrl.training.optim import Optim
from diffrl.training.trainer import Average, Length, Target, Trainer
from tests.kit.networks import Net
from tests.kit.trainers import differing, state, take


def trainer(folder: Path | None = None, objective: str = "ect", dropout: float = 0.5) -> Trainer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        denoiser = Denoiser(Net(dropout=dropout), EDM())
    made = {
        "ect": lambda: Objective("ect", ECTLoss(denoiser), ECTPairs(denoiser.process, stages=3)),
        "td": lambda: Objective(
            "td", ValueLoss(denoiser), ChainSampler(Chain(denoiser.process, num_steps=5, coupling="markov"))
        ),
    }[objective]()
    length = Length(12, batch_size=8, checkpoint_every=5)
    options = {"optim": Optim(1e-3, warmup_steps=0, name="radam"), "average": Average(), "target": Target()}
    return Trainer(made, rings(test_size=16), seed=0, folder=folder, length=length, **options)


def test_resuming_changes_no_bit(tmp_path: Path) -> None:
    for objective in ("ect", "td"):
        folder = tmp_path / objective
        torch.manual_seed(0)
        whole = trainer(objective=objective)
        figures = take(whole, 13)
        torch.manual_seed(1)
        take(trainer(folder, objective), 7)
        before = torch.get_rng_state()
        resumed = trainer(folder, objective)
        assert resumed.resume() and take(resumed, 13) == figures[5:]
        assert torch.equal(torch.get_rng_state(), before)
        assert differing(state(whole), state(resumed)) == []


def test_it_drops_something() -> None:
    assert take(trainer(dropout=0.5), 2) != take(trainer(dropout=0.0), 2)
    assert has_dropout(Net(dropout=0.5)) and not has_dropout(Net())


def test_of_a_unet() -> None:
    """In training only, of another kind each time; none changes nothing, and none has other weights."""
    made = []
    for dropout in (0.0, 0.4):
        torch.manual_seed(0)
        made.append(UNet((1, 8, 8), channels=4, dropout=dropout))
        for p in made[-1].parameters():
            torch.nn.init.normal_(p, std=0.2)
    plain, dropping = made
    dropping.load_state_dict(plain.state_dict())
    x, c = torch.randn(3, 1, 8, 8), torch.zeros(3)
    assert torch.equal(plain(x, c), plain.eval()(x, c)) and torch.equal(plain(x, c), dropping.eval()(x, c))
    assert not torch.equal(dropping.train()(x, c), dropping(x, c))
    assert dropping.options["dropout"] == 0.4 and has_dropout(dropping) and not has_dropout(plain)
