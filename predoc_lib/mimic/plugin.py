"""MiMIc as a plug-in: critics on any layers of any network (eq. 7.2)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from predoc_lib.mimic.critic import Critic, mutual_interaction, variable
from predoc_lib.naming import unknown


class MiMIcError(ValueError):
    """A layer that no critic can be attached to, or a penalty that is asked for too early: it says what to do."""


class MiMIc(nn.Module):
    """Critics that watch layers of a network while it is trained, and what the network pays for their word.

    Three lines, with any optimizer::

        mimic = MiMIc(model, layers=["layer3", "avgpool"], weight=0.1, example=images)
        mimic.join(optimizer)
        loss = cross_entropy(model(images), labels) + mimic.loss()  # then backward and step, as ever

    ``loss`` is ``penalty() + critic_loss()``: the first moves the model alone, the second the critics alone.
    For data-parallel training and for a checkpoint, let the MiMIc be a part of the module that is wrapped and saved.

    Args:
        model: any network; its layers are watched by forward hooks, and it is otherwise left alone.
        layers: their names, as ``model.named_modules()`` has them.
        weight: of the sum over the layers in ``penalty``.
        example: an input of the model, on which it is called once to learn how many channels there are; None: the
            critics are made at the first batch.
        gradient_penalty: weight of (|grad T| - 1)^2 in the critics' loss; 0: none.
        options: of every ``Critic``: width, depth, kind, bound, spectral, average.

    Raises:
        MiMIcError: a layer that does not exist; its output is not a tensor; in evaluation mode nothing is to be paid.
        CriticError: features that no critic can judge, see ``critic.variable``.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], weight: float = 0.1, *, example: Tensor | None = None,
        gradient_penalty: float = 0.0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        modules = {name: module for name, module in model.named_modules() if name}
        layers = [layers] if isinstance(layers, str) else list(layers)
        if not layers:
            raise MiMIcError(f"Name at least one layer; the model has {', '.join(modules)}.")
        for name in layers:
            if name not in modules:
                raise MiMIcError(unknown("layer", name, modules))
        if repeated := [name for name in layers if layers.count(name) > 1]:
            raise MiMIcError(f"Layer {repeated[0]!r} is named twice: name each once.")
        self.weight, self.gradient_penalty, self.options = weight, gradient_penalty, options
        self.critics = nn.ModuleDict()
        self.features: dict[str, Tensor] = {}
        self._names = layers
        self._watched = [model]  # in a list, so that the model is not a part of this module
        self._handles: list[RemovableHandle] = [
            modules[name].register_forward_hook(self._hook(name)) for name in layers
        ]
        if example is not None:
            try:
                with torch.no_grad(), _evaluating(model):
                    model(example)
            except BaseException:  # the model is left alone
                self.remove()
                raise
            self.features = {}

    def penalty(self, generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """``weight`` times the sum of the critics' words on the last batch; its gradient reaches the model alone."""
        if not self._watched[0].training:
            raise MiMIcError("The model is in evaluation mode, where nothing is minimized: call model.train() first.")
        return self.weight * torch.stack(list(self.interactions(generator).values())).sum()

    def interactions(self, generator: torch.Generator | None = None) -> dict[str, Float[Tensor, ""]]:
        """{layer: its critic's word on the last batch, nats}, see ``mutual_interaction``."""
        features = self._seen()
        with self.frozen():
            return {name: mutual_interaction(self._critic(name), features[name], generator) for name in self._names}

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """No gradient for the critics, inside the block."""
        parameters = [p for p in self.critics.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def critic_loss(self, generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """What the critics minimize, summed over the layers, on the last batch; its gradient reaches them alone."""
        features = self._seen()
        losses = [self._critic(n).loss(features[n], self.gradient_penalty, generator) for n in self._names]
        return torch.stack(losses).sum()

    def loss(self, generator: torch.Generator | None = None) -> Float[Tensor, ""]:
        """``penalty() + critic_loss()``: what one optimizer minimizes beside the task's loss."""
        return self.penalty(generator) + self.critic_loss(generator)

    def join(
        self, optimizer: torch.optim.Optimizer, learning_rate: float = 3e-3, steps: int = 1,
        loss: Callable[[], Float[Tensor, ""]] | None = None,
    ) -> None:  # fmt: skip
        """Give the critics to the model's optimizer, as a group of its own.

        Args:
            optimizer: of the model.
            learning_rate: of the critics.
            steps: of the critics for one of the model. The further ones follow each ``optimizer.step``, on the features
                of the same batch, shuffled anew; processes of ``torch.distributed`` average their gradients.
            loss: what the critics minimize in these; None: ``critic_loss``.

        Raises:
            MiMIcError: the critics do not exist yet.
        """
        if len(self.critics) < len(self._names):
            raise MiMIcError("There are no critics yet: give an example, or call the model once, before join.")
        optimizer.add_param_group({"params": list(self.critics.parameters()), "lr": learning_rate})
        alone = False  # the critics are at it

        def further(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            nonlocal alone
            if alone:
                return
            alone = True
            for _ in range(steps - 1):
                optimizer.zero_grad()  # parameters without a gradient stay where they are
                with torch.enable_grad():
                    (loss or self.critic_loss)().backward()
                self._average()
                optimizer.step()
            alone = False

        self._handles.append(optimizer.register_step_post_hook(further))

    def _average(self) -> None:
        if torch.distributed.is_initialized():
            for parameter in self.critics.parameters():
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= torch.distributed.get_world_size()

    def remove(self) -> None:
        """Detach from the model, which is then as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.features = [], {}

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise MiMIcError(
                    f"Layer {name!r} returns a {type(output).__name__}, and a critic needs one tensor: name a layer "
                    "inside it that returns one."
                )
            if name not in self.critics_by_layer():
                channels = variable(output.detach()[:2].expand(max(2, len(output[:2])), *output.shape[1:])).shape[1]
                self.critics[_key(name)] = Critic(channels, **self.options).to(output.device)
            self.features[name] = output.clone()  # what follows may change it in place

        return keep

    def critics_by_layer(self) -> dict[str, Critic]:
        """{layer: its critic}, of those that exist."""
        return {name: self.critics[_key(name)] for name in self._names if _key(name) in self.critics}

    def _critic(self, name: str) -> Critic:
        return self.critics[_key(name)]

    def _seen(self) -> dict[str, Tensor]:
        missing = [name for name in self._names if name not in self.features]
        if missing:
            raise MiMIcError(f"Layer {missing[0]!r} has seen no batch yet: call the model first.")
        return self.features


def _key(name: str) -> str:
    """A name that a part of a ``ModuleDict`` may have: layers' names have dots, or are those of its methods."""
    key = name.replace(".", "/")
    return f"{key}/" if hasattr(nn.ModuleDict, key) else key


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, inside the block: a call then changes no running statistics."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
