#!/bin/sh
# Compile src/pvirq/engine/crossing.c to crossing.bin, in the directory given or beside it. gcc, ld and objcopy.
set -e
here=$(cd "$(dirname "$0")/../src/pvirq/engine" && pwd)
to=$(cd "${1:-$here}" && pwd)
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
gcc -O2 -std=gnu11 -Wall -Wextra -Werror -ffreestanding -fPIC -mgeneral-regs-only -fno-stack-protector \
    -fcf-protection=none -fno-asynchronous-unwind-tables -fno-strict-aliasing -fno-jump-tables -fvisibility=hidden \
    -c "$here/crossing.c" -o "$scratch/crossing.o"
ld -T "$here/crossing.ld" "$scratch/crossing.o" -o "$scratch/crossing.elf"
objcopy -O binary "$scratch/crossing.elf" "$scratch/crossing.bin"
cat "$scratch/crossing.bin" > "$to/crossing.bin"
