"""Programs against the installed C library alone, found by pkg-config: what is installed, and the examples that embed it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import csvfast
from csvfast.certs import ManufacturingLine

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "11_embedding"
MAJOR = csvfast.__version__.partition(".")[0]

# A real-mode program at the reset vector: 512 stores of two bytes, one to a line from 0x1000 on, the same as loads, then the end.
PROGRAM = """
    31 c0  8e d8                            xor ax, ax; mov ds, ax
    bb 00 10  b9 00 02                      mov bx, 0x1000; mov cx, 512
    89 07  83 c3 40  e2 f9                  mov [bx], ax; add bx, 64; loop
    bb 00 10  b9 00 02                      mov bx, 0x1000; mov cx, 512
    8b 07  83 c3 40  e2 f9                  mov ax, [bx]; add bx, 64; loop
    ba f4 00  b0 00  ee  f4  eb fd          mov dx, 0xf4; mov al, 0; out dx, al; hlt; jmp
"""


def environment(installed: Path) -> dict[str, str]:
    library = str(installed / "lib")
    return dict(os.environ) | {"PKG_CONFIG_PATH": f"{library}/pkgconfig", "LD_LIBRARY_PATH": library}


def pkg_config(installed: Path, *arguments: str) -> str:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    command = ["pkg-config", *arguments, "csvfast"]
    return subprocess.run(command, env=environment(installed), capture_output=True, text=True, check=True).stdout.strip()


def output(installed: Path, *command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), env=environment(installed), cwd=cwd, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, built by their Makefile."""
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    folder = tmp_path_factory.mktemp("embedding") / "examples"
    shutil.copytree(EXAMPLE, folder)
    output(installed, "make", "-s", "CFLAGS=-O2 -Wall -Wextra -Werror", cwd=folder)
    return folder


def test_install_is_whole(installed: Path) -> None:
    files = sorted(path.relative_to(installed).as_posix() for path in installed.rglob("*") if not path.is_dir())
    assert files == sorted([
        "include/csvfast.h", "include/csvfast_vmram.h", "lib/libcsvfast.a", "lib/libcsvfast.so", f"lib/libcsvfast.so.{MAJOR}",
        f"lib/libcsvfast.so.{csvfast.__version__}", "lib/libcsvfast-vmram-preload.so", "lib/pkgconfig/csvfast.pc",
    ])  # fmt: skip
    library = installed / "lib"
    assert (library / "libcsvfast.so").readlink() == Path(f"libcsvfast.so.{MAJOR}")
    assert (library / f"libcsvfast.so.{MAJOR}").readlink() == Path(f"libcsvfast.so.{csvfast.__version__}")
    assert pkg_config(installed, "--modversion") == csvfast.__version__
    assert f"[libcsvfast.so.{MAJOR}]" in output(installed, "readelf", "-d", library / "libcsvfast.so")


def test_library_exports_what_the_headers_declare(installed: Path) -> None:
    declared = set()
    for name in ("csvfast.h", "csvfast_vmram.h"):
        text = (installed / "include" / name).read_text(encoding="utf-8")
        declared |= set(re.findall(r"^CSVF_API[^(;]*?\b(csvf_\w+) *\(", text, re.MULTILINE))
    lines = output(installed, "nm", "-D", "--defined-only", installed / "lib" / "libcsvfast.so").splitlines()
    assert {line.split()[-1] for line in lines} == declared
    assert len(declared) > 100


