"""MiMIc: minimize what a critic says of the interaction among a layer's channels (the report's chapter 7)."""

from predoc_lib.mimic.critic import Critic, CriticError, mutual_interaction
from predoc_lib.mimic.plugin import MiMIc, MiMIcError

__all__ = ["Critic", "CriticError", "MiMIc", "MiMIcError", "mutual_interaction"]
