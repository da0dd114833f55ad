"""What a model activates and what that saves: tables, baselines, figures, the text heat map.

Figures need the extra ``plot``; everything else runs without it.
"""

from sma_models.reports.compression import TrigramModel, baselines, gzip_bits_per_byte, xz_bits_per_byte
from sma_models.reports.figures import activation_picture, loss_curve, rates_by_layer, rates_over_training
from sma_models.reports.heat_map import text_heat_map
from sma_models.reports.tables import (
    RateSummary,
    compression_table,
    operations_table,
    rates_table,
    summarise_rates,
)

__all__ = [
    "RateSummary",
    "TrigramModel",
    "activation_picture",
    "baselines",
    "compression_table",
    "gzip_bits_per_byte",
    "loss_curve",
    "operations_table",
    "rates_by_layer",
    "rates_over_training",
    "rates_table",
    "summarise_rates",
    "text_heat_map",
    "xz_bits_per_byte",
]
