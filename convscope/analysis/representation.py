"""What the geometry of features tells without labels: their similarity between layers, their rank, their spread.

All functions take features (N, D) of N images and compute in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from convscope.core.errors import UserError

RANK_EPSILON = 1e-7  # RankMe's, added to every share
LIDAR_EPSILON = 1e-8
LIDAR_DELTA = 1e-4
ALPHA_WINDOW = (11, 50)  # ranks that alpha-ReQ is fitted on where there are that many
CONSTANT = 1e-3  # mean squared distance of unit vectors below which all images look alike
NARROW = 0.05  # share of the possible rank below which most dimensions are unused


@dataclass(frozen=True)
class PowerLaw:
    """Eigenvalue of rank i falls as i ** -alpha within the window."""

    alpha: float
    r2: float  # of the fitted line, 0 to 1
    window: tuple[int, int]  # first and last rank, from 1


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment |Y'X|^2 / (|X'X| |Y'Y|) of (N, D) and (N, E) (Kornblith et al. 2019, equation 3).

    NaN where one of them is constant.
    """
    x, y = centred(x), centred(y)
    if x.shape[1] + y.shape[1] > 2 * len(x):  # the same numbers from N x N matrices
        a, b = x @ x.T, y @ y.T
        return float((a * b).sum() / (a.norm() * b.norm()))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


class MinibatchCka:
    """Linear CKA of all pairs of layers, from batches: unbiased HSIC is summed before the ratio is taken.

    Nguyen, Raghu & Kornblith 2021, equations 2 and 3. Its expectation does not depend on the size of the batches.
    """

    def __init__(self) -> None:
        self._hsic: Tensor | None = None  # (L, L)

    def update(self, layers: list[Tensor]) -> None:
        """Add a batch: features (n, D) of each layer, n at least 4.

        Raises:
            UserError: fewer than four images.
        """
        grams = torch.stack([_gram_without_diagonal(one) for one in layers])  # (L, n, n)
        n = grams.shape[1]
        if n < 4:
            raise UserError(f"unbiased CKA needs batches of at least 4 images, got {n}")
        sums, total = grams.sum(2), grams.sum((1, 2))  # (L, n), (L,)
        flat = grams.flatten(1)
        product = flat @ flat.T + torch.outer(total, total) / ((n - 1) * (n - 2)) - 2 / (n - 2) * sums @ sums.T
        hsic = product / (n * (n - 3))
        self._hsic = hsic if self._hsic is None else self._hsic + hsic

    def result(self) -> Tensor:
        """(L, L) float64, symmetric; NaN for constant layers.

        Raises:
            UserError: no batch was added.
        """
        if self._hsic is None:
            raise UserError("CKA needs at least one batch of 4 images")
        hsic: Tensor = self._hsic
        scale = hsic.diagonal().clamp_min(0).sqrt()
        similarity: Tensor = hsic / torch.outer(scale, scale)
        return similarity


def _gram_without_diagonal(x: Tensor) -> Tensor:
    # Centring changes no HSIC and keeps what is large and common to all images from drowning the differences.
    x = centred(x)
    return (x @ x.T).fill_diagonal_(0)


def centred(x: Tensor) -> Tensor:
    """Less the mean over images, in float64."""
    x = x.double()
    return x - x.mean(0)


def singular_values(x: Tensor) -> Tensor:
    """(min(N, D),) descending."""
    values: Tensor = torch.linalg.svdvals(x.double())
    return values


def effective_rank(spectrum: Tensor, epsilon: float = RANK_EPSILON) -> float:
    """exp of the entropy of a spectrum's shares: RankMe for singular values (Garrido et al. 2023, equation 1).

    At most about its length; 1 where one value is all there is; NaN where all are zero.
    """
    shares = spectrum / spectrum.sum() + epsilon
    return float((-(shares * shares.log()).sum()).exp())


def nesum(eigenvalues: Tensor) -> float:
    """Sum of the covariance's eigenvalues over the largest (He & Ozay 2022): 1 to D."""
    return float(eigenvalues.sum() / eigenvalues.max())


