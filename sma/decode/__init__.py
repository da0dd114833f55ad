"""Decoding in place: one token of every sequence at a time, see :mod:`sma.steppers`."""
