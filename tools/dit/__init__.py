"""A small diffusion transformer on handwritten digits, trained by `train`, sampled by `sampling`."""
