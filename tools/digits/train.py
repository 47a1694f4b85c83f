"""Train the handwritten-digit network that `make demo` quantizes, and write every file of this folder.

    pip install torch==2.13.0 scikit-learn onnx onnxruntime
    python tools/digits/train.py

Data: `sklearn.datasets.load_digits`, 1797 grey 8x8 images (Alpaydin and Kaynak, "Optical Recognition of Handwritten
Digits", UCI Machine Learning Repository, CC BY 4.0). A seeded, stratified split keeps 450 images for the measurement;
nothing is chosen by looking at them: the number of epochs is fixed and the last weights are taken.

Network: Conv+BN+Hardswish, two inverted residual blocks (1x1, depthwise 3x3, 1x1, Add), a strided Conv+BN+ReLU,
GlobalAveragePool, Linear. It is exported the awkward way real models arrive: TorchScript, opset 13, dynamic batch,
BatchNormalization left unfused, Hardswish spelled as HardSigmoid and Mul.

Files: `digits.onnx`; `calib/NNN.npz`, 64 training images, each {"image": float32 [1, 1, 8, 8]}; `eval.npz`, the 450
held-out images, {"image": float32 [450, 1, 8, 8], "label": int64 [450]}. Pixels are k/16 with k in 0..16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0
CALIBRATION_SAMPLES = 64
HELD_OUT = 450


def conv_bn(
    c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    """Convolution, batch normalization and, if given, an activation."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([act] if act is not None else []))


class InvertedResidual(nn.Module):
    """x + project(depthwise(expand(x))), the block of MobileNet v2 and v3."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = conv_bn(channels, hidden, 1, act=nn.ReLU())
        self.depthwise = conv_bn(hidden, hidden, 3, groups=hidden, act=nn.Hardswish())
        self.project = conv_bn(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


class DigitNet(nn.Module):
    """42,442 parameters; input [batch, 1, 8, 8] in 0..1, output ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 32, 3, act=nn.Hardswish())
        self.block1 = InvertedResidual(32, 64)
        self.down = conv_bn(32, 64, 3, stride=2, act=nn.ReLU())
        self.block2 = InvertedResidual(64, 96)
        self.head = conv_bn(64, 64, 1, act=nn.Hardswish())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.block2(self.down(self.block1(self.stem(x)))))
        return self.fc(self.dropout(torch.flatten(self.pool(x), 1)))


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """Shift by up to a pixel, rotate by up to 12 degrees, scale by up to 10 %, add a little noise."""
    n = x.shape[0]
    u = 2 * torch.rand(n, 4, generator=rng) - 1
    angle, scale, shift = u[:, 0] * 0.21, 1 + 0.1 * u[:, 1], u[:, 2:] * 0.25
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.cos(angle) * scale
    theta[:, 0, 1], theta[:, 1, 0] = -torch.sin(angle) * scale, torch.sin(angle) * scale
    theta[:, :, 2] = shift
    x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
    return (x + 0.03 * torch.randn(x.shape, generator=rng)).clamp(0, 1)


def train(images: Tensor, labels: Tensor, epochs: int) -> DigitNet:
    """One-cycle AdamW with label smoothing; returns the network in evaluation mode."""
    rng = torch.Generator().manual_seed(SEED)
    net, batch = DigitNet(), 64
    steps = (len(images) + batch - 1) // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=epochs * steps)
    for epoch in range(epochs):
        net.train()
        total = 0.0
        for index in torch.randperm(len(images), generator=rng).split(batch):
            logits = net(augment(images[index], rng))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(index)
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3d}  loss {total / len(images):.4f}", flush=True)
    return net.eval()


def export(net: DigitNet, path: Path) -> None:
    """Write the network as TorchScript leaves it: no folding, so BatchNormalization stays a node of its own."""
    torch.onnx.export(
        net,
        (torch.zeros(1, 1, 8, 8),),
        path,
        dynamo=False,
        opset_version=13,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )
    onnx.checker.check_model(str(path), full_check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="train and export the demo's digit network")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--epochs", type=int, default=120)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    digits = load_digits()
    pixels = (digits.images / 16).astype(np.float32)[:, None]
    x_train, x_eval, y_train, y_eval = train_test_split(
        pixels, digits.target.astype(np.int64), test_size=HELD_OUT, random_state=SEED, stratify=digits.target
    )
    net = train(torch.from_numpy(x_train), torch.from_numpy(y_train), args.epochs)

    out: Path = args.out
    (out / "calib").mkdir(parents=True, exist_ok=True)
    export(net, out / "digits.onnx")
    chosen = np.random.default_rng(SEED).choice(len(x_train), CALIBRATION_SAMPLES, replace=False)
    for i, sample in enumerate(chosen):
        np.savez_compressed(out / "calib" / f"{i:03d}.npz", image=x_train[sample][None])
    np.savez_compressed(out / "eval.npz", image=x_eval, label=y_eval)

    session = ort.InferenceSession(out / "digits.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": x_eval})
    with torch.no_grad():
        worst = float(np.abs(net(torch.from_numpy(x_eval)).numpy() - logits).max())
    right = int((logits.argmax(1) == y_eval).sum())
    print(f"parameters          {sum(p.numel() for p in net.parameters()):,}")
    print(f"held-out accuracy   {right}/{len(y_eval)} = {right / len(y_eval):.2%} (ONNX Runtime)")
    print(f"torch vs ONNX       max abs difference {worst:.2e}")
    print(f"digits.onnx         {(out / 'digits.onnx').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
