"""Image configurations, users and bundles: what strangers may write there, and what runc makes of ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from image.archives import config_of, directory, entry, symlink, tar, write_layout

from csvfast.errors import ImageError
from csvfast.image.assemble import assemble_image
from csvfast.image.bundle import CAPABILITIES, read_in_root, runtime_specification, write_bundle
from csvfast.image.image_config import ImageConfiguration, check_platform
from csvfast.image.layout import OciLayout
from csvfast.image.limits import Limits
from csvfast.image.seccomp import default_profile
from csvfast.image.users import User, lookup_user

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# comment:x:1:1::/:
broken line
ann:x:1000:1001:Ann:/home/ann:/bin/sh
77:x:2000:2000:a name of digits:/seventy:
big:x:4294967295:0::/:
"""
GROUP = b"""root:x:0:
ann:x:1001:
disk:x:6:root,ann
audio:x:29:ann
audio2:x:29:ann
wheel:x:10:bob,annabel
"""


def parse(**changes: Any) -> ImageConfiguration:
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}, "config": {}}
    return ImageConfiguration.parse(json.dumps({**document, **changes}).encode())


def user(text: str, passwd: bytes | None = PASSWD, group: bytes | None = GROUP) -> User:
    return lookup_user(text, lambda path, limit: {"etc/passwd": passwd, "etc/group": group}[path])


# Configurations


def test_a_whole_configuration() -> None:
    found = parse(
        variant="v2",
        created="2020-01-01T00:00:00Z",
        author="a",
        history=[{"empty_layer": True}],
        unknown=[1],
        rootfs={"type": "layers", "diff_ids": ["sha256:" + "a" * 64]},
        config={
            "User": "ann:disk",
            "Env": ["A=1", "B=x=y"],
            "Entrypoint": ["/e"],
            "Cmd": ["c", ""],
            "WorkingDir": "srv",
            "Labels": {"l": "v"},
            "Volumes": {"/data": {}},
            "ExposedPorts": {"80/tcp": {}},
            "StopSignal": "SIGINT",
            "ArgsEscaped": True,
            "OnBuild": None,
        },
    )
    assert found == ImageConfiguration(
        "amd64",
        "linux",
        ("sha256:" + "a" * 64,),
        "v2",
        "ann:disk",
        ("A=1", "B=x=y"),
        ("/e",),
        ("c", ""),
        "/srv",
        ("/data",),
        ("80/tcp",),
        {"l": "v"},
        "SIGINT",
        "2020-01-01T00:00:00Z",
        "a",
    )
    assert found.arguments == ("/e", "c", "")
    assert parse(config=None).arguments == ()
    assert parse(config={"Env": None, "Cmd": None, "Labels": None, "Volumes": None}).environment == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"rootfs": None},
        {"rootfs": {"type": "other"}},
        {"rootfs": {"type": "layers", "diff_ids": ["sha256:abc"]}},
        {"rootfs": {"type": "layers", "diff_ids": ["sha512:" + "a" * 128]}},
        {"rootfs": {"type": "layers", "diff_ids": [1]}},
        {"rootfs": {"type": "layers", "diff_ids": ["sha256:" + "a" * 64] * 600}},
        {"rootfs": []},
        {"config": []},
        {"config": "x"},
        {"config": {"Env": ["A"]}},
        {"config": {"Env": ["=A"]}},
        {"config": {"Env": "A=1"}},
        {"config": {"Env": ["A=\0"]}},
        {"config": {"Cmd": "sh"}},
        {"config": {"Cmd": [1]}},
        {"config": {"Cmd": ["a\0b"]}},
        {"config": {"Cmd": ["x" * 200_000]}},
        {"config": {"Cmd": ["x"] * 5000}},
        {"config": {"User": 0}},
        {"config": {"Labels": {"a": 1}}},
        {"config": {"Volumes": ["/a"]}},
        {"config": {"WorkingDir": {}}},
        {"config": {"User": "\ud800"}},
        {"architecture": 1},
        {"os": ["linux"]},
    ],
)
def test_impossible_configurations(changes: dict[str, Any]) -> None:
    with pytest.raises(ImageError) as caught:
        parse(**changes)
    assert str(caught.value).startswith("image configuration: ")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"a":NaN}', b'{"os":"linux","os":"linux"}', b"{}",
        b'{"history":[' + b"[]," * 100_000 + b"[]]}",  # 4 MiB of them would be 100 MB of Python's
        b'{"history":' + b"9" * 5000 + b"}",
    ],
)
def test_no_configurations(data: bytes) -> None:
    with pytest.raises(ImageError, match="image configuration"):
        ImageConfiguration.parse(data)


