"""The PEP 517 backend: setuptools, with build requirements that depend on what is there already.

pip builds in an isolated environment, in which the torch of the target environment is out of sight; a plain
build requirement on torch would download a second one. So torch is required only where
`fastseq_find.find_torch` finds none that fits, and CMake and ninja only where the system has none. nvcc is
never required: who wants the CUDA library has one, or installs it.
"""

from __future__ import annotations

from fastseq_find import find_tool, find_torch, torch_requirement
from fastseq_native import build_mode
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the other hooks are setuptools' own)

Settings = dict[str, object] | None


def requirements() -> list[str]:
    """What a build needs beyond setuptools, for this machine and FASTSEQ_BUILD."""
    if build_mode() == "none":
        return []
    needed = []
    if find_torch() is None:
        needed.append(torch_requirement())
    if find_tool("cmake") is None:
        needed.append("cmake>=3.24")
    if find_tool("ninja") is None:
        needed.append("ninja")
    return needed


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """See PEP 517."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *requirements()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """See PEP 660."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *requirements()]
