"""Real speech out of a Debian package (LibriVox, read digits and cards), laid out with pauses and noise.

The labels follow from the layout: a frame holds speech where the clean clip is loud enough there, so
they owe nothing to the models that they judge.
"""

from __future__ import annotations

import wave
from functools import cache
from itertools import pairwise

import numpy as np

from .cache import debian_package

RATE = 16000
FRAME = 512  # samples, 32 ms
_QUIET_DB = -35.0  # below a clip's loud passages
_BRIDGED = 8  # frames: shorter pauses inside speech count as speech
_TRACKS = {
    "calibration": (
        "librivox/*0870.wav",
        "librivox/*0880.wav",
        "cards/00[123].wav",
        "goforward.raw",
        "something.raw",
    ),
    "evaluation": (
        "librivox/*0890.wav",
        "librivox/*09[23]0.wav",
        "cards/00[45].wav",
        "numbers.raw",
        "tidigits/*.raw",
    ),
}


@cache
def track(role: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples (float32, 16 kHz) and a speech label for each frame; no clip is in both roles."""
    random, pieces, labels = np.random.RandomState(sorted(_TRACKS).index(role)), [], []
    for clip in _clips(role):
        silence = np.zeros(FRAME * random.randint(16, 48), np.float32)
        clip = clip[: len(clip) // FRAME * FRAME]
        noise_db = random.uniform(-45, -25)
        for piece, speech in ((silence, np.zeros(len(silence) // FRAME, bool)), (clip, _speech(clip))):
            noise = random.normal(0, 10 ** (noise_db / 20), len(piece)).astype(np.float32)
            pieces.append(np.clip(piece + noise, -1, 1))
            labels.append(speech)
    return np.concatenate(pieces), np.concatenate(labels)


def _clips(role: str) -> list[np.ndarray]:
    folder = debian_package("pocketsphinx-testdata") / "usr/share/pocketsphinx/test/data"
    clips = []
    for pattern in _TRACKS[role]:
        for file in sorted(folder.glob(pattern)):
            if file.suffix == ".wav":
                with wave.open(str(file)) as content:
                    raw = content.readframes(content.getnframes())
            else:
                raw = file.read_bytes()
            samples = np.frombuffer(raw, "<i2").astype(np.float32)
            clips.append(samples * np.float32(0.7) / np.abs(samples).max())
    return clips


def _speech(clip: np.ndarray) -> np.ndarray:
    power = np.square(clip.reshape(-1, FRAME)).mean(1)
    loud = power > np.quantile(power, 0.95) * 10 ** (_QUIET_DB / 10)
    where = np.flatnonzero(loud)
    for first, second in pairwise(where):
        if second - first <= _BRIDGED:
            loud[first:second] = True
    return loud


def frames(samples: np.ndarray, context: int) -> np.ndarray:
    """Rows of FRAME samples, each behind the last `context` samples of the row before."""
    rows = samples.reshape(-1, FRAME)
    before = np.concatenate((np.zeros((1, context), np.float32), rows[:-1, -context:]))
    return np.concatenate((before, rows), axis=1)


def log_mel(samples: np.ndarray, bands: int, size: int, hop: int) -> np.ndarray:
    """Log energies of triangular bands on the mel scale, a row for each hop."""
    window = np.hanning(size + 1)[:-1]
    starts = np.arange(0, len(samples) - size + 1, hop)
    power = np.abs(np.fft.rfft(samples[starts[:, None] + np.arange(size)] * window)) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 1400), bands + 2) / 2595) - 1)
    bins = np.linspace(0, RATE / 2, power.shape[1])
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return np.log(power @ np.clip(np.minimum(rise, fall), 0, None).T + 1e-6).astype(np.float32)
