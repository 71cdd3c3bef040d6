"""Data sets: mixtures with a known law, 2-D sets drawn afresh, digits, and the user's own files."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from diffrl.data.image_files import (
    DataError,
    check_finite,
    events_from,
    images_from,
    labels_from,
    read_idx,
    read_image_folder,
    read_npz,
)
from diffrl.data.mixtures import Mixture
from diffrl.data.planar import draw_checkerboard, draw_moons, draw_spirals
from diffrl.extras import require

__all__ = [
    "DATASETS",
    "Data",
    "DataError",
    "Mixture",
    "checkerboard",
    "digits",
    "folder",
    "gmm",
    "idx",
    "moons",
    "npz",
    "rings",
    "spirals",
]

# test points and sigma_data come from streams of their own, which no small user seed shares
TEST_SEED, SIGMA_SEED = 1_597_334_677, 3_812_015_801


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: points to evaluate on, and batches to train on.

    Batches come from `train` (rows drawn uniformly with replacement), else from `mixture`, else from `draw`
    (both fresh at each call). All tensors are float32 on the CPU.

    Args:
        name: what to call it in results.
        test: points to evaluate on, never trained on, shape [M, *E]; images lie in [-1, 1].
        test_labels: their classes, int64 [M].
        train: points to train on, [N, *E]; None if batches are fresh draws.
        train_labels: their classes, int64 [N].
        num_classes: C of labels in 0..C-1; 0 is unconditional.
        mixture: the exact law, where it is known.
        draw: `draw(n, generator)` gives n fresh points.

    Raises:
        DataError: nothing to draw from, shapes or labels that do not fit, NaN or infinity, constant data.
    """

    name: str
    test: Tensor
    test_labels: Tensor | None = None
    train: Tensor | None = None
    train_labels: Tensor | None = None
    num_classes: int = 0
    mixture: Mixture | None = None
    draw: Callable[[int, Generator | None], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.train is None and self.mixture is None and self.draw is None:
            raise DataError(f"{self.name}: nothing to train on; give train, mixture or draw")
        parts = (("test", self.test, self.test_labels), ("train", self.train, self.train_labels))
        for part, x, labels in parts:
            where = f"{self.name} ({part})"
            if x is None:
                continue
            if x.ndim < 2 or x.shape[0] == 0 or x.shape[1:] != self.test.shape[1:]:
                raise DataError(
                    f"{where}: shape {tuple(x.shape)} does not fit samples of {tuple(self.test.shape[1:])}"
                )
            check_finite(x, where)
            if (labels is None) != (self.num_classes == 0):
                raise DataError(f"{where}: labels and num_classes={self.num_classes} contradict each other")
            if labels is not None and (
                labels.shape != x.shape[:1] or int(labels.min()) < 0 or int(labels.max()) >= self.num_classes
            ):
                raise DataError(f"{where}: labels must be {x.shape[0]} numbers in 0..{self.num_classes - 1}")
        if self.sigma_data < 1e-9:
            raise DataError(f"{self.name}: every value is the same; there is nothing to learn")

    @property
    def event_shape(self) -> tuple[int, ...]:
        """*E, the shape of one sample."""
        return tuple(self.test.shape[1:])

    @cached_property
    def sigma_data(self) -> float:
        """Standard deviation over all samples and dims: of `train`, of the law, or of 100,000 fixed draws."""
        if self.train is None and self.mixture is not None:
            return self.mixture.sigma_data
        x = self.train
        if x is None:
            assert self.draw is not None
            x = self.draw(100_000, Generator().manual_seed(SIGMA_SEED))
        return float(x.double().std(correction=0))

    def batch(self, n: int, generator: Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Draw a training batch.

        Args:
            n: batch size B ≥ 1.
            generator: of the CPU.

        Returns:
            x0 [n, *E] and labels [n] or None.

        Raises:
            DataError: n < 1, or more than there are training samples.
        """
        if n < 1:
            raise DataError(f"batch_size {n}: a batch needs at least one sample")
        if self.train is not None:
            N = self.train.shape[0]
            if n > N:
                raise DataError(f"{self.name}: batch_size {n} > {N} training samples; lower batch_size")
            i = torch.randint(N, (n,), generator=generator)
            return self.train[i], None if self.train_labels is None else self.train_labels[i]
        if self.mixture is not None:
            return self.mixture.sample(n, generator).float(), None
        assert self.draw is not None
        return self.draw(n, generator), None


def _synthetic(name: str, law: Mixture | Callable[[int, Generator | None], Tensor], test_size: int) -> Data:
    if test_size < 1:
        raise DataError(f"{name}: test_size is {test_size}; it must be at least 1")
    g = Generator().manual_seed(TEST_SEED)
    if isinstance(law, Mixture):
        return Data(name, law.sample(test_size, g).float(), mixture=law)
    return Data(name, law(test_size, g), draw=law)


def gmm(
    dim: int = 16,
    components: int = 12,
    std: float = 0.05,
    spread: float = 0.5,
    mixture_seed: int = 0,
    test_size: int = 4000,
) -> Data:
    """Random mixture with a known law: μ_c ~ spread·N(0, I), s_c = std, w = softmax(N(0, I)).

    Args:
        dim: D.
        components: C.
        std: width of each component, in units of the data.
        spread: scale of the means.
        mixture_seed: picks the mixture; independent of the seed of a run.
        test_size: points to evaluate on; batches are fresh draws.
    """
    if dim < 1 or components < 1:
        raise DataError(f"gmm: dim={dim} and components={components} must be at least 1")
    g = Generator().manual_seed(mixture_seed)
    means = spread * torch.randn(components, dim, dtype=torch.float64, generator=g)
    weights = torch.randn(components, dtype=torch.float64, generator=g).softmax(0)
    stds = torch.full((components,), std, dtype=torch.float64)
    return _synthetic("gmm", Mixture(means, stds, weights), test_size)


def rings(modes: int = 8, radius: float = 0.8, std: float = 0.05, test_size: int = 4000) -> Data:
    """Equal Gaussians evenly spaced on a ring in 2-D; the law is known.

    Args:
        modes: number of Gaussians.
        radius: of the ring.
        std: width of each Gaussian.
        test_size: points to evaluate on; batches are fresh draws.
    """
    if modes < 1:
        raise DataError(f"rings: modes={modes} must be at least 1")
    theta = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    means = radius * torch.stack([theta.cos(), theta.sin()], 1)
    ones = torch.ones(modes, dtype=torch.float64)
    return _synthetic("rings", Mixture(means, std * ones, ones / modes), test_size)


def checkerboard(cells: int = 4, test_size: int = 4000) -> Data:
    """Uniform on the dark cells of a cells × cells board that fills [-1, 1]².

    Args:
        cells: cells along one side, at least 1.
        test_size: points to evaluate on; batches are fresh draws.
    """
    if cells < 1:
        raise DataError(f"checkerboard: cells={cells} must be at least 1")
    return _synthetic("checkerboard", partial(draw_checkerboard, cells=cells), test_size)


def moons(noise: float = 0.05, test_size: int = 4000) -> Data:
    """Two interleaved half circles, centred, scaled so that the curves span [-1, 1] across.

    Args:
        noise: standard deviation around the curves, after scaling.
        test_size: points to evaluate on; batches are fresh draws.
    """
    return _synthetic("moons", partial(draw_moons, noise=noise), test_size)


def spirals(arms: int = 2, turns: float = 1.5, noise: float = 0.02, test_size: int = 4000) -> Data:
    """Archimedean spirals θ = 2π (turns·r + arm/arms), r = √U(0, 1), in the unit disc.

    Args:
        arms: number of spirals.
        turns: of each spiral from the centre to radius 1.
        noise: standard deviation around the curves.
        test_size: points to evaluate on; batches are fresh draws.
    """
    if arms < 1:
        raise DataError(f"spirals: arms={arms} must be at least 1")
    return _synthetic("spirals", partial(draw_spirals, arms=arms, turns=turns, noise=noise), test_size)


Part = tuple[Tensor, Tensor | None]  # samples [N, *E] and labels [N]


def _from_parts(name: str, train: Part, test: Part) -> Data:
    (x, y), (x_test, y_test) = train, test
    if (y is None) != (y_test is None):
        raise DataError(f"{name}: give labels for both the training and the test samples, or for neither")
    num_classes = 0 if y is None or y_test is None else int(max(y.max(), y_test.max())) + 1
    return Data(name, x_test, y_test, x, y, num_classes)


def _split(name: str, part: Part, is_test: Tensor) -> tuple[Part, Part]:
    """Training and test part by a mask."""
    x, y = part
    if bool(is_test.all()) or not bool(is_test.any()):
        raise DataError(
            f"{name}: {len(x)} samples are too few for a train and a test part; change test_fraction"
        )
    return (x[~is_test], None if y is None else y[~is_test]), (x[is_test], None if y is None else y[is_test])


def _test_mask(N: int, test_fraction: float, spaced: bool) -> Tensor:
    """The last round(f N) indices, or spaced: every i with ⌊(i+1) f⌋ > ⌊i f⌋."""
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction is {test_fraction}; it must lie between 0 and 1")
    i = torch.arange(N, dtype=torch.float64)
    if not spaced:
        return i >= N - round(test_fraction * N)
    # 1e-9: a product such as 0.1·30 counts as whole
    return ((i + 1) * test_fraction + 1e-9).floor() > (i * test_fraction + 1e-9).floor()


def digits(conditional: bool = False) -> Data:
    """The 1,797 handwritten digits of scikit-learn, images of shape (1, 8, 8) in [-1, 1], 10 classes.

    Every fifth image of each class, in scikit-learn's order, is test (355), the others train (1,442). (Every
    fifth of all would be no fair split: the order has a pattern, and it holds 52 threes but 21 ones.)

    Source: Optical Recognition of Handwritten Digits (Alpaydin & Kaynak, 1998), https://doi.org/10.24432/C50P49.

    Args:
        conditional: give labels; False makes the set unconditional.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    bunch = require("sklearn.datasets", "data").load_digits()
    x = torch.from_numpy(bunch.images[:, None] / 8 - 1).float()
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    rank = one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]  # 1 for the first image of its class
    return _from_parts("digits", *_split("digits", (x, labels if conditional else None), rank % 5 == 0))


