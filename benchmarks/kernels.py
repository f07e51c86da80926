"""What every CUDA kernel of a built library takes of a GPU, read from the machine code itself.

Needs cuobjdump, from the CUDA toolkit or as Triton brings it along, and no GPU.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from .text import into_markers, markdown

# Of a multiprocessor, of all architectures from 8.0 on but 8.6, 8.9 and 12.0, which hold 48 warps.
_REGISTERS, _WARPS, _LANES = 2**16, 64, 32
_REGISTER_UNIT = 256  # registers are given to a warp in such units

_LOCAL = re.compile(r"\b(?:LDL|STL)\b")
_TENSOR_CORES = re.compile(r"\b(?:[HIQDB]MMA|[HIQB]GMMA|UTC[A-Z]*MMA)\b")

# Kernels that may use local memory, by a part of their names, and the reason.
MAY_USE_LOCAL_MEMORY: dict[str, str] = {}


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture.

    threads: the most that a block may have, 0 where the source sets no bound.
    stack: bytes of local memory a thread. local: instructions that load or store it.
    shared: bytes of a block that are known when it is compiled.
    tensor_cores: instructions that use them.
    """

    name: str
    architecture: str
    registers: int
    threads: int
    stack: int
    local: int
    shared: int
    tensor_cores: int

    @property
    def warps(self) -> int:
        """Warps of a multiprocessor for which there are registers; whole blocks of ``threads``."""
        unit = _REGISTER_UNIT
        warps = min(_WARPS, _REGISTERS // (-(-self.registers * _LANES // unit) * unit))
        block = max(1, self.threads // _LANES)
        return warps // block * block

    @property
    def spills(self) -> bool:
        excepted = any(part in self.name for part in MAY_USE_LOCAL_MEMORY)
        return bool(self.stack or self.local) and not excepted


def report_kernels(library: Path, into: Path | None) -> int:
    """Print the table or put it into a document; the exit status: 1 if a kernel spills."""
    kernels = read_kernels(library)
    if not kernels:
        raise ValueError(f"benchmarks: {library}: expected CUDA kernels, got none")
    table = kernel_table(kernels)
    if into:
        into.write_text(into_markers(into.read_text(), lambda name: table * (name == "kernels")))
    else:
        print(table)
    spilling = [kernel for kernel in kernels if kernel.spills]
    for kernel in spilling:
        where = f"{kernel.stack} bytes, {kernel.local} loads and stores"
        message = f"{kernel.name}, {kernel.architecture}: uses local memory: {where}"
        print(message, file=sys.stderr)
    return 1 if spilling else 0


def kernel_table(kernels: list[Kernel]) -> str:
    head = ["kernel", "architecture", "registers", "threads", "warps", "shared, bytes"]
    head += ["local memory, bytes", "loads and stores of it", "tensor-core instructions"]
    rows = [
        [
            f"`{kernel.name}`",
            kernel.architecture,
            str(kernel.registers),
            str(kernel.threads or "-"),
            str(kernel.warps),
            *(
                str(value)
                for value in (kernel.shared, kernel.stack, kernel.local, kernel.tensor_cores)
            ),
        ]
        for kernel in kernels
    ]
    return markdown(head, rows)


def read_kernels(library: Path) -> list[Kernel]:
    """All kernels of a library or object file, by name and architecture."""
    usage = _by_kernel(_dump("--dump-resource-usage", library), r" Function (\S+):")
    attributes = _by_kernel(_dump("--dump-elf", library), r"\.nv\.info\.(\S+)")
    instructions = _by_kernel(_dump("--dump-sass", library), r"\s*Function : (\S+)")
    found = []
    for key, lines in usage.items():
        resources = dict(re.findall(r"(\w+):(\d+)", lines))
        code = instructions[key]
        found.append(
            Kernel(
                name=key[1],
                architecture=key[0],
                registers=int(resources["REG"]),
                threads=max_threads(attributes[key]),
                stack=int(resources["STACK"]) + int(resources["LOCAL"]),
                local=len(_LOCAL.findall(code)),
                shared=int(resources["SHARED"]),
                tensor_cores=len(_TENSOR_CORES.findall(code)),
            )
        )
    return _with_readable_names(found)


def _by_kernel(dump: str, header: str) -> dict[tuple[str, str], str]:
    """The text of every kernel, by architecture and mangled name, which is in its ``header``."""
    texts: dict[tuple[str, str], str] = {}
    for file in re.split(r"^arch = (?=sm_)", dump, flags=re.MULTILINE)[1:]:
        architecture = file.split(maxsplit=1)[0]
        _, *parts = re.split(rf"^{header}|^\.nv\.\S+$", file, flags=re.MULTILINE)
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            if name:
                texts[architecture, name] = text
    return texts


def max_threads(attributes: str) -> int:
    """The launch bound of a kernel; 0 if it has none."""
    pattern = r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(\w+) (\w+) (\w+)"
    match = re.search(pattern, attributes)
    return math.prod(int(value, 16) for value in match.groups()) if match else 0


def _with_readable_names(kernels: list[Kernel]) -> list[Kernel]:
    filter_names = shutil.which("c++filt")
    names = [kernel.name for kernel in kernels]
    if filter_names:
        text = "\n".join(names)
        done = subprocess.run([filter_names], input=text, capture_output=True, text=True)
        names = done.stdout.splitlines()
    readable = [
        replace(kernel, name=short_name(name)) for kernel, name in zip(kernels, names, strict=True)
    ]
    return sorted(readable, key=lambda kernel: (kernel.name, kernel.architecture))


def short_name(name: str) -> str:
    """Without result, parameters and namespaces of our own."""
    depth = 0
    for i in range(len(name) - 1, -1, -1):  # the last pair of parentheses holds the parameters
        depth += {")": 1, "(": -1}.get(name[i], 0)
        if name[i] == "(" and depth == 0:
            name = name[:i]
            break
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.sub(r"\bfff::(?:cuda::)?", "", name).replace("> >", ">>").replace("> >", ">>")


def _dump(option: str, library: Path) -> str:
    if not library.is_file():
        raise ValueError(f"benchmarks: {library}: expected a library, got no such file")
    # nvdisasm, which it calls, is looked for on PATH.
    tool = _cuobjdump()
    path = os.pathsep.join([str(tool.parent), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        [tool, option, library], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"benchmarks: {tool} {option}: {done.stderr.strip()}")
    return done.stdout


def _cuobjdump() -> Path:
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    triton = importlib.util.find_spec("triton")
    folders = [Path("/usr/local/cuda/bin")]
    if nvcc:
        folders.insert(0, Path(nvcc).resolve().parent)
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None:
        raise ValueError("benchmarks: cuobjdump: expected on PATH, beside nvcc or in triton")
    return Path(tool)
