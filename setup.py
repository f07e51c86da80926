"""Builds the native code by calling CMake; everything else is declared in pyproject.toml.

CMakeLists.txt installs into the package directory what setuptools knows nothing of, `lib/`,
`include/` and `share/`, and the extension module `_C`, which stands for all of it here.
Environment:

    CMAKE_ARGS                  more arguments for CMake's configuration, split as a shell would
    CMAKE_BUILD_PARALLEL_LEVEL  compilers to run at once (default: one for each core)
    FORCE_CUDA, CUDACXX, TORCH_CUDA_ARCH_LIST
                                see CMakeLists.txt
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def run(self) -> None:
        # setuptools' own run() builds into a temporary place and, for an editable install, copies
        # back only the files it knows. get_ext_fullpath() names the final place in both cases.
        for extension in self.extensions:
            self.build_extension(extension)

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # One directory for each Python, kept between builds; the Makefile works in the same one.
        build = ROOT / "build" / sys.implementation.cache_tag
        # cmake and ninja from PyPI lie beside a Python that need not be on PATH.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        env = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())} | os.environ | {"PATH": path}

        def cmake(*arguments: str | Path) -> None:
            subprocess.run(["cmake", *arguments], env=env, check=True)

        options = [f"-DPython_EXECUTABLE={sys.executable}"]
        options += shlex.split(env.get("CMAKE_ARGS", ""))
        cmake("-S", ROOT, "-B", build, "-G", "Ninja", *options)
        cmake("--build", build)
        cmake("--install", build, "--prefix", package)
        cmake("--install", build, "--prefix", package, "--component", "python")


def native_sources() -> list[str]:
    """What a source distribution must carry for CMake."""
    folders = ["cmake", "csrc", "cuda", "tests/cpp"]
    files = (file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file())
    return ["CMakeLists.txt", *sorted(str(file.relative_to(ROOT)) for file in files)]


setup(
    ext_modules=[Extension("torch_fff._C", sources=native_sources())],
    cmdclass={"build_ext": CMakeBuild},
)
