"""How well an image spells what its prompt puts in quotes, by a reader of text, as a reward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffrl.errors import InputError, InputTypeError
from diffrl.rewards.by_name import READERS, check_tool, tool
from diffrl.rewards.pixels import rgb_images
from diffrl.rewards.registry import REWARDS

__all__ = ["TextAccuracy", "edit_distance"]


@REWARDS.register("ocr")
@dataclass(frozen=True, eq=False)
class TextAccuracy:
    """How much of a text a reader finds in an image: R = 1 - min(d, n)/n, in [0, 1].

    n is the length of the text that was asked for, d its edit distance to the text that was read, or 0 if the latter
    holds it as a whole. Both are compared in lower case and without spaces.

    The text stands in the prompt in straight double quotes, `a sign that says "open"`, the first pair of them; metadata
    ``{"text": "open"}`` go before it.

    Source: Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., 2025), section 4.1,
    https://arxiv.org/abs/2505.05470, and its public code, from where the rule about the whole text is. There a reader
    that fails costs the reward; here it is a failure, see `BlackBox`.

    Args:
        reader: (images uint8 [n, H, W, 3]) → n strings, or the name of one in `diffrl.rewards.READERS`, such as
            "rapidocr".
        substring: whether the text may stand among other text at no cost. That pays for images full of text.

    Raises:
        ValueError: a reader's name that is not known; when called, a prompt without a text in quotes, samples that are
            no images, or an answer of the reader that is none.
        TypeError: a reader that is neither a callable nor a name, or that does not give strings.
    """

    reader: str | Callable[..., Any]
    substring: bool = True

    def __post_init__(self) -> None:
        check_tool(READERS, self.reader)

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[float]:
        """Rewards of images [N, 1 or 3, H, W] in [-1, 1] under N prompts: N floats."""
        pixels = rgb_images(images)
        if prompts is None or len(prompts) != len(pixels):
            raise InputError(f"ocr needs prompts, one for each of the {len(pixels)} images")
        about = [{}] * len(pixels) if metadata is None else metadata
        asked = [_asked(prompt, entry) for prompt, entry in zip(prompts, about, strict=True)]
        read = tool(READERS, self.reader)(pixels) if len(pixels) else []
        if len(read) != len(asked):
            raise InputError(f"the reader gave {len(read)} texts for {len(asked)} images: give one each")
        return [self._accuracy(text, target) for text, target in zip(read, asked, strict=True)]

    def _accuracy(self, read: Any, target: str) -> float:
        if not isinstance(read, str):
            raise InputTypeError(f"the reader gave {read!r}: give a string, '' where there is no text")
        read = _plain(read)
        if self.substring and target in read:
            return 1.0
        n = len(target)
        return 1 - min(edit_distance(read, target), n) / n


def _asked(prompt: Any, about: Mapping[str, Any]) -> str:
    parts = prompt.split('"') if isinstance(prompt, str) else []
    text = about.get("text", parts[1] if len(parts) > 2 else "")
    if not isinstance(text, str) or not _plain(text):
        raise InputError(
            f'the prompt {prompt!r} has no text to look for: put it in straight quotes, "like this", or give metadata '
            'with "text"'
        )
    return _plain(text)


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the least number of letters to insert, delete or change to make b of a.

    >>> edit_distance("open", "oven"), edit_distance("", "abc"), edit_distance("kitten", "sitting")
    (1, 3, 3)
    """
    row = list(range(len(b) + 1))  # row[j]: distance of the letters of a so far and the first j of b
    for i, letter in enumerate(a, 1):
        previous, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (letter != other)))
    return row[-1]
