#!/bin/bash
# A libvirtd of its own, beside whatever this machine runs: a mount namespace with private /etc, /run and /var folders
# of libvirt, its socket outside at RUN/libvirt/libvirt-sock. libvirtd.sh STATE RUN [HOOK] execs it; HOOK is vmseal's
# qemu hook, which finds its agent through RUN.
#
# STATE must be a path that the user libvirt-qemu can reach: QEMU opens images below it.
set -euo pipefail
if [ "${VMSEAL_IN_NAMESPACE:-}" != 1 ]; then
  exec env VMSEAL_IN_NAMESPACE=1 unshare --mount --propagation private "$0" "$@"
fi
state=$1 run=$2 hook=${3:-}
mkdir -p "$run/libvirt" "$state"/{etc,run,lib/qemu,lib/swtpm,lib/images,log/qemu,cache}
# Definitions and saved images live in STATE: they are there again when libvirtd is started again.
[ -e "$state/etc/qemu" ] || cp -a /etc/libvirt/. "$state/etc/"
rm -f "$state"/etc/qemu/networks/autostart/*
mkdir -p "$state/etc/hooks/qemu.d"
uuid=$(cat "$state/host-uuid" 2>/dev/null || tee "$state/host-uuid" < /proc/sys/kernel/random/uuid)
cat > "$state/etc/libvirtd.conf" <<CONF
host_uuid = "$uuid"
unix_sock_dir = "$run/libvirt"
unix_sock_rw_perms = "0777"
auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "2:file:$state/libvirtd.log"
CONF
# No cgroups and no mount namespace for QEMU here: neither is to be had in every place where tests run.
cat > "$state/etc/qemu.conf" <<CONF
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
CONF
if [ -n "$hook" ]; then
  install -m 0755 "$hook" "$state/etc/hooks/qemu.d/50-vmseal"
  printf 'run_dir = "%s"\n' "$run" > "$state/etc/hooks/qemu.d/50-vmseal.conf"
fi
chown -R libvirt-qemu "$state/lib/qemu" 2>/dev/null || true
mkdir -p /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt
mount --bind "$state/etc" /etc/libvirt
mount --bind "$state/run" /run/libvirt
mount --bind "$state/lib" /var/lib/libvirt
mount --bind "$state/log" /var/log/libvirt
mount --bind "$state/cache" /var/cache/libvirt
# Guests are emulated. A /dev/kvm that root may use and QEMU's user may not would have libvirtd probe QEMU anew for
# every definition, by the second.
if [ -e /dev/kvm ]; then
  : > "$state/no-kvm"
  chmod 0000 "$state/no-kvm"
  mount --bind "$state/no-kvm" /dev/kvm
fi
exec libvirtd --pid-file "$state/libvirtd.pid"
