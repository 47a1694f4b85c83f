"""Tools for building and measuring onnxslim_ptq; no part of the installed package."""
