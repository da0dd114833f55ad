"""The release of Long Range Arena (Tay et al. 2020, arXiv 2011.04006), which holds several data sets."""

from __future__ import annotations

from sma_models.training.data.release import Release, Resource

# 7.7 GB with ListOps, Retrieval and Pathfinder; no checksum was ever published, and the address has at times
# answered 403. ListOps needs no download: see listops.generate.
RELEASE = Release(
    name="Long Range Arena",
    folder="lra_release",
    resources=(
        Resource(url="https://storage.googleapis.com/long-range-arena/lra_release.gz", known_hash=None, unpack="tar"),
    ),
    licence="Apache 2.0 for the code; none is stated for the data",
)
