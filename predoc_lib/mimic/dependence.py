"""How much the channels of a layer depend on each other, measured without a critic, and whether the layer is alive."""

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from scipy.special import digamma, ndtri
from scipy.stats import rankdata
from torch import Tensor

from predoc_lib.mimic.critic import CriticError

DEAD = 1e-3  # of the median channel's standard deviation


def gaussian_copula(x: Float[Tensor, "N F"]) -> float:
    """Total correlation of the Gaussian that has the channels' correlations after each is made normal, nats.

    Ranks become normal scores, R their correlations: -1/2 log det R. Exact if the channels are Gaussians seen through
    increasing functions; what pairs do not show, such as XOR, it misses. By chance alone N rows give F (F - 1) / 4N.
    Constant channels are left out, and a channel that others determine gives a large number, not infinity.
    """
    x = _alive(x)
    if x.shape[1] < 2:
        return 0.0
    scores = ndtri((rankdata(x, axis=0) - 0.5) / len(x))
    values = np.linalg.eigvalsh(np.corrcoef(scores, rowvar=False))
    return float(-0.5 * np.log(values.clip(1e-9)).sum())


def nearest_neighbours(x: Float[Tensor, "N F"], k: int = 5, seed: int = 0) -> float:
    """Total correlation by distances to the k-th nearest row, nats (Kraskov et al. 2004, their first algorithm).

    It sees every kind of dependence, but needs rows: a few thousand for up to four or five channels. Ties are broken
    by noise of a millionth of a standard deviation. Constant channels are left out.

    Raises:
        CriticError: no more rows than neighbours.
    """
    x = _alive(x)
    n, channels = x.shape
    if n <= k:
        raise CriticError(f"{k} neighbours need more than {k} rows, got {n}.")
    if channels < 2:
        return 0.0
    x = (x - x.mean(0)) / x.std(0) + 1e-6 * np.random.default_rng(seed).standard_normal(x.shape)
    radius = cKDTree(x).query(x, k + 1, p=np.inf)[0][:, -1]
    within = 0.0
    for channel in x.T:
        line = np.sort(channel)
        below = np.searchsorted(line, channel - radius, side="right")
        count = np.searchsorted(line, channel + radius, side="left") - below - 1  # strictly nearer, not itself
        within += digamma(count + 1).mean()
    return float(digamma(k) + (channels - 1) * digamma(n) - within)


def effective_rank(x: Float[Tensor, "N F"]) -> float:
    """e to the entropy of the covariance's eigenvalues as shares (Roy and Vetterli 2007): 1 to F, 0 if all is dead."""
    values = np.linalg.eigvalsh(np.atleast_2d(np.cov(_numbers(x), rowvar=False))).clip(0)
    if not values.sum():
        return 0.0
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares + 1e-300)).sum()))


def dead_channels(x: Float[Tensor, "N F"]) -> int:
    """Channels that vary less than a thousandth of what the median channel does, or not at all."""
    spread = _numbers(x).std(0)
    return int((spread <= DEAD * np.median(spread)).sum())


def _alive(x: Float[Tensor, "N F"]) -> np.ndarray:
    x = _numbers(x)
    return x[:, x.std(0) > 1e-9 * (1e-30 + np.abs(x).max())]


def _numbers(x: Float[Tensor, "N F"]) -> np.ndarray:
    if x.ndim != 2 or len(x) < 2:
        raise CriticError(f"Dependence is measured on rows [N, F], at least two, got {list(x.shape)}.")
    if not torch.isfinite(x).all():
        raise CriticError("Dependence is measured on finite features, and these are not.")
    return x.detach().double().cpu().numpy()
