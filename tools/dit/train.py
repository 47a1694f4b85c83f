"""Train the diffusion transformer of this folder on handwritten digits and export it.

    pip install torch==2.13.0 scikit-learn onnx onnxruntime
    python -m tools.dit.train

Data: `sklearn.datasets.load_digits`, 1797 grey 8x8 images (Alpaydin and Kaynak, "Optical Recognition of Handwritten
Digits", UCI Machine Learning Repository, CC BY 4.0), all of them: what is generated is compared with what the float
model generates, not with the data.

Network: patches of 2x2, four blocks of width 48. Attention stands behind a LayerNorm that time and label scale and
shift (adaLN), the perceptron behind a LayerNorm with constants of its own; both branches have a gate, zero at first
(Peebles and Xie, "Scalable Diffusion Models with Transformers"). Modules are named as in diffusers. The average of the
weights over the last part of the training is exported: TorchScript, opset 17, dynamic batch.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from .sampling import CLASSES, MODEL, TIMES, angle, sample

SEED = 0
WIDTH, HEADS, DEPTH, PATCH, SIDE = 48, 4, 4, 2, 8
_DECAY = 0.999


class Attention(nn.Module):
    """Softmax attention of all patches to all patches."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).reshape(x.shape[0], -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS), dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Attention behind adaLN, then a perceptron behind a LayerNorm; ``condition`` opens both gates."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.adaln = nn.Linear(WIDTH, 4 * WIDTH)
        nn.init.zeros_(self.adaln.weight)
        nn.init.zeros_(self.adaln.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate1, gate2 = self.adaln(condition)[:, None].chunk(4, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale) + shift)
        return x + gate2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DiT(nn.Module):
    """Velocity [batch, 1, 8, 8] of a noisy image [batch, 1, 8, 8] at a time and for a label, both int64 [batch]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, WIDTH) * 0.02)
        self.time1, self.time2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.label = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm_out = nn.LayerNorm(WIDTH)
        self.proj_out = nn.Linear(WIDTH, PATCH * PATCH)
        half = torch.arange(WIDTH // 2) / (WIDTH // 2)
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * half))

    def forward(self, image: Tensor, time: Tensor, label: Tensor) -> Tensor:
        waves = time[:, None].float() * self.frequencies
        embedded = self.time2(F.silu(self.time1(torch.cat([waves.cos(), waves.sin()], dim=-1))))
        condition = F.silu(embedded + self.label(label))
        x = self.patches(image).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition)
        side = SIDE // PATCH
        x = self.proj_out(self.norm_out(x)).reshape(-1, side, side, PATCH, PATCH)
        return x.permute(0, 1, 3, 2, 4).reshape(-1, 1, SIDE, SIDE)


def train(images: Tensor, labels: Tensor, steps: int, batch: int) -> DiT:
    """AdamW on the squared error of the velocity; returns the running average of the weights."""
    rng = torch.Generator().manual_seed(SEED)
    net = DiT()
    average = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    total = 0.0
    for step in range(1, steps + 1):
        index = torch.randint(len(images), (batch,), generator=rng)
        time = torch.randint(TIMES, (batch,), generator=rng)
        noise = torch.randn(batch, 1, SIDE, SIDE, generator=rng)
        phase = torch.from_numpy(angle(time.numpy()).astype(np.float32))[:, None, None, None]
        clean = images[index]
        noisy = phase.cos() * clean + phase.sin() * noise
        loss = F.mse_loss(net(noisy, time, labels[index]), phase.cos() * noise - phase.sin() * clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for kept, value in zip(average.parameters(), net.parameters(), strict=True):
                kept.lerp_(value, 1 - min(_DECAY, step / (step + 10)))
        total += float(loss.detach())
        if step % 500 == 0:
            print(f"step {step:5d}  loss {total / 500:.4f}", flush=True)
            total = 0.0
    return average.eval()


def export(net: DiT, path: Path) -> None:
    """Write the network with its three inputs."""
    inputs = (torch.zeros(2, 1, SIDE, SIDE), torch.tensor([3, 900]), torch.tensor([1, 2]))
    names = ["image", "time", "label"]
    torch.onnx.export(
        net, inputs, path, dynamo=False, opset_version=17, input_names=names, output_names=["velocity"],
        dynamic_axes={name: {0: "batch"} for name in [*names, "velocity"]},
    )  # fmt: skip
    onnx.checker.check_model(str(path), full_check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="train and export the diffusion transformer on digits")
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # layers this small gain nothing from more
    torch.use_deterministic_algorithms(True)
    digits = load_digits()
    images = torch.from_numpy((digits.images / 8 - 1).astype(np.float32)[:, None])
    net = train(images, torch.from_numpy(digits.target.astype(np.int64)), args.steps, args.batch)
    export(net, args.out)

    session = ort.InferenceSession(args.out, providers=["CPUExecutionProvider"])
    seen = sample(lambda _, feed: session.run(None, dict(feed))[0], range(100))
    flat, data = torch.from_numpy(seen).flatten(1), images.flatten(1)
    nearest = torch.cdist(flat, data).argmin(dim=1)
    right = int((torch.from_numpy(digits.target)[nearest] == torch.arange(100) % CLASSES).sum())
    print(f"parameters          {sum(p.numel() for p in net.parameters()):,}")
    print(f"{args.out.name:19} {args.out.stat().st_size:,} bytes")
    print(f"generated images    {right} of 100 have a nearest real image of the digit that was asked for")


if __name__ == "__main__":
    main()