def idx(
    path: str,
    labels: str | None = None,
    test_path: str | None = None,
    test_labels: str | None = None,
    test_fraction: float = 0.1,
) -> Data:
    """Images of idx files (MNIST and its like), gzipped or not.

    Without `test_path`, the last round(test_fraction·N) samples are test.

    Args:
        path: idx file of samples: uint8 images, or floats as `npz` takes them.
        labels: idx file of their classes; without it the set is unconditional.
        test_path: idx file of test samples; then test_fraction is unused.
        test_labels: idx file of their classes.
        test_fraction: part of `path` that is test, in (0, 1).

    Raises:
        DataError: any fault of a file, named in one sentence.
    """
    part = _idx_part(path, labels)
    if test_path is not None:
        return _from_parts("idx", part, _idx_part(test_path, test_labels))
    if test_labels is not None:
        raise DataError("idx: test_labels is given without test_path")
    return _from_parts("idx", *_split("idx", part, _test_mask(len(part[0]), test_fraction, spaced=False)))


def _idx_part(path: str, labels: str | None) -> Part:
    x = events_from(read_idx(path), path)
    return x, None if labels is None else labels_from(read_idx(labels), len(x), labels)


def npz(
    path: str, test_path: str | None = None, conditional: bool = False, test_fraction: float = 0.1
) -> Data:
    """Samples of an npz file (keys `x` or `images`, optional `labels`) or of an npy file.

    uint8 arrays are images, [N, H, W], [N, C, H, W] or [N, H, W, C], and are scaled to [-1, 1]. Float arrays
    keep their values: [N, C, H, W] must lie in [-1, 1]; vectors [N, D] and sequences [N, L, D] may lie
    outside, and `sigma_data` follows them. Without `test_path`, the last round(test_fraction·N) samples are
    test: shuffle a file that is sorted by class.

    Args:
        path: the file.
        test_path: file of test samples; then test_fraction is unused.
        conditional: use the labels, if there are any.
        test_fraction: part of `path` that is test, in (0, 1).

    Raises:
        DataError: any fault of a file, named in one sentence.
    """
    part = _npz_part(path, conditional)
    if test_path is not None:
        return _from_parts("npz", part, _npz_part(test_path, conditional))
    return _from_parts("npz", *_split("npz", part, _test_mask(len(part[0]), test_fraction, spaced=False)))


