#!/bin/bash
# Builds the small Linux guest of the demo and the tests: Debian's cloud kernel and a busybox initramfs with mkfs.ext4,
# cryptsetup and dm-crypt's modules. guest.sh OUT makes OUT/vmlinuz and OUT/initrd.gz, once.
set -euo pipefail
out=$1
[ -s "$out/vmlinuz" ] && [ -s "$out/initrd.gz" ] && [ "$out/initrd.gz" -nt "$0" ] && exit 0
mkdir -p "$out/kernel"
work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT

if ! ls "$out"/kernel/boot/vmlinuz-* >/dev/null 2>&1; then
  package=$(apt-cache depends --important linux-image-cloud-amd64 | awk '/Depends: linux-image-/ { print $2; exit }')
  echo "guest: fetching $package" >&2
  (cd "$work" && chmod 0777 . && apt-get -qq -o "Dir::Cache::archives=$work" download "$package")
  dpkg -x "$work"/*.deb "$out/kernel"
fi
version=$(ls "$out/kernel/lib/modules")
modules=$out/kernel/lib/modules/$version
[ -e "$modules/modules.dep" ] || depmod -b "$out/kernel" "$version"

root=$work/root
mkdir -p "$root"/{bin,dev,etc,lib,lib64,mnt,proc,run,sys,tmp,modules}
cp /bin/busybox "$root/bin/busybox"
for applet in $(/bin/busybox --list); do [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"; done

# A program and the libraries it names, at their own paths.
program() {
  local path=$1 library
  rm -f "$root/bin/$(basename "$path")"
  cp "$path" "$root/bin/"
  for library in $(ldd "$path" | grep -oE '/[^ ]+'); do
    mkdir -p "$root$(dirname "$library")"
    cp -Ln "$library" "$root$library" 2>/dev/null || true
  done
}
for name in mke2fs cryptsetup dmsetup blkdiscard; do program "$(PATH=/usr/sbin:/sbin:/usr/bin:/bin command -v $name)"; done
ln -sf mke2fs "$root/bin/mkfs.ext4"
cp /etc/mke2fs.conf "$root/etc/" 2>/dev/null || true
: > "$root/etc/fstab"
# cryptsetup's libcrypto loads this on request.
for legacy in /usr/lib/x86_64-linux-gnu/ossl-modules/legacy.so; do
  [ -e "$legacy" ] && mkdir -p "$root$(dirname "$legacy")" && cp "$legacy" "$root$legacy"
done
# Libraries that are loaded by name and not in ldd's list.
for library in /lib/x86_64-linux-gnu/libgcc_s.so.1; do
  [ -e "$library" ] && mkdir -p "$root$(dirname "$library")" && cp -Ln "$library" "$root$library"
done

for module in virtio_pci virtio_blk virtio_console virtio-rng dm-mod dm-crypt xts ecb essiv algif_skcipher; do
  modprobe -d "$out/kernel" -S "$version" --show-depends "$module" 2>/dev/null | awk '/^insmod/ { print $2 }'
done | while read -r path; do
  file=$(basename "$path"); file=${file%.xz}
  [ -e "$root/modules/$file" ] && continue
  case $path in *.xz) xz -dc "$path" > "$root/modules/$file" ;; *) cp "$path" "$root/modules/$file" ;; esac
  echo "$file" >> "$root/modules/order"
done

cat > "$root/init" <<'INIT'
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /run
while read -r m; do insmod "/modules/$m" 2>/dev/null; done < /modules/order
stty -F /dev/ttyS0 -echo 2>/dev/null
echo GUEST-READY > /dev/ttyS0
# A shell that meets an end of file must not end init: the kernel would panic.
while :; do sh < /dev/ttyS0 > /dev/ttyS0 2>&1; done
INIT
chmod +x "$root/init"
(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) > "$work/initrd.gz"
cp "$out"/kernel/boot/vmlinuz-* "$out/vmlinuz"
mv "$work/initrd.gz" "$out/initrd.gz"
