"""The errors that a person can cause.

Every message is one line that says what was wrong, where, and what would be right; the command line prints it and exits
with code 2. This module knows nothing else of vidar.
"""


class VidarError(Exception):
    """Base of all errors that vidar raises on purpose."""


class ConfigError(VidarError):
    """A configuration that cannot be run: an unknown key, a wrong type, or choices that exclude each other."""


class DataError(VidarError):
    """Data that is missing, truncated or not what the configuration says."""


class CheckpointError(VidarError):
    """A checkpoint, or another file of a run, that cannot be written or read."""


class DivergenceError(VidarError):
    """Too many non-finite training steps in a row."""
