"""The errors of the library. Every message names the place, the rule and the value."""


class SMAError(Exception):
    """Base of every error that the library raises on purpose: the input is wrong, not the program."""


class ConfigError(SMAError, ValueError):
    """A configuration value is out of range, of the wrong type, or does not fit its neighbours."""


class SpecError(ConfigError):
    """A spec (YAML, mapping or OmegaConf node) cannot be turned into a configuration."""


class SizeError(ConfigError):
    """A configuration asks for more memory than the machine has, or for sizes beyond 64 bits."""


class PluginError(SMAError):
    """A plugin cannot be found, imported or registered."""


class ShapeError(SMAError, ValueError):
    """A tensor has the wrong shape, dtype or device, or holds values that are not allowed."""


class RoutingError(SMAError, ValueError):
    """A routing or a replayed decision does not fit the tokens it is applied to."""


class StreamingError(SMAError):
    """A module was asked to stream and cannot, or a state does not fit the module it is given to."""


class BackendError(SMAError):
    """An operation was forced onto a backend that cannot run it."""


class ExportError(SMAError):
    """A model cannot be exported; the message names the part and says why."""


class CheckpointError(SMAError):
    """A checkpoint is truncated, of another spec, or has missing or unexpected keys."""


class DataError(SMAError):
    """A data file is missing, empty, truncated or in the wrong encoding or format."""


class MissingExtraError(SMAError, ImportError):
    """A feature needs an optional extra that is not installed; the message says how to install it."""
