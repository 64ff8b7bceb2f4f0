"""What is measured of predicted features: the boxes that the detector reads off them, against the true ones."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from predoc_lib.experiments.yolo_clips import AHEAD, CONTEXT, TRAINED, Unseen
from predoc_lib.metrics import Boxes, mean_average_precision
from predoc_lib.yolo import Darknet, Detections, non_max_suppression
from predoc_lib.yolo.dynamics import Features, Predictor
from predoc_lib.yolo.futures import RandomFeatureODE
from predoc_lib.yolo.scoring import Matched, match
from predoc_lib.yolo.tracking import extrapolate

RANKED = 0.01  # boxes above this confidence are ranked
BATCH = 32
SPANS = {"trained": (1, TRAINED), "beyond": (TRAINED + 1, int(AHEAD[-1]))}  # whole frames ahead, first and last
Found = list[list[Detections]]  # [time][clip]


@torch.no_grad()
def boxes(network: Darknet, features: list[Float[Tensor, "B _ _ _"]]) -> list[Detections]:
    """What the heads find in features [B, c, h, w]; the most that is ranked."""
    return [found.cpu() for found in non_max_suppression(network.heads(features), confidence=RANKED)]


@torch.no_grad()
def predicted(network: Darknet, predictor: Predictor, unseen: Unseen) -> Found:
    """What the heads find in predicted features at every time of ``AHEAD``."""
    device = unseen.context[0].device
    t, ahead = torch.arange(float(CONTEXT), device=device), AHEAD.to(device) + CONTEXT - 1
    found: Found = [[] for _ in AHEAD]
    for start in range(0, len(unseen), BATCH):
        context = [x[start : start + BATCH].float() for x in unseen.context]
        features = predictor.predict(context, t, ahead)
        for i, at in enumerate(found):
            at += boxes(network, [x[:, i] for x in features])
    return found


def detected(network: Darknet, features: Features) -> Found:
    """What the heads find in true frames' features [N, T, c, h, w]; in those of the future, it is the ceiling."""
    found = []
    for i in range(features[0].shape[1]):
        parts = zip(*(x[:, i].split(BATCH) for x in features), strict=True)
        found.append([one for part in parts for one in boxes(network, [x.float() for x in part])])
    return found


def tracked(network: Darknet, unseen: Unseen) -> Found:
    """What the heads find in the frames seen, carried on evenly in space: no feature is predicted."""
    t, ahead = torch.arange(float(CONTEXT)), AHEAD + CONTEXT - 1
    clips = zip(*detected(network, unseen.context), strict=True)
    return [list(at) for at in zip(*(extrapolate(seen, t, ahead) for seen in clips), strict=True)]


def true_boxes(unseen: Unseen, found: Found, labels_above: float) -> list[list[Boxes]]:
    """The true objects at every time of ``AHEAD``; where nobody knows them, what the detector found above that."""
    if unseen.objects:
        return [list(at) for at in zip(*unseen.objects, strict=True)]
    return [[one.above(labels_above) for one in at] for at in found]


def found_by(network: Darknet, predictors: Mapping[str, Predictor], unseen: Unseen) -> dict[str, Found]:
    """What predictors find, what the "detector" finds on the true future frames, and the "tracked" boxes."""
    found = {name: predicted(network, predictor, unseen) for name, predictor in predictors.items()}
    return found | {"detector": detected(network, unseen.future), "tracked": tracked(network, unseen)}


def precisions(
    network: Darknet, predictors: Mapping[str, Predictor], unseen: Unseen, labels_above: float
) -> dict[str, dict[str, dict[str, float]]]:
    """{frames ahead: {method: {"map50", "map"}}}, all methods of ``found_by``."""
    found = found_by(network, predictors, unseen)
    truth = true_boxes(unseen, found["detector"], labels_above)
    return precisions_of(found, truth)


def measure(
    network: Darknet, predictors: Mapping[str, Predictor], test: Unseen, validation: Unseen, labels_above: float
) -> dict[str, Any]:
    """Figures of all methods of ``found_by``.

    Returns:
        "truth", if the true objects are known, and "own", against the detector's own boxes above ``labels_above``:
        {frames ahead: {method: {"map50", "map"}}}. Of the truth, or else of the own boxes, "f1": {span: {method:
        {"precision", "recall", "f1", "right", "false"}}} at the "threshold" of each method, which is the best on the
        validation clips; "missed": {span: {...}}, see ``missed``.
    """
    found = found_by(network, predictors, test)
    truth = true_boxes(test, found["detector"], labels_above)
    truths = {"own": truth}
    if test.objects:
        truths = {"truth": truth, "own": [[one.above(labels_above) for one in at] for at in found["detector"]]}
    figures: dict[str, Any] = {name: precisions_of(found, truth) for name, truth in truths.items()}
    held_out = found_by(network, predictors, validation)
    wanted = true_boxes(validation, held_out["detector"], labels_above)
    every = (1, int(AHEAD[-1]))
    figures["threshold"] = {name: pooled(at, wanted, every).best_threshold() for name, at in held_out.items()}
    figures["f1"], figures["missed"] = {}, {}
    for span, ends in SPANS.items():
        matched = {name: pooled(at, truth, ends) for name, at in found.items()}
        figures["f1"][span] = {name: m.above(figures["threshold"][name]) for name, m in matched.items()}
        if test.objects:
            figures["missed"][span] = missed(matched, figures["threshold"])
    return figures


