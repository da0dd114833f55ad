"""Latent configurators decide which tokens are active, and with which confidence. :mod:`sma.plugin` registers them."""

from sma.configurators.always import Always
from sma.configurators.budget import RateController, RateLoss
from sma.configurators.expert_choice import ExpertChoice
from sma.configurators.fixed_rate import FixedRate
from sma.configurators.gumbel_softmax import GumbelSoftmax
from sma.configurators.replay import Replay, load_routings, save_routings
from sma.configurators.sigmoid import Sigmoid
from sma.configurators.tempered_softmax import TemperedSoftmax
from sma.configurators.top_k import TopK

__all__ = [
    "Always",
    "ExpertChoice",
    "FixedRate",
    "GumbelSoftmax",
    "RateController",
    "RateLoss",
    "Replay",
    "Sigmoid",
    "TemperedSoftmax",
    "TopK",
    "load_routings",
    "save_routings",
]
