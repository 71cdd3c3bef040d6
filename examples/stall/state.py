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
    """Norms of all weight matrices, and of the features before the last layer: size, directions, share of idle units."""
    ground, net = learner.ground, learner.denoiser.network
    kept: list[Tensor] = []
    hook = net.last.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0]))
    errors = ground.errors(learner.denoiser)
    hook.remove()
    h = kept[0]
    layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
    moment = learner.optimiser.second_moment().sqrt() if learner.optimiser.steps else torch.ones(1)
    return {
        "step": k,
        "error": ground.figure(errors),
        "norms": [float(layer.weight.norm()) for layer in layers],
        "size": float(h.square().mean().sqrt()),
        "mean_size": float(h.mean(0).square().mean().sqrt()),
        "directions": directions(h[:: max(1, len(h) // 2000)]),
        "idle": float((h.std(0) < 0.05 * h.std(0).max()).float().mean()),
        "readout": readout_error(learner, kept),
        "moment": float(moment.median()),
    }


def states(run: Run) -> list[dict[str, Any]]:
    """`state` every few steps."""
    found = []

    def watch(k: int, learner: Learner) -> None:
        if k % EVERY == 0:
            found.append(state(learner, k))

    train(run, watch, until=LAST + 1)
    return found
