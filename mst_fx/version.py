"""The version, where setuptools reads it without importing torch."""

__version__ = "0.1.0"
