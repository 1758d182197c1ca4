"""Loads PTX and launches its kernels on numpy arrays and torch CPU tensors."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastattn.emulator import abi
from fastattn.emulator.lower import Program
from fastattn.emulator.opcodes import BUFFER_SHIFT
from fastattn.emulator.ptx import WIDTHS, Function, PtxModule, Variable, parse
from fastattn.emulator.report import SPACES as SPACE_NAMES
from fastattn.emulator.report import Counters, Finding, Place, Report
from fastattn.emulator.tensor_map import TensorMap
from fastattn.emulator.translate import translate

ORDERS = ("forward", "reverse", "random")
MOST_FINDINGS = 256
ALIGNMENT = 16  # of addresses, at most, that accesses ask for
# Shared memory of a block on the largest GPU so far, and threads.
MOST_SHARED, MOST_THREADS = 227 * 1024, 1024
MOST_BLOCKS = 16  # of a cluster
ALIGNMENT = 16  # that an instruction can ask for

Size = int | Sequence[int]


def load(ptx: str | Path) -> Module:
    """The kernels of a PTX file, or of PTX text (anything that holds a line break).

    Raises PtxError, a ValueError, where the text cannot be read.
    """
    text = ptx if isinstance(ptx, str) and "\n" in ptx else Path(ptx).read_text()
    return Module(parse(text))


class Module:
    """The kernels of a PTX file; its `.global` variables keep their values between launches."""

    def __init__(self, module: PtxModule):
        self.ptx = module
        self.memory: dict[str, torch.Tensor] = {}
        for variable in module.variables.values():
            if variable.space in ("global", "const"):
                values = (variable.values or b"").ljust(max(1, variable.bytes), b"\0")
                self.memory[variable.name] = _bytes(values)

    @property
    def kernels(self) -> list[str]:
        """The names of the entries."""
        return list(self.ptx.functions)

    def __getitem__(self, name: str) -> Kernel:
        """The kernel of this name, or the only one whose name contains it."""
        found = [n for n in self.kernels if n == name] or [n for n in self.kernels if name in n]
        if len(found) != 1:
            raise KeyError(f"{name!r} names {len(found)} of the kernels {self.kernels}")
        return Kernel(self, self.ptx.functions[found[0]])


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, Memory)) or hasattr(value, "__array_interface__")


@dataclass(frozen=True)
class Memory:
    """Memory of the process as an argument of a kernel, by address, whose alignment kernels see."""

    address: int
    bytes: int
    writable: bool = True
    initialised: bool = True


class _Storages:
    """Gives every storage among the arguments one buffer, however many views of it there are."""

    def __init__(self) -> None:
        self.buffers: list[dict[str, Any]] = []
        self.keep_alive: list[Any] = []

    def add(self, name: str, host: int, size: int, *, offset: int = 0, **fields: Any) -> int:
        """The address of `size` bytes at `host`, which lie `offset` bytes into their storage."""
        begin = host - offset
        for index, buffer in enumerate(self.buffers):
            if buffer["storage"] == begin:
                end = max(buffer["host"] + buffer["size"], host + size)
                buffer["host"] = min(buffer["host"], host)
                buffer["size"] = end - buffer["host"]
                for right in ("writable", "initialised"):
                    buffer[right] |= fields.get(right, True)
                buffer["name"] += f", {name}"
                return self.base(index) + offset
        default = {"writable": True, "checked": True, "initialised": True}
        self.buffers.append(
            default | {"name": name, "host": host, "size": size, "storage": begin} | fields
        )
        return self.base(len(self.buffers) - 1) + offset

    @staticmethod
    def base(index: int) -> int:
        """The address that kernels see of the begin of a storage."""
        return index + 1 << BUFFER_SHIFT

    def native(self) -> ctypes.Array:
        """The buffers for the runtime."""
        native = (abi.Buffer * max(1, len(self.buffers)))()
        for index, buffer in enumerate(self.buffers):
            base = self.base(index) + buffer["host"] - buffer["storage"]
            fields = (buffer[name] for name in ("size", "writable", "checked", "initialised"))
            native[index] = (buffer["host"], base, *fields, 0)
        return native


def _span(shape: Sequence[int], strides: Sequence[int], item: int) -> tuple[int, int]:
    """Where the first and behind the last byte of an array lie, relative to its first element."""
    if 0 in shape:
        return 0, 0
    steps = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    return sum(min(s, 0) for s in steps), sum(max(s, 0) for s in steps) + item


def _extent(array: Any) -> tuple[int, int, int, bool]:
    """Address, bytes spanned, offset into the storage, and whether it may be written."""
    if isinstance(array, Memory):
        return array.address, array.bytes, array.address % ALIGNMENT, array.writable
    if isinstance(array, torch.Tensor):
        if array.device.type != "cpu":
            raise ValueError(f"tensors must be on the CPU, got one on {array.device}")
        item = array.element_size()
        _, size = _span(array.shape, [s * item for s in array.stride()], item)
        return array.data_ptr(), size, array.storage_offset() * item, True
    low, high = _span(array.shape, array.strides, array.itemsize)
    if low < 0:
        raise ValueError("arrays with negative strides are not supported")
    base = array
    while hasattr(base.base, "__array_interface__"):
        base = base.base
    pointer, read_only = array.__array_interface__["data"]
    return pointer, high, pointer - base.__array_interface__["data"][0], not read_only


def _scalar(value: Any, parameter: Variable) -> bytes:
    kind, width = parameter.type, WIDTHS[parameter.type]
    if parameter.bytes != width or isinstance(value, (bytes, bytearray)):
        data = bytes(value)
        if len(data) != parameter.bytes:
            raise ValueError(f"{parameter.name} takes {parameter.bytes} bytes, got {len(data)}")
        return data
    if kind in ("f32", "f64"):
        return struct.pack("<f" if kind == "f32" else "<d", float(value))
    if isinstance(value, float):
        # Compilers pass a float in an untyped parameter, too.
        if kind not in ("b16", "b32", "b64"):
            raise TypeError(f"{parameter.name} is {kind}, got the float {value}")
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[width], value)
    return (int(value) % (1 << 8 * width)).to_bytes(width, "little")


def _three(size: Size, name: str) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(sizes) <= 3 or any(not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"{name} must be 1 to 3 positive numbers, got {size!r}")
    return (*sizes, 1, 1)[:3]


class Kernel:
    """A kernel that can be launched and checked."""

    def __init__(self, module: Module, function: Function):
        self.module, self.function, self.name = module, function, function.name
        self._program: Program | None = None

    @property
    def program(self) -> Program:
        """The translated kernel. Raises PtxError, naming what the emulator does not know."""
        if self._program is None:
            storages = _Storages()
            addresses = self._place_module(storages)
            base = storages.base(len(storages.buffers))
            for parameter, offset in zip(self.function.params, self._offsets(), strict=False):
                addresses[parameter.name] = base + offset
            self._program = translate(self.module.ptx, self.name, addresses)
        return self._program

    def _place_module(self, storages: _Storages) -> dict[str, int]:
        variables = self.module.ptx.variables
        return {
            name: storages.add(
                name, data.data_ptr(), data.numel(), writable=variables[name].space == "global"
            )
            for name, data in self.module.memory.items()
        }

    def _offsets(self) -> list[int]:
        """Where each parameter lies, and where the last one ends."""
        offsets, end = [], 0
        for parameter in self.function.params:
            offsets.append(-(-end // parameter.align) * parameter.align)
            end = offsets[-1] + parameter.bytes
        return [*offsets, end]

    def _cluster(self, cluster: Size | None, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The blocks of a cluster, which divide the grid and are what the kernel requires."""
        required = self.function.directives.get("reqnctapercluster")
        if cluster is None:
            cluster = required or 1
        found = _three(cluster, "cluster")
        if required and found != _three(required, "cluster"):
            raise ValueError(f"cluster must be {required} for {self.name}, got {found}")
        if math.prod(found) > MOST_BLOCKS or any(n % c for n, c in zip(grid, found, strict=True)):
            raise ValueError(
                f"cluster must divide grid {grid} into parts of at most {MOST_BLOCKS} blocks, "
                f"got {found}"
            )
        return found

    def _pack(self, storages: _Storages, arguments: Sequence[Any]) -> torch.Tensor:
        """The parameters in memory, and a buffer for each array among the arguments."""
        params, offsets = self.function.params, self._offsets()
        if len(arguments) != len(params):
            raise TypeError(f"{self.name} takes {len(params)} arguments, got {len(arguments)}")
        packed = _bytes(bytes(max(1, offsets[-1])))
        host = packed.data_ptr()
        storages.add("the parameters", host, packed.numel(), writable=False, checked=False)
        for index, (value, parameter) in enumerate(zip(arguments, params, strict=True)):
            label = f"argument {index}"
            if isinstance(value, TensorMap):
                at, size, into, _ = _extent(value.tensor)
                value = value.pack(storages.add(label, at, size, offset=into))
            elif _is_array(value):
                if parameter.bytes != 8:
                    raise TypeError(f"{label} is an array, and {parameter.name} is not")
                at, size, into, writable = _extent(value)
                fresh = isinstance(value, Memory) and not value.initialised
                value = storages.add(
                    label, at, size, offset=into, writable=writable, initialised=not fresh
                )
            data = _scalar(0 if value is None else value, parameter)
            ctypes.memmove(host + offsets[index], data, len(data))
        return packed

    def launch(
        self,
        grid: Size,
        block: Size,
        *arguments: Any,
        shared: int = 0,
        cluster: Size | None = None,
        order: str = "forward",
        late: bool = True,
        seed: int = 0,
        check: bool = True,
        count: bool = True,
        patience: int = 50_000_000,
    ) -> Report:
        """Runs the kernel once; arrays among the arguments are read and written in place.

        grid, block   one to three numbers each
        arguments     one for each parameter: a numpy array or torch CPU tensor for a pointer (None
                      is null), a number, bytes for a struct, a TensorMap
        shared        bytes of dynamic shared memory
        cluster       blocks of a cluster, one to three numbers; as the kernel requires when None
        order         in which lanes, warps and blocks take turns: "forward", "reverse", or
                      "random", which `seed` decides
        late          asynchronous copies arrive when they are waited for, else when issued
        check         look for data races and reads of uninitialised memory; bounds, alignment and
                      barriers are always checked
        count         count bank conflicts and sectors
        patience      instructions of a warp without synchronisation that count as a hang

        Raises PtxError for PTX that the emulator does not know, TypeError and ValueError for
        arguments that do not fit the kernel.
        """
        grid, block = _three(grid, "grid"), _three(block, "block")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
        program = self.program
        if math.prod(block) > MOST_THREADS:
            raise ValueError(f"block must hold at most {MOST_THREADS} threads, got {block}")
        if shared < 0 or program.static_shared + shared > MOST_SHARED:
            raise ValueError(
                f"shared must leave room for {program.static_shared} static bytes within "
                f"{MOST_SHARED}, got {shared}"
            )
        cluster = self._cluster(cluster, grid)
        storages = _Storages()
        self._place_module(storages)
        packed = self._pack(storages, arguments)
        launch = abi.Launch(
            grid, block, cluster, shared, ORDERS.index(order), late, check, count, seed, patience
        )
        launch.buffer_count, launch.max_findings = len(storages.buffers), MOST_FINDINGS
        launch.buffers = storages.native()
        findings = (abi.Finding * MOST_FINDINGS)()
        sites = (abi.Site * len(program.instructions))()
        found = abi.library().fastattn_emulator_run(
            ctypes.byref(program.native), ctypes.byref(launch), findings, sites
        )
        del packed  # was to live until here
        if found < 0:
            raise MemoryError(f"{self.name}: no memory for the emulation")
        schedule = f"{order} order, {'late' if late else 'early'} copies"
        return Report(
            self.name,
            [self._finding(f, grid, block, storages, schedule) for f in findings[:found]],
            Counters(program.statements, sites),
        )

    def check(
        self, grid: Size, block: Size, *arguments: Any, seeds: int = 2, **options: Any
    ) -> Report:
        """Runs the kernel under every schedule and compares the results bit by bit.

        The arguments are as in `launch`; arrays hold the results of the first schedule afterwards.
        Findings of all schedules are merged, and a result that depends on the schedule is one.
        """
        schedules = [{"order": order} for order in ORDERS[:2]]
        schedules += [{"order": "random", "seed": seed} for seed in range(seeds)]
        runs = [(s | {"late": late}) for s in schedules for late in (True, False)]
        before = _Snapshot(arguments)
        first = self.launch(grid, block, *arguments, **(options | runs[0]))
        expected = _Snapshot(arguments)
        findings = {(f.kind, f.place, f.other_place): f for f in first.findings}
        for run in runs[1:]:
            before.restore()
            report = self.launch(grid, block, *arguments, **(options | {"count": False} | run))
            for finding in report.findings:
                findings.setdefault((finding.kind, finding.place, finding.other_place), finding)
            for index, difference in expected.differences():
                text = f"{run['order']} order and {'late' if run['late'] else 'early'} copies"
                finding = Finding(
                    "schedule-dependent-result",
                    f"argument {index} differs in {difference} bytes under {text}",
                    self.name,
                    None,
                    None,
                    None,
                    None,
                )
                findings.setdefault((finding.kind, index), finding)
        expected.restore()
        return replace(first, findings=list(findings.values()))

    def _finding(
        self,
        found: abi.Finding,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        storages: _Storages,
        schedule: str,
    ) -> Finding:
        def place(index: int) -> Place | None:
            return Place.of(self.program.statements[index]) if index >= 0 else None

        def index(linear: int, size: tuple[int, int, int]) -> tuple[int, int, int] | None:
            if linear < 0:
                return None
            return (linear % size[0], linear // size[0] % size[1], linear // size[0] // size[1])

        address = None
        if found.buffer >= 0:
            buffer = storages.buffers[found.buffer]
            address = f"byte {found.offset} of {buffer['name']}, which has {buffer['size']}"
        elif found.space:
            address = f"{SPACE_NAMES[found.space]} address {found.offset:#x}"
        return Finding(
            found.kind.decode(),
            found.detail.decode(),
            self.name,
            place(found.instruction),
            index(found.block, grid),
            index(found.thread, block),
            address,
            place(found.other_instruction),
            index(found.other_block, grid),
            index(found.other_thread, block),
            found.count,
            schedule,
        )


class _Snapshot:
    """The bytes of all arrays among arguments, whatever their dtype and strides."""

    def __init__(self, arguments: Sequence[Any]):
        self.saved: list[tuple[int, int, bytes]] = []
        for index, value in enumerate(arguments):
            value = value.tensor if isinstance(value, TensorMap) else value
            if _is_array(value):
                host, size, _, writable = _extent(value)
                if writable:
                    self.saved.append((index, host, ctypes.string_at(host, size)))

    def restore(self) -> None:
        """Puts the bytes back."""
        for _, host, data in self.saved:
            ctypes.memmove(host, data, len(data))

    def differences(self) -> list[tuple[int, int]]:
        """Which arguments have changed since, and in how many bytes."""
        changed = []
        for index, host, data in self.saved:
            if (now := ctypes.string_at(host, len(data))) != data:
                changed.append((index, sum(a != b for a, b in zip(now, data, strict=True))))
        return changed
