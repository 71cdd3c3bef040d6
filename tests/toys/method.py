"""A fine-tuning method in one file: regression towards samples that are better than average."""

from dataclasses import dataclass
from typing import Any, ClassVar

from tensordict import TensorDict
from torch import nn

from diffrl import keys, recipes
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.surrogate import SURROGATES, Surrogate


class BetterLoss(nn.Module):
    in_keys, out_keys = [keys.X_T, keys.T, keys.X0, keys.ADVANTAGE], ["loss_policy"]

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, samples: TensorDict) -> TensorDict:
        x_t, t, x0, adv = (samples.reshape(-1).get(key) for key in self.in_keys)
        error = (self.denoiser(x_t, t.flatten(), None) - x0).square()
        return TensorDict({"loss_policy": (adv.clamp(min=0) * error).mean()})


@SURROGATES.register("toy_surrogate")
@dataclass(frozen=True)
class Better(Surrogate):
    reads: ClassVar[Any] = "samples"

    def loss(self, setting: Setting) -> Any:
        return BetterLoss(setting.policy.denoiser)


@METHODS.register("toy_method")
def toy_method(**pieces: Any) -> recipes.Recipe:
    """Regression towards samples that are better than average: max(adv, 0) ‖D(x_t) - x_K‖²."""
    return recipes.ddpo_is(**{"updates": recipes.SampleUpdates(), "surrogate": Better(), **pieces})
