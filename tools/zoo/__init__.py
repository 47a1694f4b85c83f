"""Real models and labelled data, fetched by package name; see `python -m tools.zoo list`."""

from .case import Case, ZooUnavailable
from .registry import load, names, native

__all__ = ["Case", "ZooUnavailable", "load", "names", "native"]
