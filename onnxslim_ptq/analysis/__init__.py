"""Measuring quantized models: errors of outputs, verification, comparison."""
