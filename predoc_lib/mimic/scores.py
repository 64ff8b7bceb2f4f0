"""How well codes [N, Z] take the known factors [N, K] apart: four scores, each 1 at best."""

import numpy as np
from jaxtyping import Float, Int
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.metrics import mutual_info_score

Codes, Factors = Float[np.ndarray, "N Z"], Int[np.ndarray, "rows K"]


def mig(codes: Codes, factors: Factors, bins: int = 20) -> float:
    """Mutual information gap (Chen et al. 2018): of each factor, how much more the best code knows than the second.

    In units of the factor's entropy, the mean over factors; codes are cut into ``bins`` of equal width.

    Raises:
        ValueError: less than two codes, or rows that do not match.
    """
    codes, factors = _checked(codes, factors)
    cut = np.stack([np.digitize(c, np.histogram(c, bins)[1][1:-1]) for c in codes.T], 1)
    gaps = []
    for factor in factors.T:
        known = sorted(mutual_info_score(factor, c) for c in cut.T)
        gaps.append((known[-1] - known[-2]) / mutual_info_score(factor, factor))
    return float(np.mean(gaps))


def dci(codes: Codes, factors: Factors, seed: int = 0) -> dict[str, float]:
    """Disentanglement, completeness and informativeness (Eastwood and Williams 2018), by a forest for each factor.

    A code is disentangled if it matters for one factor alone, a factor's code complete if one number holds it;
    informativeness is the accuracy on the half of the rows that the forests have not seen. Errors as ``mig``'s.
    """
    codes, factors = _checked(codes, factors)
    order = np.random.default_rng(seed).permutation(len(codes))
    train, test = np.split(order, [len(order) // 2])
    weights, right = [], []
    for factor in factors.T:
        forest = ExtraTreesClassifier(30, min_samples_leaf=2, max_features=None, random_state=seed)
        forest.fit(codes[train], factor[train])
        weights.append(forest.feature_importances_)
        right.append(forest.score(codes[test], factor[test]))
    importance = np.stack(weights, 1) + 1e-12  # [Z, K]
    return {
        "disentanglement": _sharpness(importance),
        "completeness": _sharpness(importance.T),
        "informativeness": float(np.mean(right)),
    }


def _sharpness(importance: np.ndarray) -> float:
    """1 minus the entropy of each row as shares (in units of its largest), weighted by the rows' sums."""
    shares = importance / importance.sum(1, keepdims=True)
    entropy = -(shares * np.log(shares)).sum(1) / np.log(importance.shape[1])
    return float(((1 - entropy) * importance.sum(1)).sum() / importance.sum())


def sap(codes: Codes, factors: Factors) -> float:
    """Separated attribute predictability (Kumar et al. 2018): the gap between the best and the second code, alone.

    A code predicts a factor by the share of its variance that lies between the factor's values (the correlation
    ratio): never less than the squared correlation of a line, and the same for factors without order. Errors as
    ``mig``'s.
    """
    codes, factors = _checked(codes, factors)
    gaps = []
    for factor in factors.T:
        known = sorted(_ratio(c, factor) for c in codes.T)
        gaps.append(known[-1] - known[-2])
    return float(np.mean(gaps))


def factor_vae_score(codes: Codes, factors: Factors, votes: int = 800, batch: int = 64, seed: int = 0) -> float:
    """Accuracy of a majority vote (Kim and Mnih 2018): which factor is held still, by the code that varies least.

    Half of the votes make the rule, the other half test it. Codes that hardly vary at all do not vote. Errors as
    ``mig``'s.
    """
    codes, factors = _checked(codes, factors)
    rng, spread = np.random.default_rng(seed), codes.std(0)
    alive = np.flatnonzero(spread > 0.05 * spread.max())
    scaled = codes[:, alive] / spread[alive]
    rows = {(k, v): np.flatnonzero(factors[:, k] == v) for k in range(factors.shape[1]) for v in set(factors[:, k])}
    table = np.zeros((2, len(alive), factors.shape[1]))
    for vote in range(votes):
        k = rng.integers(factors.shape[1])
        held = rows[k, factors[rng.integers(len(factors)), k]]
        stillest = scaled[rng.choice(held, batch)].var(0).argmin()
        table[vote % 2, stillest, k] += 1
    rule = table[0].argmax(1)
    return float(table[1][np.arange(len(alive)), rule].sum() / table[1].sum())


def all_scores(codes: Codes, factors: Factors) -> dict[str, float]:
    """{"mig", "disentanglement", "completeness", "informativeness", "sap", "factor_vae"}."""
    scores = {"mig": mig(codes, factors)} | dci(codes, factors)
    return scores | {"sap": sap(codes, factors), "factor_vae": factor_vae_score(codes, factors)}


def _ratio(code: np.ndarray, factor: np.ndarray) -> float:
    """The variance of the classes' means, as a share of all variance."""
    if code.std() < 1e-12:
        return 0.0
    within = sum(((code[factor == v] - code[factor == v].mean()) ** 2).sum() for v in set(factor))
    return float(1 - within / ((code - code.mean()) ** 2).sum())


def _checked(codes: Codes, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    codes, factors = np.asarray(codes, dtype=float), np.asarray(factors)
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors):
        raise ValueError(
            f"Codes must be [N, Z] and factors [N, K] of the same rows, got {list(codes.shape)}, {list(factors.shape)}."
        )
    if codes.shape[1] < 2 or factors.shape[1] < 2:
        raise ValueError(f"Scores need two codes and two factors, got {codes.shape[1]} and {factors.shape[1]}.")
    if constant := [k for k, factor in enumerate(factors.T) if len(set(factor)) < 2]:
        raise ValueError(f"Factor {constant[0]} has one value in all rows: leave it out.")
    return codes, factors
