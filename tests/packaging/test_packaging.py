"""The sdist holds everything, and what is built from it in an empty environment is whole and works."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import csvfast

ROOT = Path(__file__).parents[2]
LEFT_OUT = {
    ".git", "build", "dist", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis",
    ".benchmarks", ".gitignore", ".github",
}  # fmt: skip
SONAME = f"libcsvfast.so.{csvfast.__version__.partition('.')[0]}"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the tests stand outside a source tree"),
]


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a program away from this environment's own settings; its output, or a failure that shows it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CSVFAST_", "PYTHON"))}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def tracked() -> set[str]:
    """Files of the source tree that are not products of a build."""
    found = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.endswith(".egg-info")]
        for name in files:
            if (
                name not in LEFT_OUT
                and not re.search(r"\.(?:so|so\.[0-9.]+|o|a|pyc)$", name)
                and not name.startswith("_core.c")
            ):
                found.add((Path(folder) / name).relative_to(ROOT).as_posix())
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays free of build products."""
    base = tmp_path_factory.mktemp("sdist")
    copy = base / "source tree"  # the name has a space on purpose
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", base / "dist", copy, cwd=base)
    (made,) = (base / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", base, sdist, cwd=base)
    (made,) = base.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and what it asks for, nothing else."""
    base = tmp_path_factory.mktemp("empty")
    venv.create(base / "environment", with_pip=True)
    run(base / "environment/bin/pip", "install", "--quiet", wheel, cwd=base)
    return base


def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in names if name.startswith("csvfast.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert tracked() - names == set(), "missing from the sdist"
    assert names - tracked() - made == set(), "should not be in the sdist"


def test_version_has_one_source(sdist, wheel):
    header = (ROOT / "csrc/include/csvfast.h").read_text(encoding="utf-8")
    (version,) = re.findall(r'CSVF_VERSION_STRING "(.*)"', header)
    assert sdist.name == f"csvfast-{version}.tar.gz"
    assert wheel.name.startswith(f"csvfast-{version}-")
    assert csvfast.__version__ == version
    numbers = re.findall(r"#define CSVF_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header)
    assert ".".join(numbers) == version


def test_wheel_is_complete(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        information = {name.partition(".dist-info/")[2] for name in archive.namelist() if ".dist-info/" in name}
        headers = {name: archive.read(f"csvfast/include/{name}") for name in ("csvfast.h", "csvfast_vmram.h")}
        (points,) = (archive.read(name) for name in archive.namelist() if name.endswith("entry_points.txt"))
    extension = {name for name in names if re.fullmatch(r"csvfast/_core\..*\.so", name)}
    assert len(extension) == 1
    suffixes = (".py", ".pyi", ".pxd", "py.typed", ".toml")
    wanted = {name for name in tracked() if name.startswith("csvfast/") and name.endswith(suffixes)}
    libraries = {f"csvfast/lib/{SONAME}", "csvfast/lib/libcsvfast-vmram-preload.so"} if sys.platform == "linux" else set()
    included = {f"csvfast/include/{name}" for name in headers}
    assert names - extension == wanted | included | libraries | {"_csvfast_command.py"}
    for name, header in headers.items():
        assert header == (ROOT / "csrc/include" / name).read_bytes()
    assert "licenses/LICENSE" in information
    assert "csvfast = _csvfast_command:main" in points.decode()


def test_runs_in_an_empty_environment(empty):
    program = """
import json, csvfast
memory = csvfast.EncryptedMemory(1 << 20)
memory.install(1)
memory.write(100, b"data", 1)
print(json.dumps({
    "sm3": csvfast.sm3(b"abc").hexdigest(),
    "read": memory.read(100, 4, 1).decode(),
    "file": csvfast.__file__,
    "include": csvfast.get_include(),
    "kernels": csvfast.info()["kernels"],
}))
"""
    found = json.loads(run(empty / "environment/bin/python", "-I", "-c", program, cwd=empty))
    assert found["sm3"] == "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"
    assert found["read"] == "data"
    assert str(empty) in found["file"]
    assert (Path(found["include"]) / "csvfast.h").is_file()
    for primitive, kernels in csvfast.info()["kernels"].items():
        assert found["kernels"][primitive]["compiled"] == kernels["compiled"]


def test_command_line_runs_in_an_empty_environment(empty):
    assert csvfast.__version__ in run(empty / "environment/bin/csvfast", "--version", cwd=empty)


def test_runtime_needs_only_the_core_dependencies(empty):
    installed = json.loads(run(empty / "environment/bin/pip", "list", "--format", "json", cwd=empty))
    names = {entry["name"].lower() for entry in installed}
    assert {"numpy", "cryptography", "typer", "rich"} <= names
    assert not names & {"gmssl", "gmalg", "cython", "pytest", "tongsuopy", "matplotlib"}


def test_header_serves_c_and_cplusplus(empty, tmp_path):
    include = run(
        empty / "environment/bin/python", "-I", "-c", "import csvfast; print(csvfast.get_include())", cwd=empty
    )
    source = tmp_path / "use.c"
    source.write_text("#include <csvfast.h>\nint main(void) { return sizeof(csvf_xts) == 0; }\n", encoding="utf-8")
    for compiler, standard in (("cc", "c11"), ("c++", "c++17")):
        if shutil.which(compiler) is None:
            pytest.skip(f"{compiler} is not installed")
        language = "c++" if compiler == "c++" else "c"
        flags = ["-x", language, f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        run(compiler, *flags, "-I", include.strip(), source, cwd=tmp_path)


def where(empty: Path, expression: str) -> str:
    program = f"import csvfast; print({expression})"
    return run(empty / "environment/bin/python", "-I", "-c", program, cwd=empty).strip()


@pytest.mark.skipif(sys.platform != "linux", reason="the C libraries are built on Linux")
def test_libraries_are_whole(empty):
    library, preload = where(empty, "csvfast.get_library(), csvfast.get_library('vmram-preload'), sep='\\n'").split("\n")
    assert Path(library) == Path(where(empty, "csvfast.__path__[0]")) / "lib" / SONAME
    opened = ctypes.CDLL(library)
    opened.csvf_version.restype = ctypes.c_char_p
    assert opened.csvf_version().decode() == csvfast.__version__
    assert opened.csvf_init() == 0
    digest = ctypes.create_string_buffer(32)
    opened.csvf_sm3_digest(digest, b"abc", ctypes.c_size_t(3))
    assert digest.raw == csvfast.sm3(b"abc").digest()

    def exported(path: str) -> set[str]:
        return {line.split()[-1] for line in run("nm", "-D", "--defined-only", path, cwd=empty).splitlines()}

    declared = set()
    for name in ("csvfast.h", "csvfast_vmram.h"):
        declared |= set(re.findall(r"^CSVF_API[^(;]*?\b(csvf_\w+) *\(", (ROOT / "csrc/include" / name).read_text(), re.MULTILINE))
    assert exported(library) == declared
    assert exported(preload) == {"mmap", "mmap64", "munmap", "madvise"}
    assert f"[{SONAME}]" in run("readelf", "-d", library, cwd=empty)


@pytest.mark.skipif(sys.platform != "linux", reason="the C libraries are built on Linux")
def test_cython_code_cimports_the_installed_package(empty, tmp_path):
    """Declarations, header and library all come from the wheel; the test's environment lends Cython only."""
    (tmp_path / "use.pyx").write_text(
        "from csvfast._core cimport CSVF_OK, csvf_init, csvf_sm3_digest, csvf_version\n"
        "from libc.stdint cimport uint8_t\n"
        "def use(bytes data):\n"
        "    cdef uint8_t digest[32]\n"
        "    assert csvf_init() == CSVF_OK\n"
        "    csvf_sm3_digest(digest, <const char *>data, len(data))\n"
        "    return csvf_version().decode(), digest[:32]\n",
        encoding="utf-8",
    )
    packages = where(empty, "csvfast.__path__[0].rpartition('/')[0]")
    library = where(empty, "csvfast.get_library()")
    run(sys.executable, "-m", "cython", "-3", "-I", packages, "use.pyx", cwd=tmp_path)
    run(
        "cc", "-shared", "-fPIC", "-O1", "-o", "use.so", "use.c", "-I", sysconfig.get_path("include"),
        "-I", where(empty, "csvfast.get_include()"), library, f"-Wl,-rpath,{Path(library).parent}", cwd=tmp_path,
    )  # fmt: skip
    program = "import sys; sys.path.insert(0, '.'); import use; version, digest = use.use(b'abc'); print(version, digest.hex())"
    shown = run(empty / "environment/bin/python", "-I", "-c", program, cwd=tmp_path)
    assert shown.split() == [csvfast.__version__, csvfast.sm3(b"abc").hexdigest()]
