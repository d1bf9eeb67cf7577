#!/bin/sh
# Installs the programs that some tests use besides gcc and Python, on Debian-like systems as root; elsewhere says
# what is missing. Tests whose program is missing skip with a reason. Ends with 0 either way: with CI=true the
# test run itself refuses skips it does not expect. Also fetches, as any user: real boot files for the launch test (Debian's OVMF
# and the kernel and initrd of its installer, 140 MB; its kernel for clouds with some modules, and busybox, 28 MB) into $CSVFAST_BOOT_FILES or ~/.cache/csvfast/boot; and, where the system's
# skopeo is too old for key providers or there is none, Debian 13's with its libraries (42 MB) into $CSVFAST_SKOPEO or
# ~/.cache/csvfast/skopeo, from the mirror that apt is set to, its signatures checked with the keyring that Debian ships.
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

fetch_guest_files() { # what `csvfast vm` boots: Debian's kernel for clouds, the modules that its guests load, a static busybox
    [ -f "$boot/vmlinuz" ] && [ -f "$boot/busybox" ] && [ -f "$boot/modules/virtio_net.ko" ] && return 0
    if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
        echo "test tools: no Debian packages here, the virtual machines' tests will be skipped" >&2
        return 0
    fi
    kernel_of() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1; }
    kernel=$(kernel_of || true)
    if [ -z "$kernel" ] && [ "$(id -u)" = 0 ]; then
        apt-get update -qq || true
        kernel=$(kernel_of || true)
    fi
    work=$(mktemp -d)
    chmod 777 "$work" # root's apt-get downloads as another user
    if [ -n "$kernel" ] && (cd "$work" && apt-get download -qq busybox-static "$kernel" >/dev/null) &&
        (cd "$work" && for package in *.deb; do dpkg-deb -x "$package" tree || exit 1; done) &&
        mkdir -p "$work/modules" && find "$work/tree" \( -path '*/drivers/virtio/*.ko*' -o -path '*/fs/fuse/*.ko*' \
        -o -name 'virtio_console.ko*' -o -name 'virtio-rng.ko*' -o -name 'virtio_blk.ko*' -o -name 'overlay.ko*' \
        -o -name 'virtio_net.ko*' -o -name 'net_failover.ko*' -o -name 'failover.ko*' \) \
        -exec cp {} "$work/modules/" \; && { xz -dq "$work"/modules/*.ko.xz 2>/dev/null || true; }; then # Debian 13 packs them
        mkdir -p "$boot"
        for file in "$work"/tree/boot/vmlinuz-* "$work"/tree/bin/busybox "$work"/tree/usr/bin/busybox; do
            [ -f "$file" ] || continue
            name=${file##*/}
            cp "$file" "$boot/.part" && mv "$boot/.part" "$boot/${name%%-*}"
        done
        chmod 755 "$work/modules" && rm -rf "$boot/modules" "$boot/modules.part" && cp -R "$work/modules" "$boot/modules.part" && mv "$boot/modules.part" "$boot/modules"
        echo "test tools: guest files in $boot"
    else
        echo "test tools: the guests' kernel and busybox could not be downloaded" >&2
    fi
    rm -rf "$work"
}
fetch_guest_files

