#!/bin/sh
# Builds the native core for $PYTHON (default: python3) and puts it beside the package, but only when it imports.
#   tools/build_native.sh [cmake options]         BUILD_DIR chooses the build folder, JOBS the number of compilers
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
build=${BUILD_DIR:-$root/build/native}
mkdir -p "$build"
generator=
command -v ninja >/dev/null 2>&1 && generator=-GNinja
cmake -S "$root" -B "$build" $generator -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v "$python")" "$@" >"$build.log" 2>&1 \
  || { cat "$build.log" >&2; exit 1; }
cmake --build "$build" --parallel "${JOBS:-2}" --target _native
so=$(ls -t "$build"/_native*.so | head -n 1)
(cd "$build" && PYTHONPATH="$build" "$python" -c "
import _native
assert dict(_native.instruction_sets())['generic'] == ''") # a module that does not import never replaces one that does
cp "$so" "$root/src/paceline/.$(basename "$so").new"
mv -f "$root/src/paceline/.$(basename "$so").new" "$root/src/paceline/$(basename "$so")"
echo "src/paceline/$(basename "$so")"
