"""The hard decision of a classifier is its argmax, as 0 and 1, and has no gradient."""

import pytest
import torch
from torch import Tensor, nn

from diffrl.data.files import digits
from diffrl.diffusion.networks.digits_cnn import load_digits_cnn
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.class_decision import ClassDecision
from diffrl.rewards.class_probability import ClassProbability

IMAGES = digits().test


def test_it_is_one_where_no_other_class_has_a_larger_logit() -> None:
    with torch.no_grad():
        logits = load_digits_cnn()(IMAGES).tolist()
    for target in (0, 7, 9):
        expected = [float(all(row[target] >= other for other in row)) for row in logits]
        found = ClassDecision(target)(IMAGES)
        assert found.tolist() == expected and 0 < sum(expected) < len(expected)


def test_every_sample_is_of_one_class() -> None:
    assert torch.stack([ClassDecision(y)(IMAGES) for y in range(10)]).sum(0).eq(1).all()


def test_more_than_half_the_probability_is_a_yes_and_less_than_a_tenth_a_no() -> None:
    p, decision = ClassProbability(7)(IMAGES), ClassDecision(7)(IMAGES)
    assert decision[p > 0.5].eq(1).all() and decision[p < 0.1].eq(0).all()


def test_it_has_no_gradient() -> None:
    x = IMAGES[:4].clone().requires_grad_()
    assert not ClassDecision(7)(x).requires_grad
    assert ClassProbability(7)(x).requires_grad  # its soft neighbour has one


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-x, x], 1)


def test_a_classifier_of_ones_own_and_what_it_does_not_know() -> None:
    x = torch.tensor([[-2.0], [3.0]])
    assert ClassDecision(1, Sign())(x).tolist() == [0, 1]
    assert ClassDecision(0, Sign())(x[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"classes 0\.\.1, not 2"):
        ClassDecision(2, Sign())(x)
    with pytest.raises(ValueError, match="target is -1"):
        ClassDecision(-1)


def test_it_answers_in_float32_whatever_the_samples_are() -> None:
    answer = BlackBox(ClassDecision(7))(IMAGES[:5].double())
    assert answer.tolist() == ClassDecision(7)(IMAGES[:5]).tolist()
