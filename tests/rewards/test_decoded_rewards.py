"""Rewards of decoded images: what they are shown, what is counted, what is refused."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.decoded import DecodedReward, LatentDecoder
from diffrl.rewards.weighted_sum import WeightedSum
from tests.kit.oracles import generator
from tests.kit.pipeline_policies import EACH, SHAPE, P
from tests.kit.pipelines import PROMPTS, stable_diffusion
from tests.kit.pipelines import stable_diffusion_3 as sd3


def test_latents_are_decoded_as_the_pipeline_decodes_them() -> None:
    for pipe in (stable_diffusion(), sd3()):
        images = pipe(PROMPTS, num_inference_steps=2, generator=generator(), output_type="pt").images
        z = pipe(PROMPTS, num_inference_steps=2, generator=generator(), output_type="latent").images
        decoded = LatentDecoder(pipe.vae)(z)
        assert decoded.shape == (P, 3, 16, 16) and decoded.dtype == torch.float32
        torch.testing.assert_close((decoded + 1) / 2, images, rtol=1e-4, atol=1e-4)


def test_a_half_precision_autoencoder_gives_float32_images() -> None:
    decoded = LatentDecoder(stable_diffusion().to(torch.bfloat16).vae)(10 * torch.ones(2, *SHAPE))
    assert decoded.dtype == torch.float32 and -1 <= float(decoded.min()) <= float(decoded.max()) <= 1


def doubled(z: Tensor) -> Tensor:
    return 2 * z


class Watcher:
    """A reward that keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Sequence[str] | Tensor]] = []

    def __call__(self, images: Tensor, prompts: Sequence[str] | Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.seen.append((images, prompts))
        return images.flatten(1).mean(1)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_reward_gets_its_images_and_prompts(batch_size: int) -> None:
    watcher, sizes = Watcher(), []

    def decode(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return 2 * z

    reward = DecodedReward(watcher, decode, PROMPTS, batch_size)
    z = torch.randn(5, 2, requires_grad=True)
    rewards = reward(z, torch.tensor([[2], [0], [1], [1], [2]]))
    ((images, prompts),) = watcher.seen
    assert torch.equal(images, 2 * z) and torch.equal(rewards, 2 * z.mean(1))
    assert prompts == ["red", "a cat", "two dogs", "two dogs", "red"]
    assert max(sizes) == min(batch_size, 5) and sum(sizes) == 5


def test_queries_of_decoded_rewards_are_counted_once_and_remembered() -> None:
    watcher = Watcher()
    box = BlackBox(DecodedReward(watcher, doubled, PROMPTS))
    assert box.name == "Watcher"
    z, cond = torch.randn(3, *SHAPE), torch.tensor([0, 1, 1])
    first = box(z, cond)
    torch.testing.assert_close(box(z, cond), first)
    assert box.queries == 3 and box.cache_hits == 3 and len(watcher.seen) == 1
    box(z, torch.tensor([0, 1, 2]))  # another prompt is another question
    assert box.queries == 4


def test_conditions_pass_where_no_prompts_are_given_and_one_prompt_needs_none() -> None:
    watcher, cond = Watcher(), torch.tensor([7])
    DecodedReward(watcher, doubled)(torch.zeros(1, 2), cond)
    DecodedReward(watcher, doubled, ["a cat"])(torch.zeros(2, 2))
    assert watcher.seen[0][1] is cond and watcher.seen[1][1] == ["a cat", "a cat"]


def test_a_sum_of_rewards_decodes_inside() -> None:
    parts = {name: (DecodedReward(Watcher(), doubled, PROMPTS), 0.5) for name in "ab"}
    total = WeightedSum(parts, normalise="running")
    assert total(torch.randn(3, 2), EACH).shape == (3,)
    with pytest.raises(ValueError, match="decode inside the sum"):
        DecodedReward(total, doubled, PROMPTS)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: DecodedReward(None, doubled), TypeError, "must be callables"),
        (lambda: DecodedReward(Watcher(), doubled, "a cat"), TypeError, "the string 'a cat'"),
        (lambda: DecodedReward(Watcher(), doubled, batch_size=0), ValueError, "batch_size is 0"),
        (
            lambda: DecodedReward(Watcher(), doubled, PROMPTS)(torch.zeros(2, 2)),
            ValueError,
            "number the 3 prompts",
        ),
        (
            lambda: DecodedReward(Watcher(), doubled, PROMPTS)(torch.zeros(1, 2), torch.tensor([-1])),
            ValueError,
            r"numbered 0\.\.2, not \[-1\]",
        ),
        (
            lambda: DecodedReward(Watcher(), lambda z: z[:1])(torch.zeros(2, 2)),
            ValueError,
            "1 images for 2 latents",
        ),
    ],
)
def test_a_bad_decoded_reward_is_named(
    wrong: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        wrong()
