"""Images of handwritten digits from noise, by the denoising loop of DDIM with a fixed number of steps.

    x_t = a_t x + s_t e,  a_t = cos(p), s_t = sin(p), p = (t + 1) / 1000 * pi / 2 (cosine schedule, no offset)
    v = a_t e - s_t x is what the model predicts; then x = a_t x_t - s_t v, e = s_t x_t + a_t v

and the next, less noisy image is made of x and e. Nothing is random behind the first noise, so a seed is an image.
Sources: Song et al., "Denoising Diffusion Implicit Models"; Salimans and Ho, "Progressive Distillation" (v).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

MODEL = Path(__file__).with_name("dit.onnx")
TIMES = 1000  # of training
STEPS = 50  # of the loop: indices 0 (noise) to 49
CLASSES = 10

Feed = Mapping[str, np.ndarray]
Run = Callable[[int, Feed], np.ndarray]


def angle(times: np.ndarray) -> np.ndarray:
    """p of the schedule; -1 is the image itself."""
    return (times + 1) / TIMES * (np.pi / 2)


def times_of(steps: int = STEPS) -> np.ndarray:
    """The training time of every step of the loop, falling; the first is (nearly) pure noise."""
    return np.linspace(TIMES - 1, 0, steps + 1).round().astype(np.int64)[:-1]


def noise(seeds: range) -> tuple[np.ndarray, np.ndarray]:
    """For each seed, noise float32 [1, 8, 8] and the digit that it becomes, in turn 0 to 9."""
    images = [np.random.default_rng(seed).standard_normal((1, 8, 8), np.float32) for seed in seeds]
    return np.stack(images), np.array([seed % CLASSES for seed in seeds], np.int64)


def sample(run: Run, seeds: range, steps: int = STEPS) -> np.ndarray:
    """Images float32 [seeds, 1, 8, 8], ink 1 and paper -1; ``run`` gets the step's index and the model's inputs."""
    image, label = noise(seeds)
    times = times_of(steps)
    for index, time in enumerate(times):
        feed = {"image": image, "time": np.full(len(image), time, np.int64), "label": label}
        velocity = run(index, feed)
        now, after = (angle(np.asarray(t, np.float64)) for t in (time, [*times, -1][index + 1]))
        clean = np.cos(now) * image - np.sin(now) * velocity
        error = np.sin(now) * image + np.cos(now) * velocity
        image = (np.cos(after) * clean + np.sin(after) * error).astype(np.float32)
    return image


def decibels(exact: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Signal to noise of each image, [images] in dB; the signal is the image itself, paper -1 and ink 1."""
    axes = tuple(range(1, exact.ndim))
    signal = np.square(exact, dtype=np.float64).sum(axis=axes)
    error = np.square(exact.astype(np.float64) - seen).sum(axis=axes)
    return 10 * np.log10(signal / np.maximum(error, 1e-30))
