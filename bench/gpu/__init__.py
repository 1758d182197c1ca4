"""The race of the GPU kernels, `python -m bench.gpu`, beside PyTorch's and flash-attn's."""
