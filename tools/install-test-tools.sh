#!/bin/sh
# Installs the programs that some tests use besides gcc and Python, on Debian-like systems as root; elsewhere says
# what is missing. Tests whose program is missing skip with a reason. Ends with 0 either way: with CI=true the
# test run itself refuses skips it does not expect.
set -eu

# Debian has sbin outside an ordinary user's PATH.
PATH=$PATH:/usr/sbin:/sbin

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
