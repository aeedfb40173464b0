"""The package's version, where it stands once."""

__version__ = "0.1.0"
