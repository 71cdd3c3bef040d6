"""Whether an image shows what its prompt asks for, by a detector of objects: a reward by GenEval's rules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_int, require_number
from diffrl.rewards.by_name import DETECTORS, check_tool, tool
from diffrl.rewards.geneval_rules import Detection, Found, Task, clearly_right, graded, published, task_of
from diffrl.rewards.pixels import rgb_images
from diffrl.rewards.registry import REWARDS

__all__ = ["GenEval"]


@REWARDS.register("geneval")
@dataclass(frozen=True, eq=False)
class GenEval:
    """What a detector of objects finds in an image, judged by GenEval's rules for what its prompt asks for.

    Prompts need metadata in GenEval's format, e.g. ``{"tag": "counting", "include": [{"class": "dog", "count": 2}]}``:
    see `diffrl.finetuning.prompts` and `diffrl.rewards.geneval_rules`. `rules` is one of

    - "graded": a mean of parts, at most 1, below 0 for far too many objects: what Flow-GRPO trains on;
    - "strict": 1 if there are exactly as many objects as asked, and all as asked, else 0;
    - "published": 1 if there are at least as many, and nothing excluded, else 0: the benchmark itself. Do not train on
      it: for most prompts more objects cost nothing.

    Source: GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment (Ghosh et al., 2023), section 3,
    https://arxiv.org/abs/2310.11513; the other two are rules of Flow-GRPO: Training Flow Matching Models via Online RL
    (Liu et al., 2025), https://arxiv.org/abs/2505.05470, as its public reward server has them.

    Args:
        detector: (images uint8 [n, H, W, 3]) → n lists of `Detection`, or of mappings with its fields; or the name of
            one in `diffrl.rewards.DETECTORS`. It may give all it has: what is not sure enough is left out here.
        rules: "graded", "strict" or "published".
        threshold: detections count above this score, in [0, 1].
        counting_threshold: the same for prompts with the tag "counting".
        max_objects: of a class that count, the surest.
        position_threshold: τ, how far boxes must be apart, in shares of their sizes; see `geneval_rules.positions`.

    Raises:
        ValueError: an argument out of its range, or a detector's name that is not known; when called, no or wrong
            metadata (the prompt and the field are named), samples that are no images, a wrong answer of the detector.
        TypeError: a detector that is neither a callable nor a name.
    """

    detector: str | Callable[..., Any]
    rules: Literal["graded", "strict", "published"] = "graded"
    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position_threshold: float = 0.1

    def __post_init__(self) -> None:
        check_tool(DETECTORS, self.detector)
        if self.rules not in ("graded", "strict", "published"):
            raise InputError(f"rules is {self.rules!r}: give 'graded', 'strict' or 'published'")
        require_number("threshold", self.threshold, 0, 1)
        require_number("counting_threshold", self.counting_threshold, 0, 1)
        require_int("max_objects", self.max_objects)
        require_number("position_threshold", self.position_threshold, 0)

    def __call__(
        self, images: Tensor, prompts: Any = None, metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> list[float]:
        """Rewards of images [N, 1 or 3, H, W] in [-1, 1] under N prompts with metadata: N floats."""
        if metadata is None:
            raise InputError(
                "geneval needs prompts with metadata: give model.prompts_file a .jsonl in GenEval's format, or "
                "DecodedReward the metadata"
            )
        tasks = [self._task(about, prompts[i] if prompts else about) for i, about in enumerate(metadata)]
        pixels = rgb_images(images)
        answers = tool(DETECTORS, self.detector)(pixels) if len(pixels) else []
        if not len(answers) == len(tasks) == len(pixels):
            raise InputError(
                f"{len(answers)} answers of the detector and {len(tasks)} metadata for {len(pixels)} images: one each"
            )
        judge = {"graded": graded, "strict": clearly_right, "published": published}[self.rules]
        return [
            float(judge(self._found(answer, task), task, self.position_threshold))
            for answer, task in zip(answers, tasks, strict=True)
        ]

    def _task(self, about: Mapping[str, Any], prompt: Any) -> Task:
        try:
            return task_of(about)
        except InputError as error:
            raise InputError(f"metadata of the prompt {prompt!r}: {error}") from error

    def _found(self, answer: Any, task: Task) -> Found:
        """Detections that are sure enough, by label, the surest first."""
        least = self.counting_threshold if task.tag == "counting" else self.threshold
        found: dict[str, list[Detection]] = {}
        for detection in sorted(map(_detection, answer), key=lambda d: -d.score):
            group = found.setdefault(detection.label, [])
            if detection.score > least and len(group) < self.max_objects:
                group.append(detection)
        return found


def _detection(given: Any) -> Detection:
    try:
        detection = given if isinstance(given, Detection) else Detection(**given)
    except TypeError as error:
        raise InputTypeError(
            f"the detector gave {given!r}: give a Detection, or a mapping of label, score, box and perhaps colour"
        ) from error
    if np.shape(detection.box) != (4,) or not np.isfinite([*detection.box, detection.score]).all():
        raise InputError(f"the detector gave {detection}: give a finite score, and a box of 4 finite numbers")
    return detection
