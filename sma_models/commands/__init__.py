"""The commands of ``sma``. They import what they need when they run, so that ``sma --help`` is quick."""
