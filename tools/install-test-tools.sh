#!/bin/sh
# Installs the programs that some tests use besides gcc and Python, on Debian-like systems as root; elsewhere says
# what is missing. Tests whose program is missing skip with a reason. Ends with 0 either way: with CI=true the
# test run itself refuses skips it does not expect. Also fetches, as any user, real boot files for the launch test: Debian's OVMF
# and the kernel and initrd of its installer, 140 MB, into $CSVFAST_BOOT_FILES or ~/.cache/csvfast/boot.
set -eu

# Debian has sbin outside an ordinary user's PATH.
PATH=$PATH:/usr/sbin:/sbin

boot=${CSVFAST_BOOT_FILES:-${XDG_CACHE_HOME:-$HOME/.cache}/csvfast/boot}
fetch_boot_files() {
    [ -f "$boot/OVMF.fd" ] && [ -f "$boot/linux" ] && [ -f "$boot/initrd.gz" ] && return 0
    if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
        echo "test tools: no Debian packages here, the launch of real boot files will be skipped" >&2
        return 0
    fi
    newest() { apt-cache pkgnames debian-installer- | grep -E '^debian-installer-[0-9]+-netboot-amd64$' | sort | tail -n 1; }
    installer=$(newest || true)
    if [ -z "$installer" ] && [ "$(id -u)" = 0 ]; then
        apt-get update -qq || true
        installer=$(newest || true)
    fi
    work=$(mktemp -d)
    chmod 777 "$work" # root's apt-get downloads as another user
    if [ -n "$installer" ] && (cd "$work" && apt-get download -qq ovmf "$installer" >/dev/null); then
        for package in "$work"/*.deb; do
            dpkg-deb -x "$package" "$work/tree"
        done
        mkdir -p "$boot"
        for file in "$work"/tree/usr/share/ovmf/OVMF.fd \
            "$work"/tree/usr/lib/debian-installer/images/*/amd64/text/debian-installer/amd64/linux \
            "$work"/tree/usr/lib/debian-installer/images/*/amd64/text/debian-installer/amd64/initrd.gz; do
            cp "$file" "$boot/.part" && mv "$boot/.part" "$boot/${file##*/}"
        done
        echo "test tools: boot files in $boot"
    else
        echo "test tools: the boot files could not be downloaded" >&2
    fi
    rm -rf "$work"
}
fetch_boot_files

missing=
need() { # program package...
    command -v "$1" >/dev/null 2>&1 || { shift; missing="$missing $*"; }
}
need clang clang
need llvm-symbolizer llvm
need valgrind valgrind
need veritysetup cryptsetup-bin
need openssl openssl
need pkg-config pkg-config
need objdump binutils
ldconfig -p 2>/dev/null | grep -q 'libgcrypt\.so\.20' || missing="$missing libgcrypt20"
# The sanitizers and libFuzzer need clang's runtime, a package of its own.
if command -v clang >/dev/null 2>&1; then
    runtime=$(clang -print-runtime-dir 2>/dev/null || true)
    found=$(ls "$runtime"/*libclang_rt.fuzzer*.a "$(clang -print-resource-dir)"/lib/linux/libclang_rt.fuzzer*.a 2>/dev/null | head -n 1 || true)
    [ -n "$found" ] || missing="$missing libclang-rt-dev"
else
    missing="$missing libclang-rt-dev"
fi

if [ -z "$missing" ]; then
    echo "test tools: all there"
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "test tools: installing$missing"
    # Older releases name the runtime by clang's version only.
    version=$(apt-cache depends clang 2>/dev/null | sed -n 's/.*Depends: clang-\([0-9][0-9]*\).*/\1/p' | head -n 1 || true)
    apt-get update -qq || true
    if [ -z "$version" ]; then
        version=$(apt-cache depends clang 2>/dev/null | sed -n 's/.*Depends: clang-\([0-9][0-9]*\).*/\1/p' | head -n 1 || true)
    fi
    for package in $missing; do
        if [ "$package" = libclang-rt-dev ] && [ -n "$version" ] && apt-cache show "libclang-rt-$version-dev" >/dev/null 2>&1; then
            package=libclang-rt-$version-dev
        fi
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
            echo "test tools: $package could not be installed" >&2
    done
    exit 0
fi
echo "test tools: missing$missing; the tests that use them will be skipped" >&2
