"""Build of the one extension, csvfast._core: the Cython binding and every C file of csrc/ in one shared object.

On Linux also the C library for other programs and the one that is preloaded into QEMU, of the same objects.

Instruction sets are chosen inside the C files (csrc/target_begin.h), so one set of flags serves all of them.

Environment
    CSVFAST_SANITIZE   comma-separated sanitizers for the C code and the binding, e.g. ``address,undefined``
    CSVFAST_DEBUG      1 = Cython bounds, None and division checks on, no optimisation
    CSVFAST_COVERAGE   1 = gcov instrumentation
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
HEADER = Path("csrc/include/csvfast.h")
HEADERS = (HEADER, Path("csrc/include/csvfast_vmram.h"))
SOURCE_FOLDERS = ("csrc", "csrc/sm4", "csrc/sm3", "csrc/sm2", "csrc/sha256", "csrc/engine")
HAS_LIBRARIES = sys.platform.startswith("linux")
DEBUG = os.environ.get("CSVFAST_DEBUG", "") not in ("", "0")
COVERAGE = os.environ.get("CSVFAST_COVERAGE", "") not in ("", "0")
SANITIZE = os.environ.get("CSVFAST_SANITIZE", "")


def version() -> str:
    """The version of the C library, which is the version of the package."""
    found = re.search(r'#define CSVF_VERSION_STRING "([^"]+)"', (ROOT / HEADER).read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit(f"{HEADER} defines no CSVF_VERSION_STRING")
    return found.group(1)


def library_names() -> tuple[str, str]:
    """File names of the C library, which is its soname since a wheel holds no links, and of the library for QEMU."""
    return f"libcsvfast.so.{version().partition('.')[0]}", "libcsvfast-vmram-preload.so"


def in_tree(pattern: str, *folders: str) -> list[str]:
    """Files below the given folders (not their subfolders), relative to the root, in a fixed order."""
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).glob(pattern))


def compile_flags() -> list[str]:
    flags = ["-std=c11", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
    flags += ["-O0", "-g"] if DEBUG else ["-O2", "-g"]
    if SANITIZE:
        flags += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    if COVERAGE:
        flags += ["--coverage"]
    return flags


def link_flags() -> list[str]:
    flags = ["-pthread"]
    if sys.platform.startswith("linux"):
        # Another copy of the C library in the same process must not take over this one's calls.
        flags += ["-Wl,-Bsymbolic"]
    if SANITIZE:
        flags += [f"-fsanitize={SANITIZE}"]
    if COVERAGE:
        flags += ["--coverage"]
    return flags


class BuildExtension(build_ext):
    """Compiles the C files of the extension side by side, and only those whose object is out of date."""

    def build_extension(self, ext: Any) -> None:
        compiler: Any = self.compiler
        newest_header = max((ROOT / name).stat().st_mtime for name in ext.depends)
        setup_time = Path(__file__).stat().st_mtime
        whole = compiler.compile
        stamp = Path(self.build_temp) / "flags"
        flags = repr((compile_flags(), compiler.compiler_so))
        stale_flags = not stamp.is_file() or stamp.read_text(encoding="utf-8") != flags

        def up_to_date(source: str, target: str) -> bool:
            made = Path(target).stat().st_mtime if Path(target).is_file() else 0.0
            return not stale_flags and made > max(Path(source).stat().st_mtime, newest_header, setup_time)

        def compile_one(source: str, output_dir: str, arguments: dict[str, Any]) -> str:
            (target,) = compiler.object_filenames([source], output_dir=output_dir)
            if not up_to_date(source, target):
                whole([source], output_dir=output_dir, **arguments)
            return str(target)

        def compile_all(sources: list[str], output_dir: str = "", **arguments: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
                return list(workers.map(lambda source: compile_one(source, output_dir, arguments), sources))

        compiler.compile = compile_all
        try:
            super().build_extension(ext)
            if HAS_LIBRARIES:
                self.build_libraries(ext)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(flags, encoding="utf-8")
        finally:
            compiler.compile = whole

    def library_targets(self) -> list[Path]:
        """Beside the extension's package, where csvfast.get_library() finds them."""
        folder = (ROOT if self.inplace else Path(self.build_lib)) / "csvfast" / "lib"
        return [folder / name for name in library_names()]

    def build_libraries(self, ext: Any) -> None:
        """Links the two shared libraries; what the extension is made of is compiled already."""
        compiler: Any = self.compiler
        common = compiler.object_filenames(
            [source for source in ext.sources if source.startswith("csrc/")], output_dir=self.build_temp
        )
        window_sources = in_tree("*.c", "csrc/vmram")
        window = compiler.compile(
            window_sources, output_dir=self.build_temp, include_dirs=ext.include_dirs, extra_postargs=compile_flags()
        )
        preload = [name for name in window if Path(name).stem.startswith("preload")]
        objects = [*common, *(name for name in window if name not in preload)]
        flags = [*link_flags(), "-Wl,-z,relro,-z,now"]
        flags += [] if SANITIZE else ["-Wl,-z,defs"]
        flags += [] if DEBUG else ["-Wl,--strip-debug"]
        library, preloaded = self.library_targets()
        library.parent.mkdir(parents=True, exist_ok=True)
        compiler.link_shared_object(objects, str(library), extra_postargs=[*flags, f"-Wl,-soname,{library.name}"])
        # Through an archive, so that the library's own functions can be hidden: the program may use another csvfast.
        archive = Path(self.build_temp) / "libcsvfast.a"
        archive.unlink(missing_ok=True)
        compiler.create_static_lib(objects, "csvfast", output_dir=self.build_temp)
        compiler.link_shared_object(
            [*preload, str(archive)],
            str(preloaded),
            extra_postargs=[*flags, "-Wl,--exclude-libs,ALL", f"-Wl,-soname,{preloaded.name}"],
        )

    def get_outputs(self) -> list[str]:
        outputs: list[str] = super().get_outputs()
        return [*outputs, *map(str, self.library_targets())] if HAS_LIBRARIES and not self.inplace else outputs


class BuildPackage(build_py):
    """Puts the public C headers into the package, where csvfast.get_include() finds them."""

    def _header_targets(self) -> list[Path]:
        return [Path(self.build_lib) / "csvfast" / "include" / header.name for header in HEADERS]

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for header, target in zip(HEADERS, self._header_targets(), strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / header, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *map(str, self._header_targets())]


core = Extension(
    "csvfast._core",
    sources=["csvfast/_core.pyx", *in_tree("*.c", *SOURCE_FOLDERS)],
    depends=[*in_tree("*.h", "csrc/include", "csrc/vmram", *SOURCE_FOLDERS), *in_tree("*.px[di]", "csvfast")],
    include_dirs=["csrc/include", "csrc"],
    extra_compile_args=compile_flags(),
    extra_link_args=link_flags(),
)

setup(
    version=version(),
    ext_modules=cythonize(
        [core],
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": DEBUG,
            "wraparound": DEBUG,
            "initializedcheck": DEBUG,
            "nonecheck": DEBUG,
            "cdivision": not DEBUG,
        },
        show_all_warnings=not DEBUG,
    ),
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
)
