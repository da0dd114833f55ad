"""Experiments that answer questions about sparse activation; they use the packages and are never used by them."""
