"""Data: from raw files to batches; no model code.

One module for each data set that a recipe can name: :mod:`.listops`, :mod:`.text`, :mod:`.image`, :mod:`.idx`,
:mod:`.speech`, :mod:`.pathfinder`, :mod:`.retrieval`, :mod:`.enwik8`, :mod:`.stdlib`, :mod:`.files`. It holds the
release, the reader (``load``) and the plugin of the kind ``data``.

What they share: :mod:`.base` is the plugin class, :mod:`.release` says where published files come from and
:mod:`.download` gets them, :mod:`.reading` refuses broken files. :mod:`.labelled` and :mod:`.language` hold the
samples, :mod:`.batches` says what a batch is and :mod:`.batching` which samples are in it. :mod:`.testing` tests a data
set.
"""
