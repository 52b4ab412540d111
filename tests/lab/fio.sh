#!/bin/bash
# Packs the installed fio, with every library it names, as an archive that goes behind the initramfs of guest.sh: the
# kernel unpacks both. fio.sh OUT makes OUT/fio.cpio, once for each version of fio.
set -euo pipefail
out=$1
fio=$(command -v fio) || { echo "fio: not installed; tests/lab/setup.sh does that" >&2; exit 1; }
made=$out/fio.cpio
[ -s "$made" ] && [ "$made" -nt "$0" ] && [ "$made" -nt "$(readlink -f "$fio")" ] && exit 0
mkdir -p "$out"
work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT

mkdir -p "$work/root/bin"
cp -L "$fio" "$work/root/bin/fio"
for library in $(ldd "$fio" | grep -oE '/[^ ]+'); do
  mkdir -p "$work/root$(dirname "$library")"
  [ -e "$work/root$library" ] || cp -L "$library" "$work/root$library"
done
# Not packed: it need not be small, and an emulated processor unpacks slowly.
(cd "$work/root" && find . | cpio -o -H newc --quiet) > "$work/fio.cpio"
mv "$work/fio.cpio" "$made"
