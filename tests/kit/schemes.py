"""Every objective of the library, and the words that it wants beside its name."""

from diffrl.objectives.registry import OBJECTIVES
from tests.kit.maps import MAPS

NAMES = [entry.name for entry in OBJECTIVES.entries() if entry.module.startswith("diffrl.")]
CONSISTENCY = ("denoiser.prediction_type=consistency",)
WORDS: dict[str, tuple[str, ...]] = {
    "priorgrad": ("denoiser.prior=data",),
    "hybrid": ("network.variance=true",),
    "cd": (*CONSISTENCY, "objective.teacher=exact", "data=gmm"),
    "double_sampling": ("data=gmm",),
    "progressive": ("process=flow", "denoiser.prediction_type=velocity"),
    "scheduled_sampling": ("objective.probs_start=[1.0]", "objective.probs_end=[1.0]"),
    "ct": CONSISTENCY,
    "td_ct": CONSISTENCY,
    **dict.fromkeys(MAPS, ("network.second_time=true",)),
}
