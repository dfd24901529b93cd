#!/bin/sh
# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer. Arguments: instruction sets (default: all usable ones).
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD_DIR:-$root/build/sanitize}
generator=
command -v ninja >/dev/null 2>&1 && generator=-GNinja
mkdir -p "$build"
cmake -S "$root" -B "$build" $generator -DCMAKE_BUILD_TYPE=Debug -DPACELINE_SANITIZE=ON -DPACELINE_TESTS=ON -DPACELINE_PYTHON=OFF >/dev/null
cmake --build "$build" --parallel "${JOBS:-2}" --target native_tests
ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 "$build/native_tests" "$@"
