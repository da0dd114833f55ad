"""Data: from raw files to batches; no model code."""
