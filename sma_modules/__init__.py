"""The modules, mixers and norms that ship with sma, registered by the same hook as those of any other package."""
