"""The game of a critic and a maker, against the gradients of both."""

import pytest
import torch
from torch import nn

from predoc_lib.adversarial import game


def test_the_critic_descends_what_the_maker_climbs():
    torch.manual_seed(0)
    critic, made, true = nn.Linear(3, 1), torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    loss = game(critic, made, true)
    loss.backward()
    honest = -critic(true).sigmoid().log().mean() - (1 - critic(made).sigmoid()).log().mean()
    assert loss.item() == pytest.approx(honest.item())
    wanted, *of_critic = torch.autograd.grad(honest, [made, *critic.parameters()])
    torch.testing.assert_close(made.grad, -wanted)
    for p, gradient in zip(critic.parameters(), of_critic, strict=True):
        torch.testing.assert_close(p.grad, gradient)
