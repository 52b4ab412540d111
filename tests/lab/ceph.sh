#!/bin/sh
# A Ceph cluster for tests: one monitor, manager and OSD, on loopback only, without authentication, all in one directory.
#   ceph.sh start DIRECTORY   prints nothing; DIRECTORY/ceph.conf is what clients use; pool `rbd` is there
#   ceph.sh stop DIRECTORY    ends its processes; the directory stays
set -eu
[ $# = 2 ] || { echo "usage: ceph.sh start|stop DIRECTORY" >&2; exit 2; }
d=$2
conf=$d/ceph.conf

if [ "$1" = stop ]; then
  for daemon in osd.0 mgr.x mon.a; do
    [ -s "$d/run/$daemon.pid" ] || continue
    pid=$(cat "$d/run/$daemon.pid")
    # Only a process whose command line names this directory.
    if tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "$conf"; then kill -KILL "$pid"; fi
  done
  exit 0
fi

mkdir -p "$d/mon" "$d/mgr" "$d/osd" "$d/run" "$d/log"
# Two clusters at a time need two monitors' ports.
port=$(python3 -c '
import socket
a, b = socket.socket(), socket.socket()
a.bind(("127.0.0.1", 0)); b.bind(("127.0.0.1", 0))
print(a.getsockname()[1], b.getsockname()[1])')
mon="[v2:127.0.0.1:${port% *},v1:127.0.0.1:${port#* }]"
fsid=$(cat /proc/sys/kernel/random/uuid)
cat >"$conf" <<CONF
[global]
fsid = $fsid
mon host = $mon
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block size = 4294967296
bluestore block path =
bdev aio = true
mon data = $d/mon
mgr data = $d/mgr
osd data = $d/osd
run dir = $d/run
admin socket = $d/run/\$name.\$pid.asok
log file = $d/log/\$name.log
osd pool default pg num = 8
ms bind ipv6 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
mon data avail warn = 1
mon data avail crit = 1
osd memory target = 939524096
mgr module path = /usr/share/ceph/mgr
[mon]
pid file = $d/run/\$name.pid
[osd]
pid file = $d/run/\$name.pid
[mgr]
pid file = $d/run/\$name.pid
CONF
{
  monmaptool --create --addv a "$mon" --fsid "$fsid" "$d/monmap"
  ceph-mon -c "$conf" --mkfs -i a --monmap "$d/monmap"
  ceph-mon -c "$conf" -i a
  timeout 60 ceph -c "$conf" -s
  osd=$(cat /proc/sys/kernel/random/uuid)
  timeout 20 ceph -c "$conf" osd new "$osd"
  ceph-osd -c "$conf" -i 0 --mkfs --osd-uuid "$osd"
  ceph-osd -c "$conf" -i 0
  ceph-mgr -c "$conf" -i x || true
  tries=0
  until timeout 5 ceph -c "$conf" osd stat | grep -q '1 up'; do
    tries=$((tries + 1))
    [ $tries -lt 60 ]
    sleep 0.5
  done
  timeout 60 ceph -c "$conf" osd pool create rbd 8 8 replicated
  timeout 60 rbd -c "$conf" pool init rbd
} >"$d/log/start" 2>&1 || { cat "$d/log/start" >&2; exit 1; }
