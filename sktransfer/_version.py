"""The version of sktransfer, read by the build and by `sktransfer.__version__`."""

__version__ = "0.1.0"