skopeo=${CSVFAST_SKOPEO:-${XDG_CACHE_HOME:-$HOME/.cache}/csvfast/skopeo}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
skopeo_is_new() { # command...: prints "skopeo version 1.18.0"
    "$@" --version 2>/dev/null | awk '$1 == "skopeo" { split($3, v, "."); good = v[1] > 1 || (v[1] == 1 && v[2] >= 18) } END { exit !good }'
}
run_extracted() { # tree argument...: Debian 13's programs need Debian 13's C library, and with it its loader
    tree=$1
    shift
    for loader in "$tree"/usr/lib/*/ld-linux-*.so.*; do
        [ -x "$loader" ] && "$loader" --library-path "${loader%/*}" "$tree/usr/bin/skopeo" "$@" && return 0
    done
    return 1
}
fetch_skopeo() {
    skopeo_is_new skopeo && return 0
    skopeo_is_new run_extracted "$skopeo" && return 0
    if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
        echo "test tools: no Debian packages here, and no skopeo 1.18: image encryption with skopeo will be skipped" >&2
        return 0
    fi
    if [ ! -f "$keyring" ]; then
        echo "test tools: $keyring is missing (package debian-archive-keyring): skopeo was not fetched without it" >&2
        return 0
    fi
    # The mirror is whatever apt is set to; only the suite is another.
    suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        awk -v suite="$suite" '($1 == suite || $1 == "stable" || $1 == "testing") && $2 == "main" { print $3; exit }' || true)
    if [ -z "$mirror" ]; then
        echo "test tools: apt knows no Debian mirror: skopeo was not fetched" >&2
        return 0
    fi
    work=$(mktemp -d) || return 1
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/empty" "$work/packages" "$work/tree"
    chmod 755 "$work" && chmod 777 "$work/packages" # root's apt-get downloads as another user
    echo "deb [signed-by=$keyring target=Packages] $mirror trixie main" >"$work/sources.list"
    # A configuration of its own: the system's sources, lists and installed packages are neither used nor changed.
    of_trixie() {
        apt-get -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts="$work/empty" \
            -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts="$work/empty" -o Dir::State::Lists="$work/lists" \
            -o Dir::State::Status=/dev/null -o Dir::Cache="$work/cache" -o APT::Get::AllowUnauthenticated=false \
            -o Acquire::AllowInsecureRepositories=false -o Acquire::AllowWeakRepositories=false \
            -o APT::Update::Error-Mode=any -o APT::Default-Release= "$@"
    }
    if of_trixie update >"$work/log" 2>&1 && (
        cd "$work/packages" &&
            of_trixie download skopeo libc6 libgpgme11t64 libassuan9 libgpg-error0 libsqlite3-0 >>"$work/log" 2>&1 &&
            for package in *.deb; do dpkg-deb -x "$package" "$work/tree" || exit 1; done
    ) && skopeo_is_new run_extracted "$work/tree" && rm -rf "$work/tree/usr/share" &&
        mkdir -p "${skopeo%/*}" && part=$(mktemp -d "$skopeo.part.XXXXXX") && chmod 755 "$part" &&
        cp -a "$work/tree/usr" "$part/usr" && rm -rf "$skopeo" && mv "$part" "$skopeo"; then # it appears whole, by one rename
        echo "test tools: skopeo in $skopeo"
    else
        echo "test tools: Debian 13's skopeo could not be fetched, or its signatures not checked (then: newer debian-archive-keyring?):" >&2
        tail -n 5 "$work/log" >&2
    fi
    rm -rf "$work"
}
fetch_skopeo || echo "test tools: skopeo could not be fetched" >&2

missing=
need() { # program package...
    command -v "$1" >/dev/null 2>&1 || { shift; missing="$missing $*"; }
}
need clang clang
need llvm-symbolizer llvm
need valgrind valgrind
need veritysetup cryptsetup-bin
need openssl openssl
need gpg gnupg
need pkg-config pkg-config
need g++ g++
need objdump binutils
need musl-gcc musl-tools
# Debian keeps PostgreSQL's server programs outside PATH.
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || need initdb postgresql
need softhsm2-util softhsm2
need qemu-system-x86_64 qemu-system-x86
need docker-registry docker-registry
need umoci umoci
need runc runc
need crun crun
need bwrap bubblewrap
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
    # The tests start servers of their own; Debian's package would set up one for the whole system.
    no_cluster=/etc/postgresql-common/createcluster.d/csvfast-tests.conf
    case $missing in
    *postgresql*)
        mkdir -p "${no_cluster%/*}"
        echo 'create_main_cluster = false' >"$no_cluster"
        ;;
    esac
    for package in $missing; do
        if [ "$package" = libclang-rt-dev ] && [ -n "$version" ] && apt-cache show "libclang-rt-$version-dev" >/dev/null 2>&1; then
            package=libclang-rt-$version-dev
        fi
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
            echo "test tools: $package could not be installed" >&2
    done
    rm -f "$no_cluster"
    exit 0
fi
echo "test tools: missing$missing; the tests that use them will be skipped" >&2
