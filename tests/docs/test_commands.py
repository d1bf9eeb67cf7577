"""The commands in the documentation run as they are written, in the order in which they stand on their page.

A page's lines are the `csvfast ...` lines of its code blocks, and what some need between them (openssl, sed). `NAME=$(...)` sets
a variable for those that follow, a line that ends in `&` is a server, which `kill %N; wait %N` ends, and a comment with
`exit code N:` says what is expected instead of 0.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machine import qemu_guest
from reference import ovmf_images as ovmf

import csvfast
from csvfast.certs import ManufacturingLine
from csvfast.cli import main

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sysconfig.get_path("scripts")) / "csvfast"
RECIPE = 'firmware = "OVMF.fd"\nkernel = "vmlinuz"\ninitrd = "initrd.img"\nappend = "console=ttyS0"\nvmsa = "amd"\n'
FIRMWARE = ovmf.good(size=65536)
SECRET_AREA = "0x80f000"  # of that firmware

# Lines that ask the network, a machine with Hygon's chips, or a static busybox (tests/machine/test_emulator.py runs it).
# README.md's lines on containers and CSV3 guests: other pages have such that run (containers.md, operations.md).
ELSEWHERE = (
    "csvfast machine run", "csvfast cert fetch", "csvfast cert import /opt", "csvfast bench",
    "csvfast measure batch s3:", "csvfast measure batch --cluster",
    "csvfast image push oci:sealed:1 docker://registry.example", "csvfast runtime measure --broker", "csvfast run --broker",
    "csvfast runtime create --bundle bundle web",
    "csvfast vm initrd --out guest.initrd --run \"python3 -m csvfast.machine.guest extend",
    "csvfast vm run --kernel vmlinuz --initrd guest.initrd --policy",
)  # fmt: skip
REAL = "csv_evidence.json"  # published with trustee; lines that read it are left out where it is absent
# They are written for real chips. Simulated evidence gets as far as the root, and no further.
REFUSED = {
    ("README.md", "csvfast report verify --certs hsk_cek.cert report.cert"),
    ("README.md", "csvfast report appraise --policy policy.toml --certs hsk_cek.cert report.cert"),
    ("docs/certificates.md", "csvfast cert verify hsk_cek.cert pek.cert"),
    ("docs/certificates.md", "csvfast cert import hsk_cek.cert --chip-id KPA64911240507"),
}

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the tests stand outside a source tree")


def commands(page: str) -> list[tuple[str, int]]:
    """Lines of code blocks that call the command, and the exit code each is expected to have."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    wanted = r"^(?:    )?((?:[A-Z_]+=\$\()?(?:csvfast [a-z]+|openssl pkey|openssl genpkey|sed -i|kill %\d)\b.*)$"
    for line in re.findall(wanted, text, re.MULTILINE):
        line, _, comment = line.partition(" #")
        line = line.strip()
        # The overview of the command names alternatives, the tables of a page are no commands.
        if line.startswith(ELSEWHERE) or re.search(r"  |\b[a-z-]+\|[a-z-]+|[A-Z]+\.\.\.|\.\.\.$", line):
            continue
        said = re.search(r"exit code (\d):", comment)
        found.append((line, int(said[1]) if said else 1 if (page, line) in REFUSED else 0))
    return found


def images(folder: Path) -> None:
    for index, name in enumerate(("disk.img", "a.img", "b.img", "c.img", "root.img", "vmlinuz", "initrd.img")):
        (folder / name).write_bytes(bytes([index]) * (16 << 12))
    (folder / "OVMF.fd").write_bytes(FIRMWARE)
    (folder / "guest.toml").write_text(RECIPE, encoding="utf-8")
    (folder / "yesterday.json").write_text(RECIPE, encoding="utf-8")
    (folder / "password").write_bytes(b"swordfish")
    (folder / "program.trace").write_bytes(b"".join(b" L %x,8\n S %x,4\n" % (at * 4160, at * 64) for at in range(200)))


def evidence(folder: Path) -> None:
    """The certificates and the report of a simulated chip, under the names that the pages use."""
    ManufacturingLine.create().make_chip().save(folder / "made")
    made = folder / "made"
    export = ["--pdh", folder / "pdh.cert", "--chain", folder / "chain.cert", "--hsk-cek", folder / "hsk_cek.cert"]
    quietly("platform", "pdh-export", made, *export)
    launch = ["--state", made, "--firmware", folder / "OVMF.fd", "--report-data", "00112233"]
    quietly("guest", "launch", *launch, "--report", folder / "report.cert")
    quietly("guest", "launch", *launch, "--report", folder / "evidence.json", "--report-format", "json")
    shutil.copy(made / "root.cert", folder / "root.cert")
    chain = (folder / "chain.cert").read_bytes()
    (folder / "pek.cert").write_bytes(chain[:2084])
    parts = [(folder / "pdh.cert").read_bytes(), chain, (folder / "hsk_cek.cert").read_bytes()[:832]]
    (folder / "full.chain").write_bytes(b"".join(parts))
    digest = csvfast.sm3(FIRMWARE).hexdigest()
    (folder / "policy.toml").write_text(f'measurements = ["{digest}"]\n', encoding="utf-8")


def evidence_with_chip(folder: Path) -> None:
    evidence(folder)
    shutil.copytree(folder / "made", folder / "chip", copy_function=shutil.copy2)
    shutil.rmtree(folder / "made")


def quietly(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def prepare_certificates(folder: Path) -> None:
    """`chip new chip` stands further down on that page than `--root chip/root.cert`."""
    evidence(folder)
    (folder / "chip").mkdir(mode=0o700)
    shutil.copy(folder / "root.cert", folder / "chip" / "root.cert")


def prepare_boot_files(folder: Path) -> None:
    """The pages' commands run with a cache folder of their own; what guests boot with is brought into it."""
    from csvfast.machine.initrd import boot_files

    if not (boot_files() / "busybox").is_file():
        pytest.skip("no guest files: run tools/install-test-tools.sh")
    (folder / "cache" / "csvfast").mkdir(parents=True)
    (folder / "cache" / "csvfast" / "boot").symlink_to(boot_files())


def prepare_fleet(folder: Path) -> None:
    """A directory of images, a manifest, a key."""
    from csvfast.crypto import SM2PrivateKey, dump_private_key, dump_public_key

    prepare_image(folder)
    (folder / "images").mkdir()
    for name in ("a.img", "b.img"):
        shutil.copy(folder / name, folder / "images" / name)
    manifest = '# nightly\na.img\n{"source": "b.img", "name": "payroll disk", "mode": "tree"}\n'
    (folder / "images.txt").write_text(manifest, encoding="utf-8")
    key = SM2PrivateKey.generate()
    (folder / "key.pem").write_bytes(bytes(dump_private_key(key)))
    (folder / "key.pub").write_bytes(bytes(dump_public_key(key.public_key)))


def prepare_machine(folder: Path) -> None:
    """A kernel that boots."""
    prepare_boot_files(folder)
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("no QEMU: run tools/install-test-tools.sh")
    shutil.copy(folder / "cache" / "csvfast" / "boot" / "vmlinuz", folder / "vmlinuz")


def prepare_image(folder: Path) -> None:
    """A layout with a small image."""
    from image.crypt_images import make_image

    make_image(folder / "app", "1")


def prepare_container(folder: Path) -> None:
    """A layout with a static program."""
    pytest.importorskip("unicorn")
    from runtime.sandbox_rig import make_clear

    make_clear(folder / "app", "1", command=("/bin/program", "env"))


def prepare_operations(folder: Path) -> None:
    """The same, and the evidence of a real chip where it is at hand (as in conftest.py)."""
    prepare_container(folder)
    data = Path(os.environ.get("CSVFAST_DATA") or ROOT.parent / "shared" / "data")
    if (data / "hygon" / REAL).is_file():
        shutil.copy(data / "hygon" / REAL, folder / REAL)


def prepare_unpacking(folder: Path) -> None:
    """A layout with an image that can be run."""
    from image.archives import entry, tar, write_layout

    layers = [tar(entry("bin/sh", b"#!", mode=0o755), entry("etc/motd", bytes(5000))), tar(entry("etc/motd", b"hello"))]
    write_layout(folder / "app", layers, tag="1", Cmd=["/bin/sh"])


def prepare_readme(folder: Path) -> None:
    evidence(folder)
    prepare_image(folder)


PAGES: list[tuple[str, int, Callable[[Path], None] | None]] = [
    ("README.md", 20, prepare_readme),
    ("docs/measure.md", 10, None),
    ("docs/fleets.md", 10, prepare_fleet),
    ("docs/command-line.md", 10, None),
    ("docs/certificates.md", 7, prepare_certificates),
    ("docs/reports.md", 5, evidence),
    ("docs/processor.md", 6, None),
    ("docs/processor-socket.md", 4, None),
    ("docs/broker.md", 20, None),
    ("docs/cache-model.md", 3, None),
    ("docs/guest.md", 2, prepare_boot_files),
    ("docs/virtual-machines.md", 3, prepare_machine),
    ("docs/images.md", 7, prepare_image),
    ("docs/image-encryption.md", 8, prepare_image),
    ("docs/containers.md", 10, prepare_container),
    ("docs/unpacking.md", 5, prepare_unpacking),
    ("docs/operations.md", 30, prepare_operations),
]


@pytest.mark.parametrize(("page", "least", "prepare"), PAGES, ids=[page for page, _, _ in PAGES])
def test_commands_run(tmp_path: Path, page: str, least: int, prepare: Callable[[Path], None] | None) -> None:
    lines = commands(page)
    assert len(lines) >= least, lines
    images(tmp_path)
    if prepare is not None:
        prepare(tmp_path)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("CSVFAST_")}
    variables["DIGEST"] = csvfast.sm3_file(tmp_path / "disk.img").hexdigest()
    variables["SECRET_AREA"] = SECRET_AREA
    variables["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    if page == "docs/virtual-machines.md":
        variables["CSVFAST_VMRAM_LIBRARY"] = str(qemu_guest.preload_library())
    servers: list[Any] = []
    try:
        for line, expected in lines:
            if REAL in line and not (tmp_path / REAL).is_file():
                continue
            if line.endswith("&"):
                stop([one for one in servers if one.args[-1].split()[2:4] == line.split()[1:3]])  # a chip has one processor
                servers.append(serve(line.removesuffix("&"), tmp_path, variables))
                continue
            if (ended := re.match(r"kill %(\d)", line)) is not None:
                stop([servers.pop(int(ended[1]) - 1)])
                continue
            if page == "docs/certificates.md" and line == "csvfast chip new chip":
                shutil.rmtree(tmp_path / "chip")
            shown = run(line, expected, tmp_path, variables)
            remember(line, shown, variables)
    finally:
        stop(servers)


def run(line: str, expected: int, folder: Path, variables: dict[str, str]) -> str:
    assigned = re.fullmatch(r"([A-Z_]+)=\$\((.*)\)", line)
    done = subprocess.run(
        ["bash", "-c", f'csvfast() {{ "{SCRIPT}" "$@"; }}; {assigned[2] if assigned else line}'],
        cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == expected, (line, done.stdout, done.stderr)
    if assigned:
        variables[assigned[1]] = done.stdout.strip()
    return done.stdout


def remember(line: str, shown: str, variables: dict[str, str]) -> None:
    """What a reader would copy from one command's output into a later command."""
    if (pin := re.search(r"Verdictd's door pin ([0-9a-f]{64})", shown)) is not None:
        variables["PIN"] = pin[1]
    root = re.search(r'(?:Root hash: +|"root_hash": ")([0-9a-f]{64})', shown)
    if root is not None and "root.hashes" in line:
        variables["ROOT"] = root[1]
    if "--hold" in line:
        held = json.loads(shown)
        assert held["secret_area"] == SECRET_AREA
        variables["MEASUREMENT"], variables["DIGEST"] = held["measurement"], held["predicted_digest"]


def serve(line: str, folder: Path, variables: dict[str, str]) -> Any:
    server = subprocess.Popen(["bash", "-c", f'exec "{SCRIPT}" {line.removeprefix("csvfast ")}'], cwd=folder, env=variables)
    until = time.monotonic() + 60
    sockets = [folder / name for name in re.findall(r"[\w.-]+\.sock\b", line)]
    sockets += [folder / name / "clientapi.sock" for name in re.findall(r"csvfast broker serve (\w+)", line)]
    port = re.search(r"--port (\d+)", line)
    assert sockets or port, line
    while not (all(path.is_socket() for path in sockets) if port is None else answers(int(port[1]))):
        assert server.poll() is None, line
        assert time.monotonic() < until, line
        time.sleep(0.05)
    return server


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def stop(servers: list[Any]) -> None:
    while servers:
        server = servers.pop()
        if server.poll() is None:
            server.terminate()
        assert server.wait(60) == 0, server.args


def test_the_index_lists_every_page() -> None:
    listed = re.findall(r"^- \[([\w.-]+)\]\(([\w.-]+)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert all(name == target for name, target in listed)
    assert sorted(name for name, _ in listed) == sorted(
        path.name for path in (ROOT / "docs").glob("*.md") if path.name != "index.md"
    )


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]), ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], target


def test_every_command_is_documented() -> None:
    """Each name that --help lists stands on a page."""
    import typer

    from csvfast.cli import app

    text = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    group = typer.main.get_command(app)
    for room, command in group.commands.items():
        for name in getattr(command, "commands", {None: None}):
            wanted = f"csvfast {room} {name}" if name else f"csvfast {room}"
            overview = re.search(rf"csvfast {room} [\w|-]*\b{name}\b|`(?:platform )?{name}`", text) if name else None
            assert wanted in text or overview, wanted
