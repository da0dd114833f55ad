"""Modules that can be sparsely activated: class and stepper of each in one file."""