def _npz_part(path: str, conditional: bool) -> Part:
    array, labels = read_npz(path)
    x = events_from(array, path)
    return x, labels_from(labels, len(x), path) if conditional and labels is not None else None


def folder(
    path: str,
    size: int | None = None,
    test_path: str | None = None,
    conditional: bool = False,
    test_fraction: float = 0.1,
) -> Data:
    """Images of a folder or zip, one sub-folder for each class, or all at the top (unconditional).

    Images are ordered by name, classes too. Without `test_path`, index i is test where ⌊(i+1) f⌋ > ⌊i f⌋ with
    f = test_fraction (0.1: i % 10 == 9), so that every class of more than 1/f images is in both parts.

    Args:
        path: folder or zip.
        size: crop each image at its centre and resize it to size × size; None: all must be of one size.
        test_path: folder or zip of test images with the same classes; then test_fraction is unused.
        conditional: take classes from the sub-folders; False reads images anywhere and makes no labels.
        test_fraction: part of `path` that is test, in (0, 1).

    Raises:
        DataError: any fault of a file, named in one sentence.
        MissingExtra: pillow is not installed.
    """
    part, names = _folder_part(path, size, conditional)
    if test_path is None:
        mask = _test_mask(len(part[0]), test_fraction, spaced=True)
        return _from_parts("folder", *_split("folder", part, mask))
    test, test_names = _folder_part(test_path, size, conditional)
    if test_names != names:
        raise DataError(f"{test_path}: its class folders {test_names} are not those of {path}, {names}")
    return _from_parts("folder", part, test)


def _folder_part(path: str, size: int | None, conditional: bool) -> tuple[Part, list[str]]:
    """Samples with labels, and the names of the classes."""
    pixels, classes = read_image_folder(path, size, conditional)
    names = sorted(set(classes or ()))
    labels = None if classes is None else torch.tensor([names.index(c) for c in classes])
    return (images_from(pixels), labels), names


DATASETS: dict[str, Callable[..., Data]] = {
    "gmm": gmm,
    "rings": rings,
    "checkerboard": checkerboard,
    "moons": moons,
    "spirals": spirals,
    "digits": digits,
    "idx": idx,
    "folder": folder,
    "npz": npz,
}
