"""A denoiser that is told the number of steps: it begins as the one it is made of, and learns them apart."""

import copy

import pytest
import torch
from torch import nn

import diffrl
from diffrl.diffusion.guidance import GuidedDenoiser
from diffrl.diffusion.step_counts import StepConditioned
from diffrl.errors import InputError, InputTypeError
from diffrl.finetuning.policy import DenoisingPolicy

X, T = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 0.9, 5)


def mlp(num_classes: int = 0) -> diffrl.Denoiser:
    torch.manual_seed(0)
    network = diffrl.networks.MLP((2,), num_classes=num_classes, hidden=16, depth=2)
    nn.init.normal_(network.last.weight)  # zeros at first, behind which nothing could be seen
    return diffrl.Denoiser(network, diffrl.Flow())


def test_it_begins_as_the_denoiser_that_it_is_made_of() -> None:
    plain = mlp()
    several = StepConditioned(plain, [1, 2, 4])
    for K in (1, 2, 4):
        assert torch.equal(several(X, T, num_steps=K), plain(X, T)) and torch.equal(
            several.at(K)(X, T), plain(X, T)
        )
    with torch.no_grad():
        several.embedding[1] = 0.5
    assert torch.equal(several(X, T, num_steps=4), plain(X, T)) and not torch.equal(
        several.at(2)(X, T), plain(X, T)
    )
    with torch.no_grad():
        plain.network.first.bias.add_(0.5)  # what the row of K = 2 comes to
    torch.testing.assert_close(several.at(2)(X, T), plain(X, T))


def test_copies_are_told_by_themselves() -> None:
    first = StepConditioned(mlp(), [1, 2])
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.embedding.add_(1.0)
    assert torch.equal(first.at(1)(X, T), mlp()(X, T)) and not torch.equal(
        second.at(1)(X, T), first.at(1)(X, T)
    )
    like = second.like(mlp())
    assert like.step_counts == (1, 2) and torch.equal(like.at(2)(X, T), mlp()(X, T))


def test_only_the_row_of_the_steps_taken_gets_a_gradient() -> None:
    several = StepConditioned(mlp(), [1, 2, 4])
    several(X, T, num_steps=2).square().sum().backward()
    grad = several.embedding.grad
    assert grad is not None and bool(grad[1].abs().sum() > 0) and not grad[[0, 2]].any()


def test_a_policy_tells_its_number_of_steps() -> None:
    several = StepConditioned(mlp(), [1, 4])
    with torch.no_grad():
        several.embedding[0] = 1.0
    policy = DenoisingPolicy(several, diffrl.DDIM(), num_steps=4, reduction="mean")
    torch.testing.assert_close(policy.denoise(X, T), several.at(4)(X, T))
    policy.num_steps = 1
    torch.testing.assert_close(policy.denoise(X, T), several.at(1)(X, T))
    assert policy.grid.tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match=r"num_steps is 2, but the denoiser knows \[1, 4\] steps"):
        policy.num_steps = 2
    with pytest.raises(InputError, match=r"num_steps is 3: this denoiser knows \[1, 4\]"):
        several(X, T, num_steps=3)
    assert policy.num_steps == 1


def test_labels_guidance_and_images_go_with_it() -> None:
    labelled = mlp(num_classes=3)
    several = StepConditioned(labelled, [1, 2])
    cond = torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(several.at(2)(X, T, cond), labelled(X, T, cond))
    assert torch.equal(several.null_condition(cond), torch.full_like(cond, 3))
    assert several.evaluations == 1 and several.process is several.at(1).process
    guided = StepConditioned(GuidedDenoiser(labelled, 3, 2.0), [1])
    assert guided.evaluations == 2
    unet = diffrl.Denoiser(diffrl.networks.UNet((1, 8, 8), channels=8), diffrl.EDM())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(StepConditioned(unet, [3]).at(3)(x, torch.ones(2)), unet(x, torch.ones(2)))


def test_samplers_take_it_at_one_number_of_steps() -> None:
    plain = mlp()
    view = StepConditioned(plain, [2]).at(2)
    drawn = (diffrl.sample(d, (6, 2), sampler=diffrl.DDIM(), num_steps=2, seed=1) for d in (plain, view))
    assert torch.equal(*drawn)


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(InputError, match=r"step_counts is \[2, 2\]: give different numbers"):
        StepConditioned(mlp(), [2, 2])
    with pytest.raises(InputError, match="step_counts"):
        StepConditioned(mlp(), [0])
    with pytest.raises(
        InputError, match=r"0 linear layers .* ends in nowhere: give layer, one of network.first"
    ):
        StepConditioned(mlp(), [1], "nowhere")

    class Adapters(nn.Module):
        def trainable_state(self) -> None: ...

    with pytest.raises(InputTypeError, match="told its number of steps already"):
        StepConditioned(StepConditioned(mlp(), [1]), [1])
    with pytest.raises(InputTypeError, match="step_counts is 4: give a list"):
        StepConditioned(mlp(), 4)
    with pytest.raises(InputTypeError, match="Adapters trains adapters"):
        StepConditioned(Adapters(), [1])
