"""Always-on sequence layers: class, streaming state and stepper of each in one file."""
