#!/bin/sh
# Checks of the matrix products, and of attention with AMX, outside Python. Usage: run.sh sanitize | amx | neon
#   sanitize   every kernel of this machine under AddressSanitizer and UndefinedBehaviorSanitizer; a quarter of an hour
#   amx        the AMX kernels and the AVX-512 ones, emulated where the processor has no AMX; 77 without AVX-512
#   neon       builds for Arm, runs under qemu-user and compares with this machine's bits; from Debian:
#              g++-aarch64-linux-gnu, qemu-user
set -eu
native=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$native"
flags="-std=c++17 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi -I."
avx2="-mavx2 -mfma -mf16c -mbmi2"
avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"

# build COMPILER TARGET FLAGS...: the library and a checking program, hash_products unless $program and $files say otherwise
program=hash_products
files="linear/*.cpp system/cpu.cpp"
build() {
    compiler=$1 target=$2
    shift 2
    mkdir "$work/$target"
    for file in $files "tests/$program.cpp"; do
        name=$(basename "$file" .cpp) isa=
        case $target:$name in
            arm:*_neondot) isa="-march=armv8.2-a+dotprod" ;;
            arm:*_neoni8mm) isa="-march=armv8.2-a+dotprod+i8mm" ;;
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
    "$compiler" "$@" "$work/$target"/*.o -o "$work/$target/$program"
}

kernels() {
    "$1" 2>&1 | sed -n 's/.*can run://p' || true
}

case ${1-} in
sanitize)
    # A check at each dereference keeps the compiler busy for many minutes with the unrolled products; AddressSanitizer
    # watches the same accesses.
    build "${CXX:-g++}" x86 -O1 -g1 -w -fsanitize=address,undefined -fno-sanitize-recover=all \
        -fno-sanitize=alignment,null,object-size,pointer-overflow,signed-integer-overflow,vptr
    for name in $(kernels "$work/x86/hash_products"); do
        "$work/x86/hash_products" "$name" > "$work/$name.txt"
        echo "$name: $(wc -l < "$work/$name.txt") products, nothing outside the buffers"
    done
    ;;
amx)
    program=check_amx files="system/cpu.cpp cache.cpp system/mapping.cpp vector/vector_amx.cpp vector/vector_avx512bf16.cpp linear/compare.cpp linear/linear.cpp linear/pack.cpp linear/linear_a*512*.cpp linear/linear_amx.cpp"
    build "${CXX:-g++}" x86 -O1 -w
    "$work/x86/check_amx"
    ;;
neon)
    build "${CXX:-g++}" x86 -O2 -w
    build aarch64-linux-gnu-g++ arm -O2 -static
    "$work/x86/hash_products" "$(kernels "$work/x86/hash_products" | tr ' ' '\n' | grep -v -e scalar -e bf16 -e amx | tail -n 1)" > "$work/x86.txt"
    for name in neon neon_i8mm; do
        qemu-aarch64 -cpu max "$work/arm/hash_products" $name > "$work/$name.txt"
        diff "$work/x86.txt" "$work/$name.txt"
        echo "$name: $(wc -l < "$work/$name.txt") products, the same bits"
    done
    qemu-aarch64 -cpu max "$work/arm/hash_products" neon_i8mm neon
    ;;
*)
    sed -n '2,6s/^# //p' "$0"
    exit 2
    ;;
esac
