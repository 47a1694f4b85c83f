"""Exports EfficientNet-Lite0; usage: export_effnet.py OUT CODE_FOLDER WEIGHTS torchscript|dynamo."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def main(out: str, code: str, weights: str, exporter: str) -> None:
    """Write OUT/model.onnx: opset 13 by the TorchScript exporter, or opset 20 and external data by dynamo."""
    sys.path.insert(0, code)
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    path, image = str(Path(out) / "model.onnx"), torch.randn(2, 3, 224, 224)
    names = {"input_names": ["x"], "output_names": ["logits"]}
    with torch.no_grad():
        if exporter == "dynamo":
            batch = torch.export.Dim("n", min=1, max=1024)
            torch.onnx.export(
                model, (image,), path, dynamo=True, opset_version=20, external_data=True,
                dynamic_shapes=({0: batch},), **names,
            )  # fmt: skip
        else:
            axes = {"x": {0: "n"}, "logits": {0: "n"}}
            torch.onnx.export(
                model, (image,), path, dynamo=False, opset_version=13, dynamic_axes=axes, **names
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
