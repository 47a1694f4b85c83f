"""Measures the tool against `onnxruntime.quantization` on the models of the zoo; see `python -m tools.bench -h`."""
