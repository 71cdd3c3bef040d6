"""The rewards that come with the library, against plain computations, and in the order that they should keep."""

import io
import pickle
import time
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffrl.data.files import digits
from diffrl.data.synthetic import rings
from diffrl.diffusion.networks.digits_cnn import load_digits_cnn
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.calls import RewardError
from diffrl.rewards.class_probability import ClassProbability
from diffrl.rewards.compressibility import JpegCompressibility, ZlibCompressibility
from diffrl.rewards.faulty import Faulty
from diffrl.rewards.mode_distance import ModeDistance
from diffrl.rewards.pixels import Brightness, Ink, Symmetry
from diffrl.rewards.registry import REWARDS
from diffrl.rewards.weighted_sum import nondeterminism
from tests.kit.oracles import randn

IMAGES = digits().test[:6]
EXACT = load_digits_cnn().double()
ARGUMENTS: dict[str, dict[str, Any]] = {
    "class_decision": {"target": 0},
    "class_neighbours": {"target": 3},
    "class_probability": {"target": 3},
    "mode_distance": {"point": [0.25] * 64},
    "faulty": {"calls": 0},
}
OF_PROMPTS = {"geneval", "ocr"}  # they judge an image for its prompt, and have tests of their own


@pytest.mark.parametrize("name", sorted(set(REWARDS) - OF_PROMPTS))
def test_every_reward_is_deterministic_serves_each_sample_alone_and_can_be_sent(name: str) -> None:
    reward = REWARDS[name](**ARGUMENTS.get(name, {}))
    before = IMAGES.clone()
    rewards = BlackBox(reward)(IMAGES)
    assert rewards.shape == (6,) and len(rewards.unique()) > 1
    assert IMAGES.equal(before)
    assert nondeterminism(reward, IMAGES) == 0
    torch.testing.assert_close(BlackBox(reward, batch_size=1)(IMAGES), rewards)
    torch.testing.assert_close(BlackBox(reward)(IMAGES.flip(0)), rewards.flip(0))
    torch.testing.assert_close(BlackBox(pickle.loads(pickle.dumps(reward)))(IMAGES), rewards, rtol=0, atol=0)
    assert BlackBox(reward)(IMAGES[:0]).shape == (0,)


# Classes


def test_class_probability_is_the_softmax_of_the_classifier() -> None:
    with torch.no_grad():
        logits = load_digits_cnn()(IMAGES).double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for y in range(10):
        np.testing.assert_allclose(ClassProbability(y)(IMAGES).numpy(), p[:, y], rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(
            ClassProbability(y, log=True)(IMAGES).numpy(), np.log(p[:, y]), rtol=1e-5, atol=1e-5
        )
    labels = torch.tensor([3, 1, 4, 1, 5, 9])
    expected = p[np.arange(6), labels.numpy()]
    for cond in (labels, labels[:, None], labels.int()):
        np.testing.assert_allclose(ClassProbability()(IMAGES, cond).numpy(), expected, rtol=1e-5)
    assert ClassProbability(3)(IMAGES, labels).equal(ClassProbability(3)(IMAGES))  # a target wins over labels


def test_test_digits_are_known_by_their_class() -> None:
    data = digits(conditional=True)
    assert data.test_labels is not None
    own = ClassProbability()(data.test, data.test_labels)
    other = ClassProbability()(data.test, (data.test_labels + 1) % 10)
    assert float(own.mean()) > 0.9 and float(other.mean()) < 0.02


def test_class_probability_of_a_classifier_of_the_user() -> None:
    classifier = nn.Linear(2, 3).double()
    x0 = randn(4, 2)
    expected = classifier(x0).softmax(1)[:, 2]
    torch.testing.assert_close(ClassProbability(2, classifier=classifier)(x0), expected)


def test_classes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="target is -1"):
        ClassProbability(-1)
    with pytest.raises(ValueError, match=r"classes 0..9, not all of \[10\]"):
        ClassProbability(10)(IMAGES)
    for cond in (None, torch.zeros(6), torch.zeros(5, dtype=torch.long)):
        with pytest.raises(ValueError, match="give target, or labels"):
            ClassProbability()(IMAGES, cond)
    with pytest.raises(RewardError, match=r"ClassProbability.*digits_cnn takes images"):
        BlackBox(ClassProbability(3))(randn(2, 2))


# Points


def test_mode_distance() -> None:
    x0 = randn(5, 2)
    mixture = rings(modes=6).mixture
    assert mixture is not None
    for index in range(6):
        mu = mixture.means[index].tolist()
        expected = torch.tensor(
            [-((x - mu[0]) ** 2) - (y - mu[1]) ** 2 for x, y in x0.tolist()], dtype=torch.float64
        )
        torch.testing.assert_close(ModeDistance(point=mu)(x0), expected)
        torch.testing.assert_close(ModeDistance(index=index, mixture=mixture)(x0), expected)
        best = ModeDistance(index=index, mixture=mixture)(mixture.means)
        assert int(best.argmax()) == index and float(best[index]) == 0
    image = torch.arange(4.0).view(1, 1, 2, 2)
    assert ModeDistance(point=(0, 1, 2, 3))(image).tolist() == [0]
    assert ModeDistance(point=(0, 1, 2, 5))(image).tolist() == [-4]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"index": 0},
        {"mixture": rings().mixture},
        {"point": [0, 0], "index": 0},
        {"point": [0, 0], "mixture": rings().mixture},
        {"point": [0, 0], "index": 0, "mixture": rings().mixture},
        {"index": 8, "mixture": rings().mixture},
        {"index": -1, "mixture": rings().mixture},
    ],
)
def test_mode_distances_without_a_point_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a point, or index and mixture|has 8 modes"):
        ModeDistance(**arguments)


