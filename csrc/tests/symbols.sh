#!/bin/sh
# The shared library exports exactly the functions that csvfast.h and csvfast_vmram.h declare with CSVF_API, and embed.c compiles as C++ too.
# Environment: BUILD, CC, CXX, SANITIZE (set by the Makefile). Prints 'N passed, N failed'.
set -eu
cd "$(dirname "$0")/.."
build=${BUILD:-build}
passed=0
failed=0

result() {  # result STATUS WHAT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "symbols: failed: $2"; fi
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A declaration may run over several lines: join them, keep the name in front of the first parenthesis.
headers=include/csvfast.h
[ "$(uname -s)" != Linux ] || headers="$headers include/csvfast_vmram.h"
cat $headers | tr '\n' ' ' | sed -e 's|/\*[^*]*\*\{1,\}\([^/*][^*]*\*\{1,\}\)*/| |g' -e 's/CSVF_API/\n&/g' |
    sed -n 's/^CSVF_API *\(CSVF_MUST_CHECK *\)\{0,1\}[^(;]*[ *]\(csvf_[a-z0-9_]*\) *(.*/\2/p' | sort -u > "$work/declared"
nm -D --defined-only "$build/libcsvfast.so" | awk '{print $3}' | grep -v '^__asan\|^__odr_asan\|^__sanitizer\|^__ubsan\|^__tsan\|^__st[a-z]*___sancov' |
    sort -u > "$work/exported"
status=0
diff "$work/declared" "$work/exported" > "$work/difference" || status=1
result $status "exported symbols are not those of the headers (< declared, > exported)"
[ $status -eq 0 ] || cat "$work/difference"
count=$(wc -l < "$work/declared")
status=0
[ "$count" -ge 60 ] || status=1
result $status "only $count declarations found: the header is not read rightly"

# In the archive every global is csvf_ (public) or csvf__ (internal): it can be linked into anything.
status=0
if nm -g --defined-only "$build/libcsvfast.a" 2>/dev/null | awk 'NF == 3 {print $3}' |
    grep -v '^csvf_\|^__odr_asan\|^\.\|^__x86\.\|^DW\.ref' > "$work/foreign"; then status=1; fi
result $status "the archive defines names without the csvf_ prefix:"
[ $status -eq 0 ] || cat "$work/foreign"

status=0
readelf -d "$build/libcsvfast.so" | grep -q 'SONAME.*libcsvfast\.so\.0\]' || status=1
result $status "the soname is not libcsvfast.so.0"

if [ -f "$build/libcsvfast-vmram-preload.so" ]; then
    status=0
    taken=$(nm -D --defined-only "$build/libcsvfast-vmram-preload.so" | awk '{print $3}' |
        grep -v '^__asan\|^__odr_asan\|^__sanitizer\|^__ubsan\|^__tsan\|^__st[a-z]*___sancov' | sort | tr '\n' ' ')
    [ "$taken" = 'madvise mmap mmap64 munmap ' ] || status=1
    result $status "the preload library takes over other calls than it says: $taken"
fi

# An executable stack would come from an assembler file without a .note.GNU-stack section.
status=0
if readelf -lW "$build/libcsvfast.so" | grep GNU_STACK | grep -q 'RWE'; then status=1; fi
result $status "the library asks for an executable stack"

if [ -z "${SANITIZE:-}" ] && command -v "${CXX:-c++}" > /dev/null; then
    status=0
    "${CXX:-c++}" -x c++ -std=c++11 -Wall -Wextra -Wpedantic -Iinclude -o "$work/embed" tests/embed.c -L"$build" -lcsvfast \
        -Wl,-rpath,"$(cd "$build" && pwd)" && "$work/embed" > /dev/null || status=1
    result $status "the public header in a C++ program"
fi

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
