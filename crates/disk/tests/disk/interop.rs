//! Other people's NBD clients: QEMU, libnbd's tools and Python module, fio.

use std::fs;

use crate::{
    rig::{MIB, Rig, Spec, pattern},
    tools::{fails, ok, python, tool},
};

#[test]
fn qemu_io_writes_reads_zeroes_and_discards() {
    let Some(mut qemu_io) = tool("qemu-io") else { return };
    let rig = Rig::with(Spec::fixed(8 * MIB));
    ok(qemu_io
        .args(["-f", "raw", "-d", "unmap"])
        .args([
            "-c",
            "write -P 0x5a 64k 1M",
            "-c",
            "write -f -P 0x33 0 4k",
            "-c",
            "write -z 128k 64k",
            "-c",
            "flush",
            "-c",
            "read -P 0x5a 64k 64k",
            "-c",
            "read -P 0 128k 64k",
            "-c",
            "read -P 0x33 0 4k",
            "-c",
            "discard 4M 1M",
            "-c",
            "write -P 0x77 7167k 1k",
        ])
        .arg(rig.disk().uri()));
    let plain = rig.disk().stored_plain();
    assert!(plain[64 << 10..128 << 10].iter().all(|byte| *byte == 0x5a));
    assert!(plain[128 << 10..192 << 10].iter().all(|byte| *byte == 0));
    assert!(plain[192 << 10..1088 << 10].iter().all(|byte| *byte == 0x5a));
    assert!(plain[..4096].iter().all(|byte| *byte == 0x33));
    assert!(plain[7167 << 10..7168 << 10].iter().all(|byte| *byte == 0x77));
}

#[test]
fn qcow2_lives_inside_a_volume_that_grows_under_it() {
    let (Some(mut create), Some(mut write), Some(mut check), Some(mut compare)) =
        (tool("qemu-img"), tool("qemu-io"), tool("qemu-img"), tool("qemu-img"))
    else {
        return;
    };
    let rig = Rig::with(Spec::growing(96 * MIB));
    let uri = rig.disk().uri();
    assert_eq!(fs::metadata(&rig.disk().file).unwrap().len(), 16 * MIB);
    ok(create.args(["create", "-f", "qcow2", &uri, "64M"]));
    ok(write.args([
        "-f",
        "qcow2",
        "-c",
        "write -P 0xab 3M 5M",
        "-c",
        "write -P 0xcd 60M 1M",
        "-c",
        "flush",
        &uri,
    ]));
    let check = ok(check.args(["check", "-f", "qcow2", &uri]));
    assert!(check.contains("No errors were found"), "{check}");
    let length = fs::metadata(&rig.disk().file).unwrap().len();
    assert!(length > 22 * MIB && length < 40 * MIB, "the file grew to what is used: {length}");
    // What the file holds is a qcow2 image, seen without the server.
    let image = rig.path("image.qcow2");
    fs::write(&image, rig.disk().stored_plain()).unwrap();
    ok(compare.args(["compare", "-f", "qcow2", "-F", "qcow2"]).arg(&image).arg(&uri));
}

#[test]
fn qemu_img_converts_into_and_out_of_an_export() {
    let (Some(mut inward), Some(mut outward), Some(mut map)) =
        (tool("qemu-img"), tool("qemu-img"), tool("qemu-img"))
    else {
        return;
    };
    let rig = Rig::with(Spec { unit: 4096, ..Spec::fixed(8 * MIB) });
    let (source, copy) = (rig.path("source.raw"), rig.path("copy.raw"));
    fs::write(&source, pattern(4, 8 << 20)).unwrap();
    let uri = rig.disk().uri();
    ok(inward.args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(&source).arg(&uri));
    ok(outward.args(["convert", "-f", "raw", "-O", "raw", &uri]).arg(&copy));
    assert!(fs::read(&copy).unwrap() == pattern(4, 8 << 20));
    let map = ok(map.args(["map", "--output=json", "-f", "raw", &uri]));
    assert!(map.contains("\"zero\": false") && !map.contains("\"zero\": true"), "{map}");
}

