"""Every registered norm obeys the laws."""

from __future__ import annotations

from sma.testing import NormSuite
from sma_modules.norms import BatchNorm, LayerNorm, RMSNorm, ScaleNorm, SyncBatchNorm
from tests.laws.table import covers


class TestLayerNorm(NormSuite):
    config = LayerNorm.Config()


class TestLayerNormNotAffine(NormSuite):
    config = LayerNorm.Config(affine=False)


class TestRMSNorm(NormSuite):
    config = RMSNorm.Config()


class TestScaleNorm(NormSuite):
    config = ScaleNorm.Config()


class TestBatchNorm(NormSuite):
    config = BatchNorm.Config()


class TestSyncBatchNorm(NormSuite):
    config = SyncBatchNorm.Config()


test_every_norm_is_here = covers("norm", globals())
