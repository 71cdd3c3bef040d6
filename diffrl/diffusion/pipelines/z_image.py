"""How Z-Image's transformer is asked: lists of latents and of captions of any length, and time that runs backwards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["LATENT_SIZE", "as_chat", "encoded_captions", "is_z_image", "velocity"]

LATENT_SIZE = 128
"""Height and width of the latents of 1024 pixels, for which the published weights were made."""
ENCODED_AT_ONCE = 16  # prompts


def is_z_image(network: Any) -> bool:
    """Whether a network, compiled or not, is Z-Image's."""
    return type(getattr(network, "_orig_mod", network)).__name__ == "ZImageTransformer2DModel"


def velocity(network: Any, x_t: Tensor, t: Tensor, cap_feats: Tensor, cap_lengths: Tensor) -> Tensor:
    """dx/dt of latents [N, C, h, w] at times [N]: the network is told 1 - t, and gives -dx/dt.

    Args:
        network: a diffusers `ZImageTransformer2DModel`.
        x_t: latents, in the network's dtype.
        t: times of the flow, 1 is noise.
        cap_feats: captions in encoded form, filled up to one length, shape [N, L, D].
        cap_lengths: their true lengths, integers, shape [N].
    """
    captions = [rows[:n] for rows, n in zip(cap_feats, cap_lengths.tolist(), strict=True)]
    found = network(list(x_t.unsqueeze(2).unbind(0)), (1 - t).float(), captions, return_dict=False)[0]
    return -torch.stack(list(found)).squeeze(2)


def as_chat(pipe: Any, prompt: str) -> str:
    """The text that a pipeline makes of a prompt for its language model."""
    message = [{"role": "user", "content": prompt}]
    text: str = pipe.tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return text


@torch.no_grad()
def encoded_captions(pipe: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
    """Prompts in encoded form, as `velocity` takes them: cap_feats [P, L, D] and cap_lengths [P]."""
    device, found = next(pipe.text_encoder.parameters()).device, []
    for start in range(0, len(prompts), ENCODED_AT_ONCE):
        found += pipe.encode_prompt(
            prompt=list(prompts[start : start + ENCODED_AT_ONCE]),  # a list that the pipeline writes into
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )[0]
    lengths = torch.tensor([len(rows) for rows in found], device=device)
    return {"cap_feats": pad_sequence(found, batch_first=True), "cap_lengths": lengths}