#[test]
fn nbdinfo_sees_sizes_flags_and_extents() {
    let (Some(mut info), Some(mut map), Some(mut list)) = (tool("nbdinfo"), tool("nbdinfo"), tool("nbdinfo"))
    else {
        return;
    };
    let rig = Rig::with(Spec { stored: MIB, unit: 4096, ..Spec::growing(4 * MIB) });
    let uri = rig.disk().uri();
    let info = ok(info.args(["--json", &uri]));
    for expected in [
        "\"export-size\": 4194304",
        "\"structured\": true",
        "\"TLS\": false",
        "\"is_read_only\": false",
        "\"can_df\": true",
        "\"can_fast_zero\": false",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"can_cache\": false",
        "\"block_size_minimum\": 4096",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "\"base:allocation\"",
    ] {
        assert!(info.contains(expected), "{expected} is not in {info}");
    }
    let map = ok(map.args(["--map", "--json", &uri]));
    assert!(map.contains("\"hole\"") && !map.contains("zero"), "{map}");
    let list = ok(list.args(["--list", "--json", &uri]));
    assert!(list.contains(&format!("\"export-name\": \"{}\"", rig.disk().id)), "{list}");
}

#[test]
fn nbdcopy_copies_over_several_connections() {
    let (Some(mut inward), Some(mut outward)) = (tool("nbdcopy"), tool("nbdcopy")) else { return };
    let rig = Rig::with(Spec::fixed(16 * MIB));
    let (source, copy) = (rig.path("source.raw"), rig.path("copy.raw"));
    fs::write(&source, pattern(5, 16 << 20)).unwrap();
    let uri = rig.disk().uri();
    ok(inward.args(["--connections=4", "--threads=2", "--flush"]).arg(&source).arg(&uri));
    ok(outward.args(["--connections=4", "--threads=2"]).arg(&uri).arg(&copy));
    assert!(fs::read(&copy).unwrap() == pattern(5, 16 << 20));
    assert!(rig.disk().stored_plain() == pattern(5, 16 << 20));
}

#[test]
fn libnbd_agrees_on_every_command() {
    let script = r#"
import errno, nbd, sys
uri, name = sys.argv[1], sys.argv[2]
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.set_request_block_size(True)
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() and not h.get_tls_negotiated()
assert h.get_size() == 4 << 20, h.get_size()
assert h.can_meta_context("base:allocation") and not h.can_cache() and not h.can_fast_zero()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 512 and h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
data = bytes(range(256)) * 4096
h.pwrite(data, 512, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 512) == data
chunks = []
h.pread_structured(4096, 512, lambda buf, offset, status, error: chunks.append((len(buf), offset, status)), nbd.CMD_FLAG_DF)
assert chunks == [(4096, 512, nbd.READ_DATA)], chunks
h.zero(65536, 512)
h.zero(65536, 131072, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
assert h.pread(65536, 512) == bytes(65536) and h.pread(65536, 131072) == bytes(65536)
h.trim(65536, 2 << 20)
h.flush()
extents = []
h.block_status(4 << 20, 0, lambda context, offset, entries, error: extents.extend(entries))
assert sum(extents[0::2]) == 4 << 20 and set(extents[1::2]) <= {0, 1}, extents
h.set_strict_mode(0)
def refused(code, call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        assert error.errnum == code, (error.errnum, code, call)
    else:
        raise AssertionError(call)
refused(errno.EINVAL, h.cache, 4096, 0)
refused(errno.EINVAL, h.pread, 100, 7)
refused(errno.EINVAL, h.pread, 512, 4 << 20)
refused(errno.ENOSPC, h.pwrite, bytes(512), 4 << 20)
refused(errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
h.shutdown()
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == [name], names
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name))
assert contexts == ["base:allocation"], contexts
h.set_full_info(True)
h.set_export_name("")
h.opt_info()
assert h.get_canonical_export_name() == name
h.opt_abort()
"#;
    let Some(mut python) = python(script) else { return };
    let rig = Rig::with(Spec::fixed(4 * MIB));
    ok(python.arg(rig.disk().uri()).arg(rig.disk().id.to_string()));
}

#[test]
fn fio_verifies_what_it_wrote() {
    let Some(mut fio) = tool("fio") else { return };
    let rig = Rig::with(Spec::fixed(32 * MIB));
    ok(fio
        .current_dir(&rig.plan.scratch.0)
        .args([
            "--name=verify",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--bsrange=512-256k",
            "--blockalign=512",
            "--size=32M",
            "--iodepth=16",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
        ])
        .arg(format!("--uri={}", rig.disk().uri())));
    let status = rig.status();
    assert!(status.disks[0].written_bytes >= 32 * MIB && status.disks[0].read_bytes > 0);
}

#[test]
fn qemu_refuses_an_image_format_it_does_not_find() {
    // The volume shows plaintext of a raw disk: nothing in it may be taken for a LUKS header or an image.
    let Some(mut info) = tool("qemu-img") else { return };
    let rig = Rig::with(Spec::fixed(MIB));
    let text = fails(info.args(["info", "-f", "luks", &rig.disk().uri()]));
    assert!(text.contains("not in LUKS format") || text.contains("luks"), "{text}");
}