def test_a_large_configuration() -> None:
    with pytest.raises(ImageError, match="expected at most 10"):
        ImageConfiguration.parse(config_of([]), Limits(config_bytes=10))


def test_platforms() -> None:
    check_platform(parse(), "amd64")
    for other in (parse(architecture="arm64"), parse(os="windows"), parse(architecture=None)):
        with pytest.raises(ImageError, match="expected linux/amd64"):
            check_platform(other, "amd64")


# Users


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", User(0, 0, (6,), "/root")),
        ("root", User(0, 0, (6,), "/root")),
        ("0", User(0, 0, (6,), "/root")),
        ("ann", User(1000, 1001, (6, 29), "/home/ann")),
        ("1000", User(1000, 1001, (6, 29), "/home/ann")),
        ("ann:disk", User(1000, 6, (), "/home/ann")),
        ("ann:10", User(1000, 10, (), "/home/ann")),
        ("ann:4242", User(1000, 4242, (), "/home/ann")),
        ("4242", User(4242, 0)),
        ("4242:disk", User(4242, 6)),
        ("77", User(2000, 2000, (), "/seventy")),
        ("4294967294", User(4294967294, 0)),
    ],
)
def test_users(text: str, expected: User) -> None:
    assert user(text) == expected


@pytest.mark.parametrize(
    "text", ["bob", "ann:", ":disk", ":", "ann:nogroup", "4294967295", "-1", "big", "\u0661", "ann:x:y"]
)
def test_users_that_are_not_there(text: str) -> None:
    with pytest.raises(ImageError, match="user"):
        user(text)


def test_users_without_files() -> None:
    assert user("", None, None) == User(0, 0)
    assert user("7:8", None, None) == User(7, 8)
    with pytest.raises(ImageError):
        user("ann", None, None)


