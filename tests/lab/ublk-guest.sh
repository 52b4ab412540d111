#!/bin/bash
# Builds the Linux guest in which block devices of the host are tried: Debian's 6.12 cloud kernel, which has ublk_drv, and
# an initramfs with busybox, fio, udev with its own rules for disks and ours, and the programs named. ublk-guest.sh OUT PROGRAM... makes OUT/vmlinuz and OUT/initrd;
# its /init runs the last program and powers off.
set -euo pipefail
out=$1
shift
mkdir -p "$out/kernel"
work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT

if ! ls "$out"/kernel/boot/vmlinuz-* >/dev/null 2>&1; then
  # On Debian 12 the newest one is in bookworm-backports, which tests/lab/setup.sh adds.
  package=$(apt-cache show linux-image-cloud-amd64 |
    sed -nE 's/^Version: (.*)/\1/p; s/^Depends:.*(linux-image-[0-9][^ ,]*).*/\1/p' | paste - - | sort -V | tail -1 | cut -f2)
  echo "guest: fetching $package" >&2
  (cd "$work" && chmod 0777 . && apt-get -qq -o "Dir::Cache::archives=$work" download "$package")
  dpkg -x "$work"/*.deb "$out/kernel"
fi
version=$(ls "$out/kernel/lib/modules")
[ -e "$out/kernel/lib/modules/$version/modules.dep" ] || depmod -b "$out/kernel" "$version"

root=$work/root
mkdir -p "$root"/{bin,dev,etc,proc,run,sys,tmp,modules}
cp /bin/busybox "$root/bin/"
for applet in sh mount mkdir insmod rmmod poweroff dmesg ls cat blockdev sync; do ln -s busybox "$root/bin/$applet"; done
# A program and the libraries it names, at their own paths.
program() {
  local path=$1 library
  cp "$path" "$root/bin/"
  strip "$root/bin/$(basename "$path")" 2>/dev/null || true
  for library in $(ldd "$path" | grep -oE '/[^ ]+'); do
    mkdir -p "$root$(dirname "$library")"
    [ -e "$root$library" ] || cp -L "$library" "$root$library"
  done
}
for path in "$(command -v fio)" "$@"; do program "$path"; done
program "$(command -v udevadm)"
mkdir -p "$root/usr/lib/udev/rules.d"
rules=usr/lib/udev/rules.d
cp "$(dirname "$0")"/../../deploy/udev/*.rules "$root/$rules/"
# Some releases of udev look at ublk devices by themselves, others do not. This one does.
for file in 60-block.rules 60-persistent-storage.rules; do
  sed -E '/KERNEL[!=]=/ s/\|vd\*/|vd*|ublkb*/' "/$rules/$file" >"$root/$rules/$file"
done
mkdir -p "$root/lib"
ln -s ../usr/lib/udev "$root/lib/udev"
ln -s udevadm "$root/bin/systemd-udevd"
for module in virtio_blk ublk_drv; do
  modprobe -d "$out/kernel" -S "$version" --show-depends "$module" | awk '/^insmod/ { print $2 }'
done | while read -r path; do
  file=$(basename "${path%.xz}")
  [ -e "$root/modules/$file" ] && continue
  case $path in *.xz) xz -dc "$path" >"$root/modules/$file" ;; *) cp "$path" "$root/modules/$file" ;; esac
  echo "$file" >>"$root/modules/order"
done
cat >"$root/init" <<INIT
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t debugfs debug /sys/kernel/debug
mount -t tmpfs tmp /run; mount -t tmpfs tmp /tmp
systemd-udevd --daemon
while read -r module; do insmod "/modules/\$module"; done < /modules/order
"$(basename "${!#}")" > /dev/ttyS0 2>&1
sync
poweroff -f
INIT
chmod +x "$root/init"
# Not compressed: an emulated processor unpacks slowly.
(cd "$root" && find . | cpio -o -H newc --quiet) >"$work/initrd"
cp "$out"/kernel/boot/vmlinuz-* "$out/vmlinuz"
mv "$work/initrd" "$out/initrd"
