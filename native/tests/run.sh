#!/bin/sh
# Builds the programs of this folder with CMake, in build/ of the checkout, and runs them. Usage: run.sh [sanitize | neon]
#   (nothing)  check_amx: the AMX kernels against the AVX-512 ones, emulated where the processor has no AMX; 77 without AVX-512
#   sanitize   hash_products with every kernel of this machine under AddressSanitizer and UndefinedBehaviorSanitizer
#   neon       hash_products for Arm under qemu-user, compared with this machine's bits; from Debian:
#              g++-aarch64-linux-gnu, qemu-user
set -eu
cd "$(dirname "$0")/../.."

# build DIRECTORY CMAKE_OPTIONS...
build() {
    directory=$1
    shift
    cmake -S . -B "$directory" -G Ninja -DMNEMOS_TESTS=ON -DMNEMOS_KERNELS= "$@" >/dev/null
    cmake --build "$directory"
}
kernels() {
    build/tests/native/hash_products 2>&1 | sed -n 's/.*can run://p' || true
}

case ${1-} in
"")
    build build/tests
    build/tests/native/check_amx
    ;;
sanitize)
    build build/tests
    build build/tests-sanitize -DMNEMOS_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug
    for name in $(kernels); do
        products=$(build/tests-sanitize/native/hash_products "$name" | wc -l)
        echo "$name: $products products, nothing outside the buffers"
    done
    ;;
neon)
    build build/tests
    build build/tests-neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
        -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
    here=$(kernels | tr ' ' '\n' | grep -v -e scalar -e bf16 -e amx | tail -n 1)
    build/tests/native/hash_products "$here" > build/tests/products.txt
    arm="qemu-aarch64 -cpu max build/tests-neon/native/hash_products"
    for name in neon neon_i8mm; do
        $arm $name | diff build/tests/products.txt -
        echo "$name: the same bits as $here"
    done
    $arm neon_i8mm neon
    ;;
*)
    sed -n '2,6s/^# //p' "$0"
    exit 2
    ;;
esac
