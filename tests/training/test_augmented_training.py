"""Training with augmentation: the network is told what was done, and asked about images as they are."""

from pathlib import Path

import numpy as np
import pytest
import torch

import diffrl
from diffrl.data.augmentation import augment
from diffrl.diffusion.networks.inputs import joined_labels, split_labels
from diffrl.diffusion.networks.unet import UNet
from diffrl.errors import InputError
from diffrl.experiments.train import TrainingJob, run_experiment
from diffrl.training.build import build_data
from tests.kit.configs import small

WORDS = (
    "network=unet",
    "network.channels=4",
    "network.augment_dim=9",
    "trainer.augment=0.5",
    "compare=false",
)


@pytest.fixture
def images(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (60, 4, 4), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "images.npz", x=pixels, labels=labels)
    return f"data.path={tmp_path / 'images.npz'}"


def unet(num_classes: int, augment_dim: int, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet((1, 4, 4), num_classes, channels=4, augment_dim=augment_dim).double()


@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_network_that_is_told_nothing_is_the_one_without_a_place_for_it(num_classes: int) -> None:
    x, c = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0]) if num_classes else None
    plain, told = unet(num_classes, 0), unet(num_classes, 9)
    for weight in plain.parameters():
        torch.nn.init.normal_(weight)  # no convolution is 0
    told.load_state_dict(plain.state_dict(), strict=False)  # only the new weights differ
    zeros = joined_labels(labels, torch.zeros(5, 9, dtype=torch.float64))
    assert zeros.shape == (5, 9 + (num_classes > 0))
    expected = plain(x, c, labels)
    assert torch.equal(told(x, c, labels), expected) and torch.equal(told(x, c, zeros), expected)
    for i in range(9):  # each label reaches the output, of its own row
        one = torch.zeros(5, 9, dtype=torch.float64)
        one[3, i] = 1
        changed = (told(x, c, joined_labels(labels, one)) != expected).flatten(1).any(1)
        assert changed.tolist() == [False, False, False, True, False]


def test_first_weights_are_those_without_a_place_for_labels() -> None:
    plain, told = unet(0, 0, seed=4), unet(0, 9, seed=4)
    assert {*told.state_dict()} - {*plain.state_dict()} == {"augment_embedding.weight"}
    assert all(torch.equal(w, told.state_dict()[name]) for name, w in plain.state_dict().items())


def test_labels_come_back_as_they_were_put_together() -> None:
    labels, a = torch.tensor([0, 999_999, 7]), torch.randn(3, 9)
    found, augmentation = split_labels(joined_labels(labels, a), 1_000_000, 9)
    assert found is not None and torch.equal(found, labels) and found.dtype == torch.int64
    assert augmentation is not None and torch.equal(augmentation, a)
    assert split_labels(joined_labels(None, a), 0, 9)[0] is None
    assert split_labels(labels, 1_000_000, 9) == (labels, None) and split_labels(None, 0, 9) == (None, None)
    with pytest.raises(
        InputError, match=r"cond has shape \[3, 9\]: for 4 classes and augment_dim=9 give \[N, 10\]"
    ):
        split_labels(a, 4, 9)


@pytest.mark.parametrize("conditional", ["true", "false"])
def test_batches_are_augmented_and_say_so(images: str, conditional: str) -> None:
    words = ("data=npz", images, f"data.conditional={conditional}", "trainer.label_dropout=0.5")
    config = small(*words, *WORDS)
    job = TrainingJob(config, build_data(config), "td")
    plain = TrainingJob({**config, "trainer": {**config["trainer"], "augment": 0.0}}, job.data, "td")
    x0, cond, _ = job.trainer.batch(3)
    x, labels, generator = plain.trainer.batch(3)
    expected, done = augment(x, 0.5, generator)  # the stream goes on where the labels were dropped
    assert torch.equal(x0, expected) and not torch.equal(x0, x)
    assert cond is not None and torch.equal(cond, joined_labels(labels, done))
    again = job.trainer.batch(3)[0]
    assert torch.equal(again, x0) and not torch.equal(job.trainer.batch(4)[0], x0)
    assert job.trainer.facts["trainer.augment"] == 0.5 and "trainer.augment" not in plain.trainer.facts


def test_a_run_with_augmentation_is_evaluated_and_sampled_without(images: str, tmp_path: Path) -> None:
    words = ("data=npz", images, "data.conditional=true", f"run_dir={tmp_path / 'run'}")
    folder = run_experiment(small(*words, *WORDS), progress=False)
    figures = folder.results()["objectives"]["td"]
    assert figures["grad_steps"] > 0 and all(error > 0 for error in figures["denoising_error"].values())
    loaded = diffrl.load(folder.path)
    assert loaded.sample(3, num_steps=2).shape == (3, 1, 4, 4)
    weight = loaded.denoiser.network.get_submodule("augment_embedding").weight
    assert bool((weight != 0).any())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("network.augment_dim=0",), r"network=unet network.augment_dim=9"),
        (("network.augment_dim=3",), r"network=unet network.augment_dim=9"),
        (("chain.x0=reference",), r"no rows of the data: set chain.x0=datum"),
        (("chain.x0=exact",), r"no rows of the data: set chain.x0=datum"),
        (("trainer.augment=1.5",), r"trainer.augment is 1.5: it is a share in \[0, 1\]"),
        (
            ("objective=cd", "objective.teacher=exact", "denoiser.prediction_type=consistency"),
            r"a teacher that was trained with it",
        ),
        (
            ("process=edm", "objective=ect", "objective.transition=reference"),
            r"no rows of the data: set objective.transition=forward",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(images: str, words: tuple[str, ...], message: str) -> None:
    config = small("data=npz", images, *WORDS, *words)
    with pytest.raises(InputError, match=message) as error:
        TrainingJob(config, build_data(config), config["objective"]["name"])
    assert "\n" not in str(error.value)


def test_points_are_not_augmented(images: str) -> None:
    config = small("trainer.augment=0.5", "compare=false")
    with pytest.raises(
        InputError, match=r"trainer.augment is for images \(C, H, W\), not for samples of \(2,\)"
    ):
        TrainingJob(config, build_data(config), "td")
