"""Whether a training can be told what was done to its images: what `trainer.augment` asks of the rest."""

from typing import Any

from diffrl.data.augmentation import AUGMENT_LABELS
from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputError
from diffrl.objectives.scheme import Objective
from diffrl.objectives.stand_ins import StandIn

__all__ = ["check_augmentable"]


def check_augmentable(denoiser: Denoiser, event_shape: tuple[int, ...], objective: Objective) -> None:
    """Refuse augmentation where the network is not told of it, or where targets know the images as they are only.

    Args:
        denoiser: what is trained.
        event_shape: *E of the data.
        objective: how it is trained.

    Raises:
        ValueError: data that are no images, a network without a place for the labels, noise by classes, targets from
            the rows of the data, or a teacher that takes no such labels.
    """
    if len(event_shape) != 3:
        raise InputError(
            f"trainer.augment is for images (C, H, W), not for samples of {event_shape}: set it to 0"
        )
    if _told(denoiser) != AUGMENT_LABELS:
        raise InputError(
            "trainer.augment needs a network that is told what was done to an image, or it would draw turned and "
            f"stretched ones: set network=unet network.augment_dim={AUGMENT_LABELS}"
        )
    if getattr(denoiser.prior, "kind", None) == "class":
        raise InputError("trainer.augment knows no noise of classes: set denoiser.prior=standard or data")
    transition = getattr(objective.draw, "transition", None)
    x0 = getattr(objective.draw, "stand_in", StandIn()).x0
    if x0 != "datum" or getattr(transition, "source", None) == "reference":
        setting = "objective.transition=forward" if x0 == "datum" else "chain.x0=datum"
        raise InputError(
            f"trainer.augment makes images that are no rows of the data: set {setting}, or augment to 0"
        )
    for part in (objective.loss, objective.draw, transition):
        teacher = getattr(part, "teacher", None)
        if teacher is not None and _told(teacher) != AUGMENT_LABELS:
            raise InputError(
                "trainer.augment needs a teacher that was trained with it: set it to 0, or take another"
            )


def _told(denoiser: Any) -> int:
    """Labels of augmentation that the network takes."""
    return int(getattr(getattr(denoiser, "network", None), "augment_dim", 0))
