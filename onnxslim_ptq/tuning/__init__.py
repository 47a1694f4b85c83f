"""``tune``: the recipe, and the fewest multiply-accumulates in float, that reach a goal."""

from onnxslim_ptq.tuning.search import Tuned, tune, tune_as

__all__ = ["Tuned", "tune", "tune_as"]
