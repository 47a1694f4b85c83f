"""Models larger than memory: cut into blocks that run one after another, tensors between them on the disk."""
