"""The CMake package: examples/cpp is built against it and run, without Python in the process."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import torch_fff

ROOT = Path(__file__).parents[2]
# cmake and ninja from PyPI lie beside a Python that need not be on PATH.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"
    ),
]


def run(*command):
    environment = {**os.environ, "PATH": PATH}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def configure(source, build, *prefixes, **definitions):
    definitions["CMAKE_PREFIX_PATH"] = ";".join(map(str, prefixes))
    arguments = [f"-D{name}={value}" for name, value in definitions.items()]
    return run("cmake", "-G", "Ninja", "-S", source, "-B", build, *arguments)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The programs, built as a user of the installed Python package builds them.

    Linkers that drop libraries of which no symbol is used must keep this one.
    """
    build = tmp_path_factory.mktemp("examples")
    flags = {"CMAKE_EXE_LINKER_FLAGS": "-Wl,--as-needed", "CMAKE_BUILD_TYPE": "None"}
    prefixes = (torch.utils.cmake_prefix_path, torch_fff.cmake_prefix_path)
    configure(ROOT / "examples" / "cpp", build, *prefixes, **flags)
    run("cmake", "--build", build)
    return build


def test_aotinductor_package_runs(programs, exported):
    output = run(programs / "run_model", exported / "model.pt2", exported / "example.pt")
    assert float(output.split(":")[1]) < 1e-5


def test_weights_of_python_run_and_train(programs, exported):
    output = run(programs / "train_model", exported / "weights.pt", exported / "example.pt")
    difference, losses = (line.split(":")[1] for line in output.splitlines())
    assert float(difference) < 1e-5
    before, after = map(float, losses.split(","))
    assert after < 0.9 * before


def test_latency(programs):
    output = run(programs / "fff_latency", "1")
    ratios = re.findall(r"faster than the best dense layer +([0-9.]+) x", output)
    assert len(ratios) == 3
    assert float(ratios[0]) > 10  # far below what it is, so that a busy machine passes


PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
{before}
find_package(torch_fff 0.1 REQUIRED)
get_target_property(library torch_fff::torch_fff IMPORTED_LOCATION)
get_target_property(include torch_fff::torch_fff INTERFACE_INCLUDE_DIRECTORIES)
get_target_property(torch torch_fff::torch_fff INTERFACE_LINK_LIBRARIES)
foreach(file IN LISTS library include)
  if(NOT EXISTS ${{file}})
    message(FATAL_ERROR "missing: ${{file}}")
  endif()
endforeach()
file(WRITE ${{CMAKE_BINARY_DIR}}/found "${{library}}\\n${{torch}}")
"""


def consumer(folder, *prefixes, before=""):
    """The op library and torch's that a project in ``folder`` finds."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(PROJECT.format(before=before))
    configure(folder, folder / "build", *prefixes)
    library, libraries = (folder / "build" / "found").read_text().splitlines()
    return Path(library).resolve(), libraries.split(";")


def test_installation_by_cmake(tmp_path):
    built = ROOT / "build" / sys.implementation.cache_tag
    cache = built / "CMakeCache.txt"
    if not cache.exists() or sys.executable not in cache.read_text():
        pytest.skip("needs the build directory of this Python environment")
    prefix = tmp_path / "prefix"
    run("cmake", "--install", built, "--prefix", prefix)
    assert sorted(path.name for path in prefix.iterdir()) == ["include", "lib", "share"]
    libtorch = Path(torch.__file__).resolve().parent  # as LibTorch's zip file is laid out
    library, libraries = consumer(tmp_path / "consumer", libtorch, prefix)
    assert library == prefix / "lib" / "libtorch_fff.so"
    assert str(libtorch / "lib" / "libtorch_cpu.so") in libraries


@pytest.mark.skipif(torch.version.cuda is not None, reason="find_package(Torch) wants all of CUDA")
def test_torch_that_was_found_before_is_taken(tmp_path):
    prefixes = (torch.utils.cmake_prefix_path, torch_fff.cmake_prefix_path)
    before = "find_package(Torch REQUIRED)"
    _, libraries = consumer(tmp_path / "consumer", *prefixes, before=before)
    assert "torch" in libraries


def test_another_torch_is_refused(tmp_path):
    other = tmp_path / "libtorch"
    header = other / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 1\n#define TORCH_VERSION_MINOR 4\n")
    # A copy: beside the installed package may lie the torch that it was built for.
    prefix = tmp_path / "nested" / "prefix"
    shutil.copytree(Path(torch_fff.cmake_prefix_path) / "share", prefix / "share")
    complaint = r"built for torch 2\.\d+, but\s+.*\s+is of torch 1\.4"
    with pytest.raises(AssertionError, match=complaint):
        consumer(tmp_path / "consumer", other, prefix)
    with pytest.raises(AssertionError, match="LibTorch was not found"):
        consumer(tmp_path / "alone", prefix)
