"""What kind of network a run has by then: sizes of weights and features, how many directions features span."""

from typing import Any

import torch
from torch import Tensor, nn

from stall.ground import Learner, Run, train

EVERY, LAST = 50, 1000


def directions(h: Tensor) -> float:
    """Participation ratio of features [N, H]: (Σ s²)²/Σ s⁴ of the singular values about the mean."""
    s = torch.linalg.svdvals(h - h.mean(0)).square()
    return float(s.sum().square() / s.square().sum())


def readout_error(learner: Learner, inputs: list[Tensor]) -> float:
    """Error of the best last layer: least squares from features to the exact output, on half of the points."""
    ground = learner.ground
    (x, t), h = ground.test, torch.cat([inputs[0], torch.ones(len(inputs[0]), 1)], 1)
    c_skip, c_out, _ = (c[:, None] for c in learner.denoiser.scalings(t))
    F = (ground.truth - c_skip * x) / c_out
    fit = torch.arange(len(h)) % 2 == 0
    last = torch.linalg.lstsq(h[fit].double(), F[fit].double(), driver="gelsd").solution.float()
    square = (h @ last - F).square().sum(1)
    levels = (square * ~fit).view(len(ground.t), -1).sum(1) / (~fit).view(len(ground.t), -1).sum(1)
    return ground.figure(levels)


@torch.no_grad()
def state(learner: Learner, k: int) -> dict[str, Any]:
    """Norms of all weight matrices; of the features before the last layer: size and directions; how stiff units are.

    ``fixed`` is, for each hidden layer, the share of units whose input has one sign on 99 % of all states: they are a
    linear map or nothing. ``offset`` is the median over units of |mean|/std of that input.
    """
    ground, net = learner.ground, learner.denoiser.network
    kept: list[Tensor] = []
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    hooks = [
        m.register_forward_hook(lambda module, inputs, out: kept.extend((inputs[0], out))) for m in linear
    ]
    errors = ground.errors(learner.denoiser)
    for hook in hooks:
        hook.remove()
    inputs, before = kept[::2], kept[1::2][:-1]
    positive = [(z > 0).float().mean(0) for z in before]
    h = inputs[-1]
    return {
        "step": k,
        "error": ground.figure(errors),
        "norms": [float(layer.weight.norm()) for layer in linear],
        "size": float(h.square().mean().sqrt()),
        "directions": directions(h[:: max(1, len(h) // 2000)]),
        "fixed": [float(((p < 0.01) | (p > 0.99)).float().mean()) for p in positive],
        "offset": [float((z.mean(0).abs() / z.std(0)).median()) for z in before],
        "readout": readout_error(learner, [h]),
        "moment": float(learner.optimiser.v.sqrt().median()),
    }


def states(run: Run) -> list[dict[str, Any]]:
    """`state` every few steps."""
    found = []

    def watch(k: int, learner: Learner) -> None:
        if k % EVERY == 0:
            found.append(state(learner, k))

    train(run, watch, until=LAST + 1)
    return found
