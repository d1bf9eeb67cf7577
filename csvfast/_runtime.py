"""What runs here: versions, CPU features, kernels, and where the C header is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from csvfast import _core

__all__ = ["cpu_model", "force_kernel", "get_include", "get_library", "info", "version"]


def version() -> str:
    """The version of csvfast, single-sourced from csvfast.h."""
    return _core.version()


def force_kernel(primitive: str, name: str | None) -> None:
    """Uses one kernel by name for objects made from now on; ``None`` goes back to the automatic choice.

    Args:
        primitive: ``"sm4"``, ``"sm3"``, ``"sm3-many"``, ``"ghash"``, ``"sm2"`` or ``"sm2-many"``.
        name: a name from ``info()["kernels"][primitive]["available"]``, or None.

    Raises:
        KernelError: no such primitive or kernel, or this CPU cannot run it; the choice is unchanged.

    Thread-safety: atomic, but the choice is the whole process's. Objects made earlier keep their kernel, but
    for SM2 keys, which hold none: each call takes the one in use.
    """
    _core.force_kernel(primitive, name)


def get_include() -> str:
    """The directory that holds ``csvfast.h`` and ``csvfast_vmram.h``, for compilers.

    Raises:
        FileNotFoundError: the installation carries no header.
    """
    package = Path(__file__).resolve().parent
    # An installed package carries its own copy; an editable one stands beside csrc/.
    for folder in (package / "include", package.parent / "csrc" / "include"):
        if (folder / "csvfast.h").is_file():
            return str(folder)
    raise FileNotFoundError(f"csvfast.h is missing from {package / 'include'}")


def get_library(name: str = "csvfast") -> str:
    """The path of a C library that comes with the package.

    Args:
        name: ``"csvfast"``, the library behind ``csvfast.h``, for linkers and ctypes; or ``"vmram-preload"``, which QEMU
            is given by ``LD_PRELOAD`` for encrypted RAM (docs/encrypted-ram.md).

    Raises:
        ValueError: no such library.
        FileNotFoundError: the installation carries it not (only Linux has them), and no ``make -C csrc`` made it in the checkout.

    Example:
        ``cc program.c -I"$(python -c 'import csvfast; print(csvfast.get_include())')" /path/of/libcsvfast.so.0``; the program
        finds the library again by an rpath (``-Wl,-rpath,DIRECTORY``), because no system directory holds it.
    """
    names = {
        "csvfast": f"libcsvfast.so.{version().partition('.')[0]}",
        "vmram-preload": "libcsvfast-vmram-preload.so",
    }
    if name not in names:
        raise ValueError(f"unknown library {name!r}: expected one of {', '.join(map(repr, names))}")
    package = Path(__file__).resolve().parent
    for folder in (package / "lib", package.parent / "csrc" / "build"):
        path = folder / names[name]
        if path.is_file():
            return str(path)
    raise FileNotFoundError(f"{names[name]} is missing from {package / 'lib'}; in a checkout, `make -C csrc library` makes it")


def cpu_model() -> str:
    """The CPU's name as the system gives it; the machine type where it gives none."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return os.uname().machine


def _installed(distribution: str) -> str | None:
    from importlib import metadata  # half of the time `import csvfast` may take

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def info() -> dict[str, Any]:
    """What csvfast found and chose, ready for JSON.

    Keys:
        ``version``; ``cpu`` (``model``, ``machine``, ``count`` usable by this process, ``features``); ``kernels`` (for each
        primitive: ``chosen``, ``available`` on this CPU and ``compiled`` in, the most preferred first); ``environment``
        (``CSVFAST_KERNEL`` and ``CSVFAST_DISABLE`` as set, else None); ``versions`` (Python, OpenSSL, numpy,
        cryptography); ``include`` (directory of csvfast.h, or None).

    Thread-safety: safe from any thread.
    """
    import ssl  # for its version only, and slow to import

    try:
        include: str | None = get_include()
    except FileNotFoundError:
        include = None
    return {
        "version": version(),
        "cpu": {
            "model": cpu_model(),
            "machine": os.uname().machine,
            "count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "features": _core.cpu_features(),
        },
        "kernels": {
            primitive: {
                "chosen": _core.kernel(primitive),
                "available": _core.kernels(primitive, available=True),
                "compiled": _core.kernels(primitive),
            }
            for primitive in _core.primitives()
        },
        "environment": {name: os.environ.get(name) for name in ("CSVFAST_KERNEL", "CSVFAST_DISABLE")},
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            "openssl": ssl.OPENSSL_VERSION,
            "numpy": _installed("numpy"),
            "cryptography": _installed("cryptography"),
        },
        "include": include,
    }
