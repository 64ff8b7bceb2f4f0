"""What the experiments of MiMIc share: a network and its critics, trained together (eq. 7.2)."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from predoc_lib import training
from predoc_lib.experiments.config import TrainingConfig, option
from predoc_lib.mimic import MiMIc
from predoc_lib.mimic.dependence import dead_channels, effective_rank, gaussian_copula, nearest_neighbours
from predoc_lib.precision import layers_of


@dataclasses.dataclass(frozen=True)
class CriticConfig(TrainingConfig):
    """The parameters of every experiment with critics; a Config adds its own, or other defaults."""

    clip: float = option(0.0, "longest gradient, a longer one is scaled down; 0: none is", low=0)
    critic_rate: float = option(3e-3, "the highest learning rate of the critics", low=1e-8)
    critic_steps: int = option(3, "of the critics for one of the network", low=1)
    critic_width: int = option(128, "of the critics' two hidden layers", low=1)
    bound: str = option("donsker_varadhan", "that the critics raise", choices=("donsker_varadhan", "nwj", "info_nce"))
    spectral: bool = option(False, "normalize the critics' weights by their spectral norms")
    gradient_penalty: float = option(0.0, "weight of (|grad T| - 1)^2 in the critics' loss", low=0)


class Watched(nn.Module):
    """A network and its critics in one module, so that all is trained, shared and saved together."""

    def __init__(self, net: nn.Module, mimic: MiMIc | None) -> None:
        super().__init__()
        self.net, self.mimic = net, mimic


def watch(net: nn.Module, layers: tuple[str, ...], example: Tensor, config: Any, kind: str = "position") -> Watched:
    """The network with critics of a Config's options on its layers; without layers, alone."""
    if not layers:
        return Watched(net, None)
    mimic = MiMIc(
        net, layers, config.weight, example=example, kind=kind, width=config.critic_width, bound=config.bound,
        spectral=config.spectral, gradient_penalty=config.gradient_penalty,
    )  # fmt: skip
    return Watched(net, mimic)


def fit(
    model: Watched, train: Dataset, loss: training.Loss, config: CriticConfig,
    critic_loss: Callable[[], Tensor] | None = None, **options: Any,
) -> training.Fitted:  # fmt: skip
    """``training.fit`` with the critics in the network's optimizer, at their own rate and number of steps.

    Args:
        model, train, loss, options: as ``training.fit``'s.
        config: the parameters.
        critic_loss: what the critics minimize in their further steps; None: ``MiMIc.critic_loss``.
    """
    arguments = config.training(model.net)
    if model.mimic is not None:
        optimizer = arguments["optimizer"]
        model.mimic.join(optimizer, config.critic_rate, config.critic_steps, critic_loss)
        arguments["schedule"] = training.warm_up_cosine(optimizer, config.steps)
    return training.fit(model, train, loss, **arguments, networks=layers_of(model.net), **options)


def describe(x: Float[Tensor, "N F"]) -> dict[str, float]:
    """The dependence of channels, measured without a critic, and whether they are alive."""
    return {
        "copula": gaussian_copula(x),
        "neighbours": nearest_neighbours(x[:, :4]),
        "rank": effective_rank(x),
        "dead": dead_channels(x),
    }
