"""Handing a model over as a folder: weights, description and card, of a denoiser or of what a run made."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputTypeError
from diffrl.experiments.finetune import TunedRun
from diffrl.experiments.reports.model_card import model_card
from diffrl.training.model_files import describe
from diffrl.training.model_folders import write_folder
from diffrl.training.runs import Run

__all__ = ["save_pretrained"]


def save_pretrained(
    model: Denoiser | Run | TunedRun, folder: str | Path, *, event_shape: tuple[int, ...] | None = None
) -> Path:
    """Write a model as a folder for `diffrl.from_pretrained` and `diffrl.load`: it samples without the training data.

    >>> import tempfile, diffrl
    >>> denoiser = diffrl.Denoiser(diffrl.networks.MLP((2,), hidden=8), diffrl.EDM())
    >>> folder = diffrl.save_pretrained(denoiser, tempfile.mkdtemp())
    >>> sorted(file.name for file in folder.iterdir())
    ['README.md', 'config.json', 'model.safetensors']
    >>> diffrl.load(folder).sample(4, num_steps=5).shape
    torch.Size([4, 2])

    Of a run, ``diffrl.save_pretrained(diffrl.load("runs/..."), folder)``, config.json tells the sampler and the shares
    of the classes, so that the same seeds give the same samples as from the run; the weights of the last step are kept
    beside the averaged ones; and README.md, the model card, has how it was trained and what was measured. No path of
    the run is written, and of its data the last part only. The licence is left to you.

    Args:
        model: a denoiser, what `diffrl.load` gives, or what `diffrl.load_tuned` gives of a denoiser of this library. Of
            pipelines with prompts a fine-tuning run leaves adapters in ``lora/``.
        folder: a new one, or one that is empty.
        event_shape: *E of a sample, where the network does not tell it by an attribute of that name.

    Returns:
        The folder.

    Raises:
        InputTypeError: it holds no `diffrl.Denoiser`; one that is exact has nothing to hand over.
        InputError: a process that is not registered, or no event shape; the folder holds something.
        FileError: the folder cannot be written.
    """
    folder, run = Path(folder), model if isinstance(model, Run | TunedRun) else None
    denoiser = _denoiser(model)
    config: dict[str, Any] = {} if run is None else run.config
    more: dict[str, Any] = {key: config[key] for key in ("sampler",) if key in config}
    unaveraged = None
    if isinstance(run, Run):
        event_shape = event_shape or run.events.event_shape
        more |= {"class_shares": list(run.events.class_shares)} if run.events.class_shares else {}
        unaveraged = None if run.unaveraged is None else run.unaveraged()
    if isinstance(run, TunedRun):
        event_shape = event_shape or run.model.event_shape
    description = {
        "_class_name": "Denoiser",
        "_diffrl_version": version("diffrl"),
        **describe(denoiser, event_shape),
        **more,
    }
    card = model_card(
        denoiser,
        description,
        name=folder.resolve().name,
        config=config,
        results={} if run is None else run.results,
        objective=run.objective if isinstance(run, Run) else "",
        averaged=unaveraged is not None,
    )
    write_folder(folder, denoiser, description, card, unaveraged)
    return folder


def _denoiser(model: Denoiser | Run | TunedRun) -> Denoiser:
    """The denoiser of whatever is given, compiled or not."""
    given = (
        model.policy.denoiser
        if isinstance(model, TunedRun)
        else model.denoiser
        if isinstance(model, Run)
        else model
    )
    found = getattr(given, "_orig_mod", given)
    if not isinstance(found, Denoiser):
        raise InputTypeError(
            f"this holds a {type(found).__name__}, and what is saved is a diffrl.Denoiser(network, process); of "
            "pipelines with prompts a fine-tuning run leaves adapters in lora/"
        )
    return found
