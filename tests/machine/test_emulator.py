"""Static Linux programs on the emulated machine: their output and exit codes are the native ones, their memory is ciphertext."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("unicorn")

BOOT = Path(os.environ.get("CSVFAST_BOOT_FILES") or Path.home() / ".cache" / "csvfast" / "boot")
PATTERN = b"known plaintext of the guest 0123"

SCRIPT = """
echo start $0 $#
x=$(echo sub | tr a-z A-Z); echo "[$x]"
for i in 1 2 3; do echo $i; done | sort -r | head -2
seq 1 3000 > n; sort -n -r n | sha256sum; gzip -c n | gunzip | cmp - n && echo same
false || echo failed $?
( exit 5 ); echo $?
mkdir -p d/e; cd d; pwd; ls; cd ..; ln -s n link; readlink link; mv n m; cat link 2>/dev/null || echo dangling
rm -r d link m; ls
find . -name '*.sh' | sort; wc -c run.sh; head -c 20 /dev/zero | od -c | tail -1
trap 'echo got' USR1; kill -USR1 $$; echo after
sleep 0.05 & wait $!; echo waited $?
sh -c 'kill -TERM $$' 2>/dev/null; echo $?
echo 1 2 3 | awk '{ print $1 + $3, sin(1) }'; expr 6 \\* 7; printf '%05d|%s\\n' 42 end
cat <<X
here $((6*7))
X
yes | head -1
exit 9
"""

WORKER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define SIZE (4u << 20)
int main(int count, char **words) {
    static const char pattern[] = "known plaintext of the guest 0123";
    size_t step = sizeof pattern - 1, i, rounds = count > 1 ? strtoul(words[1], 0, 10) : 1;
    char *memory = malloc(SIZE), byte;
    while (rounds--) {
        for (i = 0; i + step <= SIZE; i += step) memcpy(memory + i, pattern, step);
        if (write(1, "r", 1) != 1 || read(0, &byte, 1) != 1) return 2;
        for (i = 0; i + step <= SIZE; i += step) if (memcmp(memory + i, pattern, step)) return 3;
    }
    return 0;
}
"""
CRASH = "int main(void) { *(volatile int *)64 = 1; return 0; }"
ODD = "#include <unistd.h>\n#include <sys/syscall.h>\nint main(void) { syscall(SYS_bpf, 0, 0, 0); return 0; }"
LOCKS = r"""
#include <signal.h>
#include <stdio.h>
#include <sys/time.h>
static volatile sig_atomic_t ticks;
static void tick(int number) { ticks += number == SIGALRM; }
int main(void) {
    static volatile unsigned long counter, lock, plain;
    unsigned long i, taken = 0, order = 0, one, old;
    struct itimerval each = {{0, 1000}, {0, 1000}};
    signal(SIGALRM, tick);
    setitimer(ITIMER_REAL, &each, 0);
    for (i = 0; i < 3000000; i++) {
        one = 1;
        __asm__ volatile("xchg %0, %1" : "+r"(one), "+m"(lock) : : "memory");
        taken += one;
        old = 1;
        __asm__ volatile("lock xadd %0, %1" : "+r"(old), "+m"(counter) : : "memory");
        order += old != i;
        __asm__ volatile("addq $1, %0" : "+m"(plain) : : "memory");
        lock = 0;
    }
    printf("%lu %lu %lu %lu\n", counter, plain, taken, order);
    return ticks < 20;
}
"""
MATH = r"""
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
static jmp_buf back;
static void handler(int number) { printf("signal %d\n", number); longjmp(back, 1); }
int main(int count, char **words) {
    double sum = 0;
    for (int i = 1; i < 2000; i++) sum += sin(i) / i;
    printf("%d %s %.9f\n", count, words[count - 1], sum);
    unsigned char code[] = {0xb8, 1, 0, 0, 0, 0xc3};
    unsigned char *page = mmap(0, 4096, 7, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 1; i <= 3; i++) { code[1] = i; memcpy(page, code, 6); printf("%d", ((int (*)(void))page)()); }
    char *grown = malloc(300000);
    memset(grown, 'x', 300000);
    grown = realloc(grown, 900000);
    printf("\n%c%c\n", grown[0], grown[299999]);
    fflush(stdout);
    int value = 1, status;
    if (!fork()) { value = 2; printf("child %d\n", value); fflush(stdout); _exit(3); }
    wait(&status);
    printf("parent %d child %d\n", value, WEXITSTATUS(status));
    signal(SIGUSR1, handler);
    if (!setjmp(back)) raise(SIGUSR1);
    printf("end\n");
    return 42;
}
"""


def command(root: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "csvfast", "machine", "run", "--root", str(root), "--seconds", "60", *words]


