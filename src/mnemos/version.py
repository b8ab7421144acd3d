"""The version of Mnemos."""

__version__ = "0.1.0"