def test_files_are_read_within_the_root(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(PASSWD)
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    read = read_in_root(root)
    for target in ("../../outside", "/../outside", str(tmp_path / "outside"), "loop", "/etc"):
        (root / "etc/passwd").unlink(missing_ok=True)
        (root / "etc/passwd").symlink_to(target)
        assert lookup_user("5", read) == User(5, 0)
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("passwd")
    with pytest.raises(ImageError, match="symbolic links"):
        lookup_user("5", read)
    (root / "real").write_bytes(PASSWD)
    for target in ("../real", "/real", "../../../real"):
        (root / "etc/passwd").unlink()
        (root / "etc/passwd").symlink_to(target)
        assert lookup_user("ann", read).uid == 1000
    (root / "etc/passwd").unlink()
    os.mkfifo(root / "etc/passwd")
    assert lookup_user("5", read) == User(5, 0)
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").write_bytes(b"x" * (5 << 20))
    with pytest.raises(ImageError, match="more than"):
        lookup_user("5", read)


# Bundles


def test_the_specification() -> None:
    config = parse(
        config={
            "Env": ["PATH=/own", "A=1"],
            "Entrypoint": ["/e"],
            "Cmd": ["c"],
            "WorkingDir": "/srv/",
            "Labels": {"l": "v"},
            "StopSignal": "SIGINT",
            "Volumes": {"/data": {}},
            "ExposedPorts": {"80/tcp": {}},
        }
    )
    made = runtime_specification(
        config, User(1000, 1001, (6, 29), "/home/ann"), environment=["A=2", "B=3"], memory_bytes=1 << 20, pids=5
    )
    process = made["process"]
    assert process["args"] == ["/e", "c"]
    assert process["env"] == ["PATH=/own", "HOME=/home/ann", "A=2", "B=3"]
    assert (process["cwd"], process["noNewPrivileges"], process["terminal"]) == ("/srv", True, False)
    assert process["user"] == {"uid": 1000, "gid": 1001, "additionalGids": [6, 29]}
    assert process["capabilities"] == {"bounding": list(CAPABILITIES), "effective": [], "permitted": []}
    assert made["annotations"]["org.opencontainers.image.stopSignal"] == "SIGINT"
    assert made["annotations"]["l"] == "v"
    assert "/data" in [mount["destination"] for mount in made["mounts"]]
    assert made["linux"]["resources"]["memory"] == {"limit": 1 << 20}
    assert {one["type"] for one in made["linux"]["namespaces"]} == {"pid", "ipc", "uts", "mount", "network"}
    assert "/proc/kcore" in made["linux"]["maskedPaths"]
    assert runtime_specification(config, User(), command=["x"])["process"]["args"] == ["/e", "x"]
    assert runtime_specification(config, User(), entrypoint=["y"])["process"]["args"] == ["y"]
    assert runtime_specification(config, User())["process"]["env"][1] == "HOME=/root"


def test_labels_give_runtimes_no_orders() -> None:
    """crun takes a seccomp filter, plug-ins to load and much more from annotations; the image's must not reach it."""
    orders = {
        "run.oci.seccomp_bpf_data": "BgAAAAAA/38=", "run.oci.seccomp.plugins": "/tmp/x.so", "run.oci.keep_original_groups": "1",
        "run.oci.handler": "krun", "module.wasm.image/variant": "compat", "org.systemd.property.CollectMode": "'x'",
        "org.criu.config": "/etc/x", "io.katacontainers.config.hypervisor.path": "/x", "io.kubernetes.cri.container-type": "x",
        "dev.gvisor.internal.nvproxy": "true",
    }  # fmt: skip
    config = parse(config={"Cmd": ["x"], "Labels": {**orders, "run.ocis": "kept", "org.example": "kept"}})
    made = runtime_specification(config, User())["annotations"]
    assert {name for name in made if not name.startswith("org.opencontainers.image.")} == {"run.ocis", "org.example"}
    assert runtime_specification(config, User(), annotations=orders)["annotations"].items() >= orders.items()


def test_impossible_bundles() -> None:
    run = parse(config={"Cmd": ["x"]})
    for words, config, options in (
        ("no command", parse(), {}),
        ("no command", parse(config={"Cmd": [""]}), {}),
        ("NAME=value", run, {"environment": ["x"]}),
        ("absolute", run, {"working_directory": "x"}),
        ("outside /proc", run, {"working_directory": "//srv/..//proc/./self/fd/8"}),
        ("outside /proc", parse(config={"Cmd": ["x"], "WorkingDir": "proc/self/fd/8"}), {}),
        ("where none can be", parse(config={"Cmd": ["x"], "Volumes": {"/": {}}}), {}),
        ("where none can be", parse(config={"Cmd": ["x"], "Volumes": {"/proc/1": {}}}), {}),
        ("where none can be", parse(config={"Cmd": ["x"], "Volumes": {"/a/../../b": {}}}), {}),
    ):
        with pytest.raises(ImageError, match=words):
            runtime_specification(config, User(), **options)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="only root does"):
        runtime_specification(run, User(5, 5), rootless=True)


def test_the_seccomp_profile_knows_this_machine() -> None:
    profile = default_profile("x86_64")
    assert profile is not None
    allowed = profile["syscalls"][0]["names"]
    assert {"openat", "read", "execve", "futex"} <= set(allowed)
    assert not {
        "mount",
        "bpf",
        "kexec_load",
        "init_module",
        "keyctl",
        "unshare",
        "setns",
        "clone",
        "clone3",
        "io_uring_setup",
    } & set(allowed)
    assert len(set(allowed)) == len(allowed)
    assert default_profile("pdp11") is None


BUSYBOX = shutil.which("busybox")
RUNC = shutil.which("runc")
CRUN = shutil.which("crun")


def container(place: Path, **config: Any) -> Path:
    """A layout of busybox: static on Debian."""
    assert BUSYBOX is not None
    items = [
        directory("bin/"),
        entry("bin/busybox", Path(BUSYBOX).read_bytes(), mode=0o755),
        symlink("bin/sh", "busybox"),
        directory("etc/"),
        entry("etc/passwd", PASSWD),
        entry("etc/group", GROUP),
        directory("data/"),
        entry("data/from-image", b"kept"),
        directory("tmp/", 0o1777),
        *(directory(f"{name}/") for name in ("proc", "sys", "dev")),
    ]
    return write_layout(place / "layout", [tar(*items)], **config)


def is_static(path: str | None) -> bool:
    return path is not None and b"ld-linux" not in Path(path).read_bytes()[:4096]


