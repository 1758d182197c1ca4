"""Finds CUDA's programs, which need no GPU: on PATH, in NVIDIA's packages of PyPI, in Triton's."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

PACKAGES = {"nvidia": "cu*/bin", "triton": "backends/nvidia/bin"}


def find(name: str) -> str | None:
    """The path of a program, say nvcc; None where there is none."""
    places = [os.environ.get("PATH", os.defpath)]
    for package, folders in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            places += map(str, Path(root).glob(folders))
    return shutil.which(name, path=os.pathsep.join(places))
