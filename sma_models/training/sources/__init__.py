"""Where a recipe's data come from: plugins of the kind ``data``, so that a recipe can name anyone's."""

from sma_models.training.sources.base import Data, Task, cache_folder, classification

__all__ = ["Data", "Task", "cache_folder", "classification"]
