#!/bin/sh
# Installs what the build, the demo and the tests need, with the system's package manager, and makes the two system
# users. Says each thing before it does it; does nothing that is done already.
#   setup.sh [all]   everything but
#   setup.sh ceph    all, and a Ceph cluster's programs for the tests of volumes on RBD
#   setup.sh build   what the build needs, and no user
set -eu

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

build="gcc libc6-dev ca-certificates xz-utils"
host="qemu-system-x86 qemu-utils qemu-block-extra libvirt-daemon-system libvirt-clients libvirt-daemon-driver-qemu"
lab="cryptsetup-bin dmsetup fio libnbd-bin python3-libnbd nbdkit busybox-static cpio kmod dpkg-dev e2fsprogs fdisk util-linux
  gdb g++ apparmor udev openssl socat virtinst procps iproute2 python3"
ceph="ceph-mon ceph-osd ceph-mgr ceph-common librbd1 librados2"
want="$build"
[ "${1:-all}" = build ] || want="$build $host $lab"
[ "${1:-all}" != ceph ] || want="$want $ceph"

have() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
version() { dpkg-query -W -f '${Version}' "$1" 2>/dev/null; }
missing=""
for package in $want; do have "$package" || missing="$missing $package"; done

# QEMU 10 and libvirt 11.3 are Debian 13's; on Debian 12 they are in bookworm-backports.
newer=""
if [ "${1:-all}" != build ]; then
  have qemu-system-x86 && dpkg --compare-versions "$(version qemu-system-x86)" ge 1:10.0 || newer=yes
  have libvirt-daemon-system && dpkg --compare-versions "$(version libvirt-daemon-system)" ge 11.3 || newer=yes
fi

if [ -n "$missing$newer" ]; then
  command -v apt-get >/dev/null || die "this machine has no apt-get; install these by hand: $want"
  [ "$(id -u)" = 0 ] || die "packages are missing ($missing): run make as root, or install them by hand"
  . /etc/os-release
  target=""
  if [ "${VERSION_CODENAME:-}" = bookworm ] && [ "${1:-all}" != build ]; then
    target="-t bookworm-backports"
    if ! grep -rqsE '^(deb .*|Suites:.*)bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d/; then
      say "adding the suite bookworm-backports to this machine's Debian source (QEMU 10, libvirt 11.3)"
      for file in /etc/apt/sources.list.d/*.sources; do
        [ -f "$file" ] && sed -i -E 's/^(Suites:([[:space:]]+bookworm(-updates)?)+)[[:space:]]*$/\1 bookworm-backports/' "$file"
      done
      [ -f /etc/apt/sources.list ] && sed -i -E \
        '/^deb (\[[^]]*\] )?[^ ]+ bookworm /{h;s/ bookworm / bookworm-backports /;H;g}' /etc/apt/sources.list
    fi
  fi
  say "apt-get update"
  apt-get -qq -o DPkg::Lock::Timeout=300 update
  export DEBIAN_FRONTEND=noninteractive
  if [ -n "$newer" ]; then
    say "installing: $host"
    # Without -t, apt would bring QEMU 7.2 and take qemu-utils 10 away.
    # shellcheck disable=SC2086
    apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 $target install $host >/dev/null
  fi
  missing=""
  for package in $want; do have "$package" || missing="$missing $package"; done
  if [ -n "$missing" ]; then
    say "installing:$missing"
    # shellcheck disable=SC2086
    apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 $target install $missing >/dev/null
  fi
fi

[ "${1:-all}" = build ] && exit 0
for user in vmseal vmseal-disk vmseal-rbd; do
  if ! getent passwd "$user" >/dev/null; then
    [ "$(id -u)" = 0 ] || die "system user $user is missing: run make as root"
    say "adding the system user $user"
    useradd --system --user-group --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin "$user"
  fi
done
exit 0