def alpha_req(eigenvalues: Tensor, window: tuple[int, int] | None = None) -> PowerLaw | None:
    """Decay of the covariance's eigenvalues: minus the slope of log eigenvalue over log rank (Agrawal et al. 2022).

    Args:
        eigenvalues: descending.
        window: first and last rank of the fit, from 1; by default 11 to 50, all ranks where there are fewer than 20.

    Returns:
        None where fewer than three eigenvalues lie in the window.
    """
    positive = eigenvalues[eigenvalues > eigenvalues.max() * 1e-12].double()
    first, last = window or (ALPHA_WINDOW if len(positive) >= 20 else (1, len(positive)))
    last = min(last, len(positive))
    if last - first < 2:
        return None
    x = torch.arange(first, last + 1, dtype=torch.float64).log()
    y = positive[first - 1 : last].log()
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    left = (y - slope * x).square().sum() / y.square().sum()
    return PowerLaw(float(-slope), float(1 - left) if y.any() else 1.0, (first, last))


def squared_distances(x: Tensor) -> Tensor:
    """(N, N) between rows scaled to length 1; a row of zeros stays where it is."""
    unit = F.normalize(x.double())
    return (2 - 2 * unit @ unit.T).clamp_min(0) if unit.any() else torch.zeros(len(x), len(x), dtype=torch.float64)


def uniformity(distances: Tensor, weights: Tensor | None = None) -> Tensor:
    """log of the mean of exp(-2 d) over pairs of different images (Wang & Isola 2020, equation 3); 0 is a constant.

    Args:
        distances: (N, N) squared distances of unit vectors.
        weights: (R, N) how often each image counts, a row for each resampling.

    Returns:
        0-d, or (R,).
    """
    kernel = (-2 * distances).exp().fill_diagonal_(0)
    if weights is None:
        return (kernel.sum() / (len(kernel) * (len(kernel) - 1))).log()
    weights = weights.double()
    pairs = weights.sum(1).square() - weights.square().sum(1)
    return (((weights @ kernel) * weights).sum(1) / pairs).log()


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """(N,) squared distance of two views of each image, both scaled to length 1 (Wang & Isola 2020, equation 2)."""
    return (F.normalize(first.double()) - F.normalize(second.double())).square().sum(1)


def lidar(views: Tensor) -> float:
    """Effective rank of linear discriminant analysis with each image as a class (Thilak et al. 2024, section 4).

    Args:
        views: (N, V, D) features of V views of each image, V at least 2.
    """
    views = views.double()
    means = views.mean(1)
    within = (views - means[:, None]).flatten(0, 1)
    width = views.shape[2]
    s_within = within.T @ within / (len(within) - len(views)) + LIDAR_DELTA * torch.eye(width, dtype=torch.float64)
    between = centred(means)
    # Sw^-1/2 Sb Sw^-1/2 has the eigenvalues of L^-1 Sb L^-T, with Sw = L L'.
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(s_within), between.T, upper=False)
    return effective_rank(torch.linalg.svdvals(white).square(), LIDAR_EPSILON)


def spread(x: Tensor) -> Tensor:
    """(D,) standard deviation of each dimension of unit vectors, times sqrt(D): all 1 where directions are even."""
    return F.normalize(x.double()).std(0).mul(x.shape[1] ** 0.5)


def verdict(x: Tensor) -> tuple[str, str]:
    """ "collapsed", "narrow" or "spread out", and the reason in words.

    A constant with a little noise has almost full rank once it is centred; its distances and its uncentred rank give
    it away.
    """
    distances = squared_distances(x)
    mean = float(distances.sum() / (len(x) * (len(x) - 1)))
    rank, possible = effective_rank(singular_values(centred(x))), min(len(x) - 1, x.shape[1])
    if mean < CONSTANT:
        return "collapsed", f"all images give nearly one vector: mean squared distance {mean:.1e} of at most 4"
    if rank < max(1.5, NARROW * possible):
        return "narrow", f"images differ along {rank:.1f} of {possible} possible directions"
    return "spread out", f"images differ along {rank:.0f} of {possible} possible directions"
