"""XLFA: cross-lingual feature aggregation. What trains, evaluates and publishes the models of `modeling_xlfa`."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("xlfa")
except PackageNotFoundError:
    __version__ = "0.0.0+source"
