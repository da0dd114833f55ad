"""Data: from raw files to batches; no model code.

A module for each source (:mod:`.listops`, :mod:`.text`, :mod:`.image`, :mod:`.speech`, :mod:`.retrieval`,
:mod:`.pathfinder`, :mod:`.lm`) has a ``load`` that reads the layout of the official release; :mod:`.download` gets
those releases; :mod:`.datasets` says what a batch holds and :mod:`.batching` which samples are in it.
"""
