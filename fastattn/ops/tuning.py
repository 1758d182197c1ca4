"""Measures which launch knobs of a Triton kernel are fastest, where FASTATTN_TUNE=1 asks for it.

Without, the first choice of each table runs and nothing here does. What was measured is kept in
`tuning.json` in the folder FASTATTN_CACHE, by default `fastattn` among the user's cached files.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fastattn.dispatch import log
from fastattn.ops import launch

Knobs = TypeVar("Knobs")
Timer = Callable[[Callable[[], None]], float]  # the milliseconds that a function takes

_lock = threading.RLock()
_known: dict[str, dict[str, Any]] | None = None  # the file's contents, by key
_told: set[str] = set()
_timer: Timer | None = None  # stands in for a GPU's clock


def _asked(value: str) -> bool:
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTATTN_TUNE must be 0 or 1, got {value!r}")
    return value == "1"


_on = _asked(os.environ.get("FASTATTN_TUNE", ""))


def run(
    launches: Callable[[Knobs], None],
    choices: Sequence[Knobs],
    kernel: str,
    shape: Sequence[object],
    tensor: Tensor,
) -> None:
    """Call `launches` with the best of `choices`; unless FASTATTN_TUNE=1, with the first.

    Args:
        launches: has the same result however often it is called.
        choices: dataclasses of numbers.
        shape: what else the best choice depends on, sizes in classes as `rounded` makes them.
        tensor: one of those that the kernel works on.
    """
    choice = choices[0]
    if _on and len(choices) > 1:
        choice = _best(launches, choices, kernel, shape, tensor)
    launches(choice)


def rounded(*sizes: int) -> tuple[int, ...]:
    """The classes of these sizes: powers of two."""
    return tuple(triton.next_power_of_2(size) for size in sizes)


@contextmanager
def measuring(timer: Timer) -> Iterator[None]:
    """Tune inside the `with` block, with a timer that does not need a GPU."""
    global _on, _timer
    before, _on, _timer = (_on, _timer), True, timer
    try:
        yield
    finally:
        _on, _timer = before


def _best(
    launches: Callable[[Knobs], None],
    choices: Sequence[Knobs],
    kernel: str,
    shape: Sequence[object],
    tensor: Tensor,
) -> Knobs:
    where = f"sm_{launch.architecture_of(tensor)}", f"triton {triton.__version__}"
    key = " ".join(map(str, (kernel, *where, tensor.dtype, *shape)))
    with _lock:
        kept = _contents().get(key)
        for choice in choices:
            if asdict(choice) == kept:
                return choice
        timer = _timer or (_clock_of(tensor) if tensor.is_cuda else None)
        if timer is None:
            _tell(f"{kernel} is not tuned: its tensors are on {tensor.device}")
        elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            _tell(f"{kernel} is not tuned while a CUDA graph is captured")
        else:
            times = [_time(timer, launches, choice) for choice in choices]
            best = choices[times.index(min(times))]
            log.info("%s: %s of %s ms", key, best, times)
            _keep(key, asdict(best))
            return best
    return choices[0]


def _time(timer: Timer, launches: Callable[[Knobs], None], choice: Knobs) -> float:
    try:
        return timer(lambda: launches(choice))
    except OutOfResources:  # a smaller GPU than the choice was made for
        return float("inf")


def _clock_of(tensor: Tensor) -> Timer:
    def milliseconds(function: Callable[[], None]) -> float:
        with torch.cuda.device(tensor.device):
            return triton.testing.do_bench(function, return_mode="median")

    return milliseconds


def _tell(text: str) -> None:
    if text not in _told:
        _told.add(text)
        log.warning(text)


def _file() -> Path:
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FASTATTN_CACHE") or users / "fastattn") / "tuning.json"


def _contents() -> dict[str, dict[str, Any]]:
    global _known
    if _known is None:
        _known = _read()
    return _known


def _read() -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(_file().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _tell(f"{_file()} cannot be read and is measured anew: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def _keep(key: str, choice: dict[str, Any]) -> None:
    """In memory and in the file, beside what other processes have put there since."""
    global _known
    _known = _contents() | _read() | {key: choice}
    file = _file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(_known, indent=1, sort_keys=True))
        beside.replace(file)
    except OSError as error:
        _tell(f"{file} cannot be written, so that tuning begins anew in each process: {error}")
