"""Transfer learning for images that behaves like scikit-learn."""

from sktransfer._version import __version__

__all__ = ["__version__"]
