"""The modules, mixers and norms that ship with sma, registered through the same door as anyone's."""
