"""The requirements of NCCL's EP extension (``nccl.ep``), and which of them ranks do not meet.

They are those of ``nccl-extensions`` 0.1.0, which is NCCL EP 0.2.0. Its kernels are compiled when they are
first launched, and what they cannot do ends the process there, so everything is asked beforehand.
"""

import os
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xpar.comm.device.binding import shared_gpus
from xpar.comm.device.nccl_library import open_library, version_text

INSTALL = "pip install --no-deps nccl-extensions nccl4py cuda-core cuda-pathfinder cuda-bindings packaging"
LEAST_BINDINGS = (0, 5)
"""The oldest nccl4py. Its 0.3 has an NCCL EP 0.1 of its own, in which rows may be corrupted."""
LEAST_EP = (0, 2)
BUILT_FOR = 23007
"""The version of NCCL that the extension was built with. An older one does not have what it calls."""
NEWER_NEEDS = "NCCL_DEV_API_JIT"
"""The variable with which NCCL compiles the extension's kernels for a newer version of itself."""
LEAST_CAPABILITY = (9, 0)
MOST_A_NODE, MOST_RANKS = 8, 64
"""Ranks that the extension's release notes name."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROW_UNIT = 1024
"""Bytes: 32 lanes load two words of 16 bytes at a time."""
MOST_UNITS = 27
"""The most units of a row: two groups of warps keep it in the shared memory of a Hopper GPU."""
MOST_GROUPS, WARPS = 14, 32
"""The most groups of warps of a block of threads, each for one expert, and its warps."""


@dataclass(frozen=True)
class NcclEpFacts:
    """The facts of one rank.

    ``host``: as the extension counts nodes. ``uuid``: of its GPU, which has ``processors`` multiprocessors.
    ``versions``: of what must be alike. ``problem``: what this rank lacks, or None.
    """

    host: str
    uuid: str
    processors: int
    versions: str
    problem: str | None


def collect_nccl_ep_facts(device: torch.device) -> NcclEpFacts:
    """Find out the facts of this rank, whose GPU is ``device``; imports the extension if it is there."""
    properties = torch.cuda.get_device_properties(device)
    versions, problem = "", None
    try:
        versions = _check_software(dict(os.environ))
        _check_capability((properties.major, properties.minor), properties.name)
    except ValueError as error:
        problem = str(error)
    return NcclEpFacts(
        socket.gethostname(), str(properties.uuid), properties.multi_processor_count, versions, problem
    )


def why_no_nccl_ep(facts: Sequence[NcclEpFacts]) -> str | None:
    """Return why ranks with ``facts``, in their order, cannot use the extension, or None."""
    for rank, f in enumerate(facts):
        if f.problem is not None:
            return f.problem if all(f.problem == g.problem for g in facts) else f"rank {rank}: {f.problem}"
    versions = sorted({f.versions for f in facts})
    if len(versions) > 1:
        return f"the ranks have different versions: {'; '.join(versions)}"
    for uuid, ranks in shared_gpus([f.uuid for f in facts]).items():
        return f"ranks {', '.join(map(str, ranks))} share GPU {uuid}; each needs one of its own"
    if len(facts) > MOST_RANKS:
        return f"{len(facts)} ranks; the extension is for at most {MOST_RANKS}"
    on_node = Counter(f.host for f in facts)
    host, most = on_node.most_common(1)[0]
    if most > MOST_A_NODE:
        return f"{most} ranks on {host}; the extension is for at most {MOST_A_NODE} a node"
    if len(set(on_node.values())) > 1:
        return f"the nodes have {', '.join(map(str, on_node.values()))} ranks; it needs as many on each"
    return None


def why_not_rows(
    processors: int, experts: int, slots: int, width: int | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Return why rows of ``width`` values cannot travel to ``experts`` experts, or None.

    ``processors``: of the smallest GPU. ``slots``: experts of a token. ``width`` and ``dtype`` are None
    before they are known.
    """
    groups = -(-experts // processors)
    warps = groups * (WARPS // groups) if groups <= MOST_GROUPS else 0
    if not warps:
        return f"{experts} experts; {processors} multiprocessors serve at most {MOST_GROUPS * processors}"
    if slots >= warps:
        return f"{slots} experts a token; {experts} experts on {processors} multiprocessors leave {warps - 1}"
    if dtype is not None and dtype not in DTYPES:
        return f"rows in {_plain(dtype)}; it moves {', '.join(map(_plain, DTYPES))}"
    if width is None or dtype is None:
        return None
    units, rest = divmod(width * dtype.itemsize, ROW_UNIT)
    if rest or not units:
        return (
            f"rows of {width} values in {_plain(dtype)}; their width must be a multiple of "
            f"{ROW_UNIT // dtype.itemsize}"
        )
    most = min(MOST_UNITS, warps - 1)
    if units > most:
        return f"rows of {width} values in {_plain(dtype)}; they may have {most * ROW_UNIT // dtype.itemsize}"
    return None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_capability(capability: tuple[int, int], name: str) -> None:
    if capability < LEAST_CAPABILITY:
        major, minor = capability
        raise ValueError(f"{name} has compute capability {major}.{minor}; 9.0 (Hopper) is needed")


def _check_software(environment: Mapping[str, str]) -> str:
    """Return the versions of what is installed; ValueError with what is missing and how to get it."""
    if not _is_installed():
        raise ValueError(f"the extension is not installed; {INSTALL}")
    bindings = _installed("nccl4py")
    if _numbers(bindings) < LEAST_BINDINGS:
        raise ValueError(f"nccl4py {bindings} is too old; 0.5 is needed: {INSTALL}")
    nccl = open_library().version()
    if nccl < BUILT_FOR:
        raise ValueError(f"NCCL {version_text(nccl)} is too old; {version_text(BUILT_FOR)} is needed")
    if nccl > BUILT_FOR and environment.get(NEWER_NEEDS, "0") != "1":
        raise ValueError(
            f"NCCL {version_text(nccl)} is newer than {version_text(BUILT_FOR)}, for which the extension was "
            f"built; set {NEWER_NEEDS}=1 on all ranks"
        )
    ep = _guarded(lambda: open_extension().get_lib_version(), "the extension cannot be loaded")
    if _numbers(str(ep)) < LEAST_EP:
        raise ValueError(f"NCCL EP {ep} is too old; 0.2 is needed: {INSTALL}")
    _check_headers(dict(os.environ))  # the import has set where they are
    compiler, wanted = _compiler_major(environment), _guarded(_library_major, "cuda.bindings is not there")
    if compiler != wanted:
        raise ValueError(f"nvcc is of CUDA {compiler} and cuda.bindings of CUDA {wanted}; they must be alike")
    return f"NCCL EP {ep}, nccl4py {bindings}, NCCL {version_text(nccl)}, CUDA {compiler}"


def open_extension() -> Any:
    """Import the extension, after torch, whose NCCL it then uses."""
    from nccl import ep

    return ep


def _is_installed() -> bool:
    try:
        return find_spec("nccl.ep") is not None
    except (ImportError, ValueError):  # there is no nccl, or a stand-in without a spec
        return False


def _check_headers(environment: Mapping[str, str]) -> None:
    """Look for the headers that the extension's kernels include, where it will look."""
    folder = environment.get("NCCL_EP_JIT_BUILD_INCLUDE_DIR")
    if not folder:
        folder = f"{environment['NCCL_HOME']}/include" if environment.get("NCCL_HOME") else "/usr/include"
    if not (Path(folder) / "nccl_device.h").exists():
        raise ValueError(
            f"no nccl_device.h in {folder}, with which the extension compiles its kernels; set NCCL_HOME to "
            "the folder of NCCL's include and lib"
        )


def _compiler_major(environment: Mapping[str, str]) -> int:
    """Return the CUDA version of the nvcc that the extension will call."""
    found = environment.get("NCCL_EP_JIT_NVCC") or environment.get("NVCC")
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if not found and home and (Path(home) / "bin" / "nvcc").exists():
        found = str(Path(home) / "bin" / "nvcc")
    path = shutil.which(found or "nvcc", path=environment.get("PATH"))
    if path is None:
        raise ValueError(
            f"no {found or 'nvcc'}, with which the extension compiles its kernels at run time; set CUDA_HOME "
            "on all nodes"
        )
    command = [path, "--version"]
    told = _guarded(
        lambda: subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout,
        f"{path} does not run",
    )
    release = re.search(r"release (\d+)\.", told)
    if release is None:
        raise ValueError(f"{path} --version names no release")
    return int(release.group(1))


def _library_major() -> int:
    from cuda import bindings

    return _numbers(bindings.__version__)[0]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        raise ValueError(f"{name} is not installed; {INSTALL}") from None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def _guarded(call: Callable[[], Any], what: str) -> Any:
    """Return ``call()``; ValueError with the first line of whatever it raises."""
    try:
        return call()
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{what}: {reason[0]}") from error
