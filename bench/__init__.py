"""The race: fused operations against PyTorch's own, measured and checked in one run."""
