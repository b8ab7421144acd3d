#!/bin/sh
# Checks of the matrix products outside Python. Usage: run.sh sanitize | neon
#   sanitize   every kernel of this machine under AddressSanitizer and UndefinedBehaviorSanitizer
#   neon       builds for Arm, runs under qemu-user and compares with this machine's bits; from Debian:
#              g++-aarch64-linux-gnu, qemu-user
set -eu
native=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags="-std=c++17 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi -I$native"
avx2="-mavx2 -mfma -mf16c -mbmi2"
avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"

# build COMPILER TARGET FLAGS...: the library and the checking program
build() {
    compiler=$1 target=$2
    shift 2
    mkdir "$work/$target"
    for file in "$native"/linear/*.cpp "$native/cpu.cpp" "$native/linear/tests/hash_products.cpp"; do
        name=$(basename "$file" .cpp) isa=
        case $target:$name in
            arm:*_neondot) isa="-march=armv8.2-a+dotprod" ;;
            *:*_neon*) continue ;;
            arm:*_avx* | arm:*_amx) continue ;;
            *:*_avx2) isa=$avx2 ;;
            *:*_avxvnni) isa="$avx2 -mavxvnni" ;;
            *:*_avx512) isa=$avx512 ;;
            *:*_avx512bf16) isa="$avx512 -mavx512bf16" ;;
            *:*_amx) isa="$avx512 -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16" ;;
        esac
        "$compiler" $flags "$@" $isa -c "$file" -o "$work/$target/$name.o"
    done
    "$compiler" "$@" "$work/$target"/*.o -o "$work/$target/hash_products"
}

kernels() {
    "$1" 2>&1 | sed -n 's/.*can run://p' || true
}

case ${1-} in
sanitize)
    build "${CXX:-g++}" x86 -O1 -g -w -fsanitize=address,undefined -fno-sanitize-recover=all
    for name in $(kernels "$work/x86/hash_products"); do
        "$work/x86/hash_products" "$name" > "$work/$name.txt"
        echo "$name: $(wc -l < "$work/$name.txt") products, nothing outside the buffers"
    done
    ;;
neon)
    build "${CXX:-g++}" x86 -O2 -w
    build aarch64-linux-gnu-g++ arm -O2 -static
    "$work/x86/hash_products" "$(kernels "$work/x86/hash_products" | tr ' ' '\n' | grep -v -e scalar -e bf16 -e amx | tail -n 1)" > "$work/x86.txt"
    qemu-aarch64 -cpu max "$work/arm/hash_products" neon > "$work/neon.txt"
    diff "$work/x86.txt" "$work/neon.txt"
    echo "neon: $(wc -l < "$work/neon.txt") products, the same bits"
    ;;
*)
    sed -n '2,5s/^# //p' "$0"
    exit 2
    ;;
esac