def emulate(root: Path, *words: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(root, *words), capture_output=True, timeout=100, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture(scope="module")
def busybox() -> Path:
    path = BOOT / "busybox"
    if not path.exists():
        pytest.skip("no static busybox: tools/install-test-tools.sh fetches one")
    return path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("programs")

    def compile_program(name: str, text: str, compiler: str = "gcc", *flags: str) -> Path:
        if shutil.which(compiler) is None:
            pytest.skip(f"no {compiler}")
        (folder / f"{name}.c").write_text(text)
        program = folder / name
        subprocess.run([compiler, "-O2", *(flags or ("-static",)), "-o", program, f"{name}.c", "-lm"], check=True, cwd=folder)
        return program

    return compile_program


def make_root(place: Path, busybox: Path) -> Path:
    (place / "bin").mkdir(parents=True)
    (place / "here").mkdir()
    shutil.copy(busybox, place / "bin" / "busybox")
    (place / "bin" / "sh").symlink_to("busybox")
    return place


@pytest.mark.parametrize("window", ["128KiB", "256KiB"])
def test_shell_script_is_native(busybox: Path, tmp_path: Path, window: str) -> None:
    root = make_root(tmp_path / "root", busybox)
    (root / "here" / "run.sh").write_text(SCRIPT)
    found = emulate(root, "--window", window, "--directory", "/here", "/bin/busybox", "sh", "run.sh", "one")
    native = tmp_path / "here"
    native.mkdir()
    (native / "run.sh").write_text(SCRIPT)
    # Its applets are its own in both worlds; only the working directory has another name.
    real = subprocess.run([busybox, "sh", "run.sh", "one"], capture_output=True, cwd=native, check=False, timeout=60)
    assert found.returncode == real.returncode == 9, found.stderr
    assert found.stdout.replace(b"/here/d", b"D") == real.stdout.replace(bytes(native / "d"), b"D")
    assert b"same" in found.stdout


def test_sha256_sort_and_gzip_of_much_data(busybox: Path, tmp_path: Path) -> None:
    root = make_root(tmp_path, busybox)
    data = os.urandom(1 << 20) * 50
    (root / "big").write_bytes(data)
    found = emulate(root, "/bin/busybox", "sha256sum", "/big")
    assert found.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest(), found.stderr
    lines = [os.urandom(8).hex().encode() for _ in range(5000)]
    (root / "lines").write_bytes(b"\n".join(lines) + b"\n")
    assert emulate(root, "/bin/busybox", "sort", "/lines").stdout == b"\n".join(sorted(lines)) + b"\n"
    packed = emulate(root, "/bin/busybox", "gzip", "-c", "/lines").stdout
    assert len(packed) < len(b"\n".join(lines))
    assert emulate(root, "/bin/busybox", "gunzip", "-c", input=packed).stdout == (root / "lines").read_bytes()


@pytest.mark.parametrize(("compiler", "flag"), [("gcc", "-static"), ("gcc", "-static-pie"), ("musl-gcc", "-static")])
def test_c_programs_are_native(compiled: Callable[..., Path], compiler: str, flag: str) -> None:
    program = compiled(f"math-{compiler}{flag}", MATH, compiler, flag)
    real = subprocess.run([program.name, "a", "b"], executable=program, capture_output=True, check=False, timeout=20)
    found = emulate(program.parent, f"/{program.name}", "a", "b")
    assert (found.stdout, found.returncode) == (real.stdout, real.returncode), found.stderr
    assert found.returncode == 42


def test_signals_never_repeat_an_instruction(compiled: Callable[..., Path]) -> None:
    program = compiled("locks", LOCKS)
    found = emulate(program.parent, "/locks")
    assert (found.stdout, found.returncode) == (b"3000000 3000000 0 0\n", 0), found.stderr


@pytest.mark.parametrize("window", ["64KiB", "256KiB"])
def test_the_dram_never_holds_plaintext(compiled: Callable[..., Path], tmp_path: Path, window: str) -> None:
    program = compiled("worker", WORKER)
    dram = tmp_path / "dram"
    words = command(program.parent, "--window", window, "--memory", "16MiB", "--dram", str(dram), "/worker", "3")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for _ in range(3):
                assert process.stdout.read(1) == b"r"
                held = dram.read_bytes()
                assert PATTERN[:16] not in held
                assert PATTERN[-16:] not in held
                assert len(held) - held.count(0) > 3_500_000  # it is there, as ciphertext
                process.stdin.write(b"g")
                process.stdin.flush()
                for _ in range(5):
                    assert PATTERN[:16] not in dram.read_bytes()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert PATTERN[:16] not in dram.read_bytes()


def test_changed_ciphertext_is_noticed_by_the_program(compiled: Callable[..., Path], tmp_path: Path) -> None:
    program = compiled("worker", WORKER)
    dram = tmp_path / "dram"
    words = command(program.parent, "--window", "64KiB", "--memory", "16MiB", "--dram", str(dram), "/worker", "1")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.read(1) == b"r"
            held = dram.read_bytes()
            with dram.open("r+b") as file:  # every second frame changed in one byte; the first ones hold the stack and libc
                for place in range(2 << 20, len(held), 8192):
                    if held[place]:
                        file.seek(place)
                        file.write(bytes([held[place] ^ 1]))
            process.stdin.write(b"g")
            process.stdin.close()
            assert process.wait(60) != 0
        finally:
            process.kill()


def test_nothing_outside_of_the_root(busybox: Path, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", busybox)
    (tmp_path / "secret").write_text("outside")
    (root / "out").symlink_to("../../secret")
    (root / "absolute").symlink_to(tmp_path / "secret")
    script = "cat /../secret; cat out; cat absolute; cat ../../../secret; cd /..; pwd; cat /proc/1/environ; echo done"
    found = emulate(root, "/bin/busybox", "sh", "-c", script)
    assert b"outside" not in found.stdout + found.stderr
    assert found.stdout == b"/\ndone\n"
    assert found.stderr.count(b"can't open") == 5


def test_limits_and_faults(busybox: Path, compiled: Callable[..., Path], tmp_path: Path) -> None:
    root = make_root(tmp_path, busybox)
    endless = ("/bin/busybox", "sh", "-c", "while :; do :; done")
    found = emulate(root, "--seconds", "0.5", *endless)
    assert (found.returncode, found.stdout) == (2, b"")
    assert b"the time is over" in found.stderr
    found = emulate(root, "--instructions", "100000", *endless)
    assert found.returncode == 2
    assert b"more than 100000 instructions" in found.stderr
    program = compiled("worker", WORKER)
    found = emulate(program.parent, "--memory", "1MiB", "/worker")
    assert found.returncode == 3
    assert b"DRAM is full: 1048576 bytes" in found.stderr
    program = compiled("crash", CRASH)
    found = emulate(program.parent, "/crash")
    assert found.returncode == 139
    assert b"Segmentation fault" in found.stderr
    program = compiled("odd", ODD)
    found = emulate(program.parent, "/odd")
    assert found.returncode == 3
    assert b"system call 321" in found.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda elf: b"", "no ELF file"),
        (lambda elf: b"#!/bin/sh\n", "no ELF file"),
        (lambda elf: elf[:100], "reach past the file"),
        (lambda elf: elf[:4] + b"\1" + elf[5:], "class 1"),
        (lambda elf: elf[:18] + b"\xb7" + elf[19:], "machine 183"),
        (lambda elf: elf[:16] + b"\1" + elf[17:], "ELF type 1"),
        (lambda elf: elf[:24] + b"\xff" * 8 + elf[32:], "lies in no segment"),
        (lambda elf: elf[:32] + b"\xff" * 8 + elf[40:], "reach past the file"),
        (lambda elf: elf[:5000], "does not fit file or memory"),
    ],
)
def test_bad_programs_get_one_line(
    compiled: Callable[..., Path], tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    (tmp_path / "bad").write_bytes(change(compiled("crash", CRASH).read_bytes()))
    found = emulate(tmp_path, "/bad")
    assert found.returncode == 2
    assert found.stderr.count(b"\n") == 1
    assert message in found.stderr.decode()
    assert b"Traceback" not in found.stderr


def test_usage_errors(tmp_path: Path) -> None:
    assert b"/none" in emulate(tmp_path, "/none").stderr or emulate(tmp_path, "/none").returncode == 3
    (tmp_path / "x").write_bytes(b"")
    assert b"at least 65536" in emulate(tmp_path, "--window", "4096", "/x").stderr
    assert b"NAME=VALUE" in emulate(tmp_path, "--env", "x", "/x").stderr


def test_dynamic_programs_are_refused(compiled: Callable[..., Path]) -> None:
    program = compiled("dynamic", CRASH, "gcc", "-fPIE")
    assert b"dynamically linked" in emulate(program.parent, "/dynamic").stderr


@pytest.mark.parametrize("how", ["kill", "limit", "end"])
def test_forked_processes_end_with_the_first(busybox: Path, tmp_path: Path, how: str) -> None:
    root = make_root(tmp_path, busybox)
    script = "sleep 300 & echo $!; " + ("exit 0" if how == "end" else "wait")
    words = command(root, *(("--seconds", "2") if how == "limit" else ()), "/bin/sh", "-c", script)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        child = Path("/proc") / process.stdout.readline().decode().strip()
        if how == "kill":
            assert child.exists()
            process.kill()
        process.wait(60)
        until = time.monotonic() + 20
        while time.monotonic() < until and child.exists() and "\nState:\tZ" not in (child / "status").read_text():
            time.sleep(0.05)
        assert not child.exists() or "\nState:\tZ" in (child / "status").read_text()