@pytest.mark.parametrize("static", [False, True], ids=["shared", "static"])
@pytest.mark.parametrize(
    ("compiler", "standard"), [("gcc", "c11"), ("clang", "c11"), ("g++", "c++17"), ("clang++", "c++17")]
)
def test_program_in_every_language(installed: Path, tmp_path: Path, compiler: str, standard: str, static: bool) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    source = tmp_path / "use.c"
    source.write_text(
        "#include <csvfast.h>\n#include <csvfast_vmram.h>\n#include <stdio.h>\n#include <string.h>\n"
        "static void count(void *context, const csvf_event *event) { *(int *)context += event->is_encrypted; }\n"
        "int main(void) {\n"
        "    csvf_engine *engine;\n    int events = 0;\n    char back[6] = {0};\n"
        "    if (csvf_init() || csvf_engine_create(&engine, 4096, NULL) || csvf_asid_generate(engine, 1)) return 1;\n"
        "    if (csvf_engine_set_observer(engine, count, &events) || csvf_write(engine, 1, 3, \"hello\", 6)) return 1;\n"
        "    if (csvf_read(engine, back, 6, 1, 3) || memcmp(csvf_engine_dram(engine) + 3, \"hello\", 6) == 0) return 1;\n"
        '    printf("%s %s %d\\n", csvf_version(), back, events);\n'
        "    csvf_engine_destroy(engine);\n    return 0;\n}\n",
        encoding="utf-8",
    )
    flags = pkg_config(installed, "--cflags", "--libs", *(["--static"] if static else [])).split()
    if static:
        flags = [str(installed / "lib" / "libcsvfast.a") if flag == "-lcsvfast" else flag for flag in flags]
    language = "c++" if "++" in compiler else "c"
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    output(installed, compiler, f"-std={standard}", *strict, "-x", language, source, "-x", "none", *flags, "-o", tmp_path / "use")
    assert output(installed, tmp_path / "use") == f"{csvfast.__version__} hello 2\n"
    assert ("libcsvfast" in output(installed, "readelf", "-d", tmp_path / "use")) is not static


def test_attack(installed: Path, built: Path) -> None:
    lines = output(installed, built / "attack").splitlines()
    assert lines[-1] == "done"
    assert lines[0].endswith("account=alice000balance=00000100")
    assert "alice000" in lines[2]
    assert "00000100" not in lines[2], "the block whose bit was flipped"
    assert lines[4].endswith("account=alice000balance=00000100"), "played back"
    assert not [line for line in (lines[1], lines[3], lines[5]) if "alice" in line or "balance" in line]


def test_trace(installed: Path, built: Path) -> None:
    assert output(installed, built / "trace").splitlines() == [
        "install asid 1 generation 1",
        "write   asid 0 0x002000 +16",
        "launch  asid 1 0x002000 +4096 encrypted",
        "read    asid 1 0x002000 +64 encrypted",
        "write   asid 1 0x002000 +64 encrypted",
        "restored: hello, gcaches",
    ]


def test_client_of_the_processor(installed: Path, built: Path, tmp_path: Path) -> None:
    ManufacturingLine.create().make_chip().save(tmp_path / "chip")
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "csvfast", "platform", "serve", "chip", "--socket", "socket", "--size", "16MiB"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            assert "listening on socket" in server.stdout.readline()
            lines = output(installed, built / "processor_client", "socket", cwd=tmp_path).splitlines()
        finally:
            server.terminate()
            server.communicate(timeout=30)
    assert [line.split()[-1] for line in lines if " status " in line][:6] == ["0"] * 6
    assert "the host still sees the words: no" in lines
    assert re.fullmatch("measurement [0-9a-f]{64}", next(line for line in lines if line.startswith("measurement")))
    assert any(re.fullmatch(r"guest \d+: policy 5, ASID 3, state 3", line) for line in lines)
    assert "status 0x1" in lines[-1], "the guest is gone"


def test_qemu_plugin_counts_every_access(installed: Path, built: Path, tmp_path: Path) -> None:
    """512 lines are written, then read: as many fills, hits and write-backs as the program says, not about as many."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    code = bytes.fromhex("".join(line[:40] for line in PROGRAM.splitlines()))
    rom = bytearray(65536)
    rom[: len(code)] = code
    rom[0xFFF0:0xFFF3] = b"\xe9" + (0x10000 - 0xFFF3).to_bytes(2, "little")  # jmp to the start
    (tmp_path / "rom").write_bytes(rom)
    done = subprocess.run(
        [qemu, "-display", "none", "-nodefaults", "-machine", "pc,accel=tcg", "-m", "16", "-bios", tmp_path / "rom",
         "-device", "isa-debug-exit,iobase=0xf4", "-plugin", f"{built / 'qemu_plugin.so'},memory=16"],
        env=environment(installed), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # the device's (0 << 1) | 1
    assert done.stdout.splitlines()[-1] == (
        "csvfast: reads 512 writes 512 hits 512/0/0 misses 512 write-backs 512 decrypted 32768 encrypted 32768 outside 0"
    )