needs_runc = pytest.mark.skipif(
    RUNC is None or not is_static(BUSYBOX), reason="runc or a static busybox is not installed"
)
SCRIPT = """
id -u; id -G; pwd; echo $A; busybox cat /data/from-image; busybox grep Seccomp: /proc/self/status
busybox mount -t tmpfs x /tmp 2>&1
exit 7
"""


def run_container(
    runtime: str, state: Path, bundle: Path, *prefix: str, **options: Any
) -> subprocess.CompletedProcess[str]:
    command = [*prefix, runtime, "--root", str(state), "run", "--bundle", str(bundle), f"csvfast-test-{os.getpid()}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@needs_runc
@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts containers here")
def test_runc_runs_the_bundle(tmp_path: Path) -> None:
    layout = container(
        tmp_path,
        Entrypoint=["/bin/sh", "-c"],
        Cmd=[SCRIPT],
        Env=["PATH=/bin", "A=from the image"],
        User="ann",
        WorkingDir="/tmp",
        Volumes={"/data": {}},
    )
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    with OciLayout(layout) as source:
        made = assemble_image(source, "one", bundle / "rootfs")
    write_bundle(made.config, made.rootfs, bundle)
    done = run_container(str(RUNC), tmp_path / "state", bundle)
    if "cgroup" in done.stderr and not done.stdout:
        pytest.skip(f"control groups are not permitted here: {done.stderr[-200:]}")
    assert done.returncode == 7, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "1000"
    assert sorted(lines[1].split()) == ["1001", "29", "6"]
    assert lines[2:5] == ["/tmp", "from the image", "keptSeccomp:\t2"]
    assert "ermission denied" in lines[5] or "not permitted" in lines[5]


ROOTLESS = """
import os, sys, time
from pathlib import Path
from csvfast.image.assemble import assemble_image
from csvfast.image.bundle import write_bundle
from csvfast.image.layout import OciLayout
layout, warm, bundle, state = sys.argv[1:5]
def unpack(where):
    Path(where).mkdir()
    made = assemble_image(OciLayout(layout), "one", Path(where, "rootfs"))
    write_bundle(made.config, made.rootfs, Path(where), rootless=True)
unpack(warm)  # as root: everything has been imported then, from wherever it is
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
unpack(bundle)
os.environ["XDG_RUNTIME_DIR"] = state
os.execvp("runc", ["runc", "--root", state, "run", "--bundle", bundle, "csvfast-rootless-test"])
"""


@needs_runc
@pytest.mark.skipif(os.geteuid() != 0, reason="the test becomes an ordinary user")
def test_runc_runs_the_bundle_of_an_ordinary_user(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="csvfast-test-") as name:
        place = Path(name)
        os.chmod(place, 0o755)
        nobody = place / "nobody"
        nobody.mkdir()
        os.chown(nobody, 65534, 65534)
        layout = container(
            place, Cmd=["/bin/sh", "-c", "busybox id -u; busybox cat /data/from-image"], Env=["PATH=/bin"]
        )
        command = [sys.executable, "-c", ROOTLESS, layout, tmp_path / "warm", nobody / "bundle", nobody / "state"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        subprocess.run(["rm", "-rf", str(nobody)], check=True)
    if done.returncode and any(word in done.stderr for word in ("cgroup", "operation not permitted", "unshare")):
        pytest.skip(f"user namespaces are not permitted here: {done.stderr[-200:]}")
    assert done.stdout == "0\nkept", done.stderr


@pytest.mark.skipif(
    CRUN is None or not is_static(BUSYBOX) or os.geteuid() != 0,
    reason="crun or a static busybox is not installed, or not root",
)
def test_crun_runs_the_bundle(tmp_path: Path) -> None:
    layout = container(tmp_path, Cmd=["/bin/sh", "-c", "busybox cat /data/from-image"], Env=["PATH=/bin"])
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    with OciLayout(layout) as source:
        made = assemble_image(source, "one", bundle / "rootfs")
    write_bundle(made.config, made.rootfs, bundle)
    # crun refuses version 1 and 2 of control groups side by side: its own mount namespace has one of them.
    script = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
    done = run_container(str(CRUN), tmp_path / "state", bundle, "unshare", "-m", "sh", "-c", script, "sh")
    if done.returncode and "cgroup" in done.stderr:
        pytest.skip(f"control groups are not permitted here: {done.stderr[-200:]}")
    assert done.stdout == "kept", done.stderr
