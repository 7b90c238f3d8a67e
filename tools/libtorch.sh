#!/bin/sh
# Gets libtorch 2.11.0 into .libtorch at the repository's root, where .cargo/config.toml looks for it. Does nothing when
# it is there already.
#
#   tools/libtorch.sh              the CPU variant without an NVIDIA driver (1.2 GB), the CUDA one with it (4 GB more)
#   LIBTORCH=DIR                   your own libtorch 2.11.0 is used; nothing is installed
#   LIBTORCH_USE_PYTORCH=1         the torch package of your python is used (see tch's README); nothing is installed
#   LIBTORCH_VARIANT=cpu|cuda      instead of looking for a driver
#   PYTHON=python3.12              whose pip fetches it
#
# Cargo's feature `download-libtorch` makes tch fetch libtorch by itself instead. It is for programs that depend on this
# crate: in this repository .cargo/config.toml sets LIBTORCH, which comes first.
set -eu

version=2.11.0
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
target=$root/.libtorch
part=$root/.libtorch.part
old=$root/.libtorch.old.part
temporary=$root/.libtorch.tmp.part
python=${PYTHON:-python3}

say() { printf 'libtorch: %s\n' "$*" >&2; }
fail() {
    printf 'error: libtorch: %s\n' "$*" >&2
    exit 1
}

# A libtorch of the user's own.
if [ -n "${LIBTORCH_USE_PYTORCH+set}" ]; then
    say "LIBTORCH_USE_PYTORCH is set; nothing to install"
    exit 0
elif [ -n "${LIBTORCH+set}" ] && [ "$LIBTORCH" != "$target/torch" ]; then
    [ -n "$LIBTORCH" ] || fail "LIBTORCH is set, but empty; unset it to use .libtorch"
    [ -d "${LIBTORCH_LIB:-$LIBTORCH}/lib" ] || fail "LIBTORCH is $LIBTORCH, which has no lib folder; correct or unset it"
    say "using yours, LIBTORCH=$LIBTORCH"
    exit 0
fi

has_driver() {
    nvidia-smi -L >/dev/null 2>&1 || [ -e /proc/driver/nvidia/version ] || [ -e /usr/lib/wsl/lib/libcuda.so.1 ] ||
        { PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1'; }
}

# `cpu` and `cuda` are the same build, without and with the NVIDIA libraries that it loads; `plain` is other systems' only one.
if [ "$(uname -s)" != Linux ]; then
    variant=plain
elif [ -n "${LIBTORCH_VARIANT:-}" ]; then
    variant=$LIBTORCH_VARIANT
elif has_driver; then
    variant=cuda
else
    variant=cpu
fi
case $variant in
cpu | cuda | plain) ;;
*) fail "LIBTORCH_VARIANT is $variant; use cpu or cuda" ;;
esac

# Whether a folder holds as much of this version as a variant needs: what runs on a GPU also runs on the CPU.
is_complete() {
    [ -d "$1/torch/lib" ] || return 1
    if [ -f "$1/variant" ]; then
        # Installs of before had no headers for the feature cuda-graphs.
        [ "$2" = plain ] || [ -f "$1/nvidia/cu13/include/crt/host_defines.h" ] || return 1
        case "$(cat "$1/variant")" in
        "$version $2") return 0 ;;
        "$version cuda") [ "$2" = cpu ] ;;
        *) return 1 ;;
        esac
    else # installed by hand
        grep -Eqs "^__version__ = '$version(\+.*)?'" "$1/torch/version.py" || return 1
        case $2 in
        plain) [ -e "$1/torch/lib/libtorch_cpu.dylib" ] || [ -e "$1/torch/lib/torch_cpu.dll" ] ;;
        cpu) [ -e "$1/torch/lib/libtorch_cpu.so" ] && has_libraries "$1" cudart cupti ;;
        cuda) [ -e "$1/torch/lib/libtorch_cuda.so" ] && has_libraries "$1" cudart cupti cublas cudnn ;;
        esac
    fi
}

has_libraries() {
    folder=$1
    shift
    for name; do
        # Named libcudart.so.13 and so on, in a folder for each library or for all of them.
        [ -n "$(find "$folder/nvidia" -name "lib$name.so*" -print 2>/dev/null | head -n 1)" ] || return 1
    done
}

# One set-up at a time; another waits, and finds the work done.
if command -v flock >/dev/null 2>&1; then
    exec 9<"$0"
    flock 9
fi

if is_complete "$target" "$variant"; then
    if [ ! -f "$target/variant" ]; then
        if is_complete "$target" cuda; then variant=cuda; fi
        printf '%s %s\n' "$version" "$variant" >"$target/variant"
    fi
    say "$version ($(cut -d ' ' -f 2 "$target/variant")) is in place"
    exit 0
fi

command -v "$python" >/dev/null 2>&1 || fail "$python is missing; install python3 with pip, or set LIBTORCH to a libtorch $version"
"$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip; install python3-pip, or set LIBTORCH to a libtorch $version"

# Moved into place when it is whole, so that an interrupted set-up leaves nothing that looks finished.
rm -rf "$part" "$old" "$temporary"
trap 'rm -rf "$part" "$old" "$temporary"' EXIT
trap 'exit 130' HUP INT TERM

headers=nvidia-cuda-crt==13.0.88 # a small package of headers, which only the feature cuda-graphs wants
set -- "torch==$version"
case $variant in
cpu) set -- --no-deps "$@" nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85 $headers ;; # libtorch_cpu wants the first two
cuda) set -- "$@" $headers ;;
plain) set -- --no-deps "$@" ;;
esac
# No python ever runs what is installed, so an older or a newer one can fetch it as well.
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' ||
    set -- --python-version 3.12 --only-binary=:all: --ignore-requires-python "$@"

say "installing $version ($variant) into .libtorch"
[ -t 2 ] || set -- --quiet "$@"
mkdir "$temporary" # pip unpacks 1 to 5 GB here, which can be more than the system's folder holds
TMPDIR=$temporary PIP_USER=0 PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --target "$part" --no-compile "$@" >&2 ||
    fail "pip could not install torch $version (its message is above); a libtorch $version of your own works as well: set LIBTORCH"
printf '%s %s\n' "$version" "$variant" >"$part/variant"

if [ -e "$target" ]; then mv "$target" "$old"; fi
mv "$part" "$target"
say "$version ($variant) is in place"
