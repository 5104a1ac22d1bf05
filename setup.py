"""Compile what this machine can, and install the package. All else is in pyproject.toml and CMakeLists.txt.

FASTSEQ_BUILD=auto|cpu|cuda|require-cuda|none    auto, the default, leaves out what cannot be built
CUDA_HOME, TORCH_CUDA_ARCH_LIST    where nvcc is, and what it compiles for: 8.0;9.0+PTX
MAX_JOBS                           compilers at a time; by default as many as cores and free memory allow
python setup.py build_native --inplace    compile again in the source tree, after a change in csrc/
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import fastseq_native  # noqa: E402  (after the path)


class NativeDistribution(Distribution):
    """A distribution whose wheel is for one platform, unless nothing is to be compiled."""

    def has_ext_modules(self) -> bool:
        """See Distribution."""
        return fastseq_native.build_mode() != "none"


class BuildNative(Command):
    """The part of `build` that compiles: by CMake: the op libraries and the host module."""

    description = "compile the op libraries and the host module"
    user_options = [("inplace", "i", "compile into the source tree")]  # noqa: RUF012
    boolean_options = ["inplace"]  # noqa: RUF012
    editable_mode = False

    def initialize_options(self) -> None:
        """See Command."""
        self.build_lib: str | None = None
        self.inplace = False

    def finalize_options(self) -> None:
        """See Command."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        """Compile, and print what was left out."""
        inplace = self.inplace or self.editable_mode
        package = ROOT / "fastseq" if inplace else Path(str(self.build_lib)).resolve() / "fastseq"
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        record = fastseq_native.build(package, ROOT / "build" / f"cmake-{tag}")
        print(f"fastseq: built {', '.join(record['built']) or 'the pure Python package'}")
        for name, reason in record["left_out"].items():
            print(f"fastseq: left out {name}: {reason}")

    def get_outputs(self) -> list[str]:
        """Nothing that an editable install would have to map: it compiles into the source tree."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """See get_outputs."""
        return {}

    def get_source_files(self) -> list[str]:
        """The sources are in MANIFEST.in."""
        return []


class Build(build):
    """`build` with the compiled part, into an empty folder: a deleted module must not stay in the wheel."""

    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012

    def run(self) -> None:
        """See Command."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    """`bdist_wheel`, whose tag is true: what is compiled serves every CPython, see csrc/host/module.cpp."""

    def get_tag(self) -> tuple[str, str, str]:
        """See bdist_wheel."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("cp310", "abi3", platform)


setup(
    packages=[*find_packages(include=["fastseq", "fastseq.*"]), "fastseq_benchmarks"],
    package_dir={"fastseq_benchmarks": "benchmarks"},  # so that an installed `fastseq bench` finds them
    distclass=NativeDistribution,
    cmdclass={"bdist_wheel": Wheel, "build": Build, "build_native": BuildNative},
)