@torch.no_grad()
def futures(
    network: Darknet, model: RandomFeatureODE, unseen: Unseen, labels_above: float, n: int, seed: int
) -> dict[str, dict[str, float]]:
    """How different n drawn futures are, and how good one of them, and the best of them, is.

    Returns:
        {frames ahead: {...}}: "one", mAP50 of a draw, the mean of n; "best", of the draw whose features are nearest
        to the true ones over all times, clip by clip; and in the channels' units the standard deviation of the draws,
        "spread", and the root mean square error of their mean, "error".
    """
    device = unseen.context[0].device
    t, ahead = torch.arange(float(CONTEXT), device=device), AHEAD.to(device) + CONTEXT - 1
    truth = true_boxes(unseen, detected(network, unseen.future), labels_above)
    found: list[Found] = [[[] for _ in AHEAD] for _ in range(n)]
    best: Found = [[] for _ in AHEAD]
    squares: dict[str, list[Tensor]] = {"spread": [], "error": []}
    torch.manual_seed(seed)
    for start in range(0, len(unseen), BATCH):
        context, future = ([x[start : start + BATCH].float() for x in y] for y in (unseen.context, unseen.future))
        drawn = [torch.stack(x) for x in zip(*model.futures(context, t, ahead, n), strict=True)]
        scaled = [x / scale for x, scale in zip(drawn, model.scales, strict=True)]
        true = [y / scale for y, scale in zip(future, model.scales, strict=True)]
        squares["spread"].append(_mean([x.var(0) for x in scaled]))
        squares["error"].append(_mean([(x.mean(0) - y).square() for x, y in zip(scaled, true, strict=True)]))
        errors = [_mean([(x[k] - y).square() for x, y in zip(scaled, true, strict=True)]).mean(1) for k in range(n)]
        nearest = torch.stack(errors).argmin(0).tolist()
        for i in range(len(AHEAD)):
            draws = [boxes(network, [x[k, :, i] for x in drawn]) for k in range(n)]
            for k in range(n):
                found[k][i] += draws[k]
            best[i] += [draws[k][clip] for clip, k in enumerate(nearest)]
    means = {name: torch.cat(parts).mean(0).sqrt().tolist() for name, parts in squares.items()}
    return {
        f"{at:g}": {
            "one": sum(_defined(mean_average_precision(draw[i], truth[i]))["map50"] for draw in found) / n,
            "best": _defined(mean_average_precision(best[i], truth[i]))["map50"],
            **{name: values[i] for name, values in means.items()},
        }
        for i, at in enumerate(AHEAD.tolist())
    }


def _mean(heads: list[Float[Tensor, "B T _ _ _"]]) -> Float[Tensor, "B T"]:
    """The mean over all numbers of all heads."""
    return sum(x.sum((2, 3, 4)) for x in heads) / sum(x[0, 0].numel() for x in heads)


def precisions_of(found: dict[str, Found], truth: list[list[Boxes]]) -> dict[str, dict[str, dict[str, float]]]:
    """{frames ahead: {method: {"map50", "map"}}}, from what methods find at every time of ``AHEAD``."""
    return {
        f"{ahead:g}": {name: _defined(mean_average_precision(at[i], truth[i])) for name, at in found.items()}
        for i, ahead in enumerate(AHEAD.tolist())
    }


def _defined(row: dict[str, float]) -> dict[str, float]:
    """The same, 0 where there is nothing to be found."""
    return {key: 0.0 if math.isnan(value) else value for key, value in row.items()}


def pooled(found: Found, truth: list[list[Boxes]], ends: tuple[int, int]) -> Matched:
    """The matches at all whole frames ahead from the first to the last of ``ends``."""
    times = [i for i, ahead in enumerate(AHEAD.tolist()) if ahead.is_integer() and ends[0] <= ahead <= ends[1]]
    return match([one for i in times for one in found[i]], [one for i in times for one in truth[i]])


def missed(matched: dict[str, Matched], thresholds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Of the true objects that the detector misses on the true frame: how many each method finds, at which price.

    Returns:
        {method: {"found", "false", "lower"}}, and "detector": {"missed", "false"}. "false" are the method's false
        boxes; "lower" is how many of the missed the detector itself finds on the true frame, at a threshold so low
        that it has as many false boxes.
    """
    detector = matched["detector"]
    hidden = detector.finds <= thresholds["detector"]
    figures = {"detector": {"missed": int(hidden.sum()), "false": detector.above(thresholds["detector"])["false"]}}
    wrong = detector.scores[~detector.right]
    for name, m in matched.items():
        if name == "detector":
            continue
        false = m.above(thresholds[name])["false"]
        lower = float(wrong[false]) if false < len(wrong) else 0.0  # the first false box too many is not above it
        figures[name] = {
            "found": int((hidden & (m.finds > thresholds[name])).sum()), "false": false,
            "lower": int((hidden & (detector.finds > min(lower, thresholds["detector"]))).sum()),
        }  # fmt: skip
    return figures
