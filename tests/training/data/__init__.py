"""Tests of the data: readers, batches, downloads."""