def test_a_point_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="the point has 3 numbers, but a sample has 2"):
        ModeDistance(point=[0, 0, 0])(randn(4, 2))


# Images


def test_brightness_and_ink() -> None:
    black, white = torch.full((1, 1, 8, 8), -1.0), torch.full((1, 1, 8, 8), 1.0)
    half = torch.cat([black[..., :4], white[..., :4]], dim=3)
    x0 = torch.cat([black, half, white, 100 * white])  # what lies outside the range gains nothing
    for reward in (Brightness(), Ink(), Ink(0.9)):
        assert reward(x0).tolist() == [0, 0.5, 1, 1]
    ramp = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    assert float(Brightness()(ramp)) == pytest.approx(0.5, abs=1e-6)
    assert float(Ink(0.5)(ramp)) == 16 / 64
    assert float(Ink(0.5)(torch.full((1, 1, 8, 8), 0.5))) == 0
    with pytest.raises(ValueError, match="threshold is 1"):
        Ink(1.0)


def test_symmetry() -> None:
    x = randn(5, 3, 8, 7)
    mirrored = torch.cat([x, x.flip(-1)], dim=3)
    upright = torch.cat([x, x.flip(-2)], dim=2)
    assert Symmetry()(mirrored).tolist() == [0] * 5
    assert bool((Symmetry()(upright) < -0.1).all())
    torch.testing.assert_close(Symmetry()(x.flip(-1)), Symmetry()(x))
    pair = torch.tensor([[[[0.5, -0.25]]]])
    assert float(Symmetry()(pair)) == pytest.approx(-(0.75**2))


@pytest.mark.parametrize("reward", [ZlibCompressibility(), JpegCompressibility()])
@pytest.mark.parametrize("channels", [1, 3])
def test_compressibility_falls_with_what_an_image_holds(reward: Any, channels: int) -> None:
    noise = randn(1, channels, 32, 32).clamp(-1, 1)
    x0 = torch.cat([strength * noise for strength in (0.0, 0.05, 0.2, 1.0)])
    rewards = reward(x0)
    assert rewards == sorted(rewards, reverse=True) and len(set(rewards)) == 4 and rewards[0] < 0


def test_sizes_are_those_of_files() -> None:
    x0 = randn(2, 3, 16, 12).clamp(-1, 1)
    pixels = np.round((x0.numpy().astype(np.float32) + 1) * 127.5).astype(np.uint8)
    for image, by_zlib, by_jpeg in zip(
        pixels, ZlibCompressibility()(x0), JpegCompressibility(60)(x0), strict=True
    ):
        interleaved = np.stack(list(image), axis=-1)
        assert by_zlib == -len(zlib.compress(interleaved.tobytes(), 9))
        file = io.BytesIO()
        Image.fromarray(interleaved).save(file, "JPEG", quality=60)
        assert by_jpeg == -len(file.getvalue())
    assert min(JpegCompressibility(95)(x0)) < min(JpegCompressibility(20)(x0))
    torch.testing.assert_close(ZlibCompressibility()(3 * x0.sign()), ZlibCompressibility()(x0.sign()))


@pytest.mark.parametrize("reward", [Symmetry(), ZlibCompressibility(), JpegCompressibility()])
def test_points_are_no_images(reward: Any) -> None:
    with pytest.raises(ValueError, match=r"for images \[N, C, H, W\]"):
        reward(randn(4, 2))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="level is 0"):
        ZlibCompressibility(0)
    with pytest.raises(ValueError, match="quality is 100"):
        JpegCompressibility(100)
    with pytest.raises(ValueError, match="2 channels"):
        JpegCompressibility()(randn(1, 2, 8, 8))


# Gradients, for methods that use them


@pytest.mark.parametrize(
    "reward",
    [
        ClassProbability(3, classifier=EXACT),
        ClassProbability(3, log=True, classifier=EXACT),
        ModeDistance([0.0] * 64),
        Brightness(),
        Symmetry(),
    ],
)
def test_smooth_rewards_have_gradients_of_finite_differences(reward: Any) -> None:
    x0 = (0.3 * randn(2, 1, 8, 8)).clamp(-0.9, 0.9).requires_grad_()
    direction = randn(2, 1, 8, 8, seed=1)
    (gradient,) = torch.autograd.grad(reward(x0).sum(), x0)
    h = 1e-6
    with torch.no_grad():
        difference = (reward(x0 + h * direction) - reward(x0 - h * direction)).sum() / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-8)


# Failing on purpose


def test_faulty() -> None:
    x0 = IMAGES[:2]
    numbers = x0.flatten(1).double().mean(1).tolist()
    assert Faulty("none")(x0) == [None, numbers[1]]
    assert Faulty("nan")(x0)[1] == numbers[1] and np.isnan(Faulty("nan")(x0)[0])
    assert Faulty("inf")(x0)[0] == np.inf
    assert Faulty("shape")(x0) == [[number] for number in numbers]
    once = Faulty("exception", calls=1)
    with pytest.raises(RuntimeError, match="faulty"):
        once(x0)
    assert once(x0) == numbers
    start = time.monotonic()
    assert Faulty("hang", seconds=0.05)(x0) == numbers and time.monotonic() - start >= 0.05
    with pytest.raises(ValueError, match="kind is 'zero'"):
        Faulty("zero")
    with pytest.raises(RewardError, match="longer than 0.05 s"):
        BlackBox(Faulty("hang", seconds=0.5), workers=1, timeout=0.05)(x0)
