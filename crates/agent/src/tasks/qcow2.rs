//! As much of a qcow2 header as decides whether a disk can be encrypted, and how big its volume may grow.
//!
//! An open file in, what its header says out. Tables are not read: nothing the guest can make big is believed.
//! Source: QEMU, `docs/interop/qcow2.rst`.

use std::{fs::File, io, os::unix::fs::FileExt};

const MAGIC: [u8; 4] = *b"QFI\xfb";
const HEADER_V3: usize = 104;
/// Longest name of a backing file (specification: 1023).
const MAX_NAME: u32 = 1023;

/// What a qcow2 header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Qcow2Header {
    /// Bytes the guest sees.
    pub(crate) virtual_bytes: u64,
    /// Bytes of a cluster.
    pub(crate) cluster_bytes: u64,
    /// Bits of a reference count.
    pub(crate) refcount_bits: u64,
    /// Name of its backing file as it stands there.
    pub(crate) backing: Option<String>,
    /// QEMU's own encryption: 0 none, 1 AES, 2 LUKS.
    pub(crate) crypt_method: u32,
    /// It was not closed, and its counts may be wrong.
    pub(crate) dirty: bool,
    /// QEMU found it damaged.
    pub(crate) corrupt: bool,
    /// Its data is in another file.
    pub(crate) external_data: bool,
    /// Sub-clusters: an L2 entry has 16 bytes.
    pub(crate) extended_l2: bool,
    /// Bits this program does not know.
    pub(crate) unknown_bits: u64,
}

impl Qcow2Header {
    /// Reads it. `None` if the file does not begin like a qcow2 image, or begins like one and then makes no sense.
    pub(crate) fn read(file: &File) -> io::Result<Option<Self>> {
        let mut bytes = [0; HEADER_V3];
        let mut got = 0;
        while got < bytes.len() {
            match file.read_at(&mut bytes[got..], got as u64) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if got < 72 || bytes[..4] != MAGIC {
            return Ok(None);
        }
        let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let (version, cluster_bits) = (u32_at(4), u32_at(20));
        if !matches!(version, 2 | 3) || !(9..=21).contains(&cluster_bits) {
            return Ok(None);
        }
        let (incompatible, refcount_order) = if version == 3 { (u64_at(72), u32_at(96)) } else { (0, 4) };
        if version == 3 && (got < HEADER_V3 || refcount_order > 6) {
            return Ok(None);
        }
        let (offset, len) = (u64_at(8), u32_at(16));
        let backing = match (offset, len) {
            (0, _) | (_, 0) => None,
            (_, len) => {
                let mut name = vec![0; len.min(MAX_NAME) as usize];
                let read = file.read_exact_at(&mut name, offset);
                // It has one, whatever its name may be.
                Some(read.map_or_else(|_| "?".to_owned(), |()| String::from_utf8_lossy(&name).into_owned()))
            }
        };
        Ok(Some(Self {
            virtual_bytes: u64_at(24),
            cluster_bytes: 1 << cluster_bits,
            refcount_bits: 1 << refcount_order,
            backing,
            crypt_method: u32_at(32),
            dirty: incompatible & 1 != 0,
            corrupt: incompatible & 2 != 0,
            external_data: incompatible & 4 != 0,
            extended_l2: incompatible & 16 != 0,
            // Bit 3 is another compression; QEMU's business.
            unknown_bits: incompatible & !0b1_1111,
        }))
    }

    /// Bytes of the image with every cluster allocated, as `qemu-img measure` says it as `fully-allocated` or a little
    /// more. `None` if it is beyond what a file can be.
    pub(crate) fn fully_allocated(&self) -> Option<u64> {
        let cluster = self.cluster_bytes;
        let up = |bytes: u64| bytes.checked_next_multiple_of(cluster);
        let data = up(self.virtual_bytes)?;
        let entry = if self.extended_l2 { 16 } else { 8 };
        let l2 = up((data / cluster).checked_mul(entry)?)?;
        let l1 = up((l2 / cluster).checked_mul(8)?)?;
        let all = data.checked_add(l2)?.checked_add(l1)?.checked_add(cluster)?;
        // Reference counts also count themselves: they are fewer than one in a hundred, so a second look covers them.
        let mut counts = 0;
        for _ in 0..3 {
            let clusters = all.checked_add(counts)? / cluster;
            let blocks = up(clusters.checked_mul(self.refcount_bits)?.div_ceil(8))?;
            let table = up((blocks / cluster).checked_mul(8)?)?;
            counts = blocks.checked_add(table)?;
        }
        all.checked_add(counts)
    }

    /// Bytes a volume presents that holds this image, `stored` of them now.
    ///
    /// QEMU formats and grows the image within the export and cannot make the export longer, so it is as long as the
    /// image can become: twice full size, for internal snapshots share nothing once the guest has rewritten
    /// everything; and 1 GiB more, for a snapshot's RAM and metadata. The volume's file does not take that space.
    pub(crate) fn presented(&self, stored: u64) -> Option<u64> {
        const GIB: u64 = 1 << 30;
        let full = self.fully_allocated()?.checked_mul(2)?.checked_add(GIB)?;
        full.max(stored.checked_add(GIB)?).checked_next_multiple_of(1 << 20)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::scratch::Scratch;

    fn qemu_img(args: &[&str]) -> Vec<u8> {
        let done = Command::new("qemu-img").args(args).output().expect("qemu-img is installed");
        assert!(done.status.success(), "{args:?}: {done:?}");
        done.stdout
    }

    fn header(options: &str, size: &str) -> (Scratch, Qcow2Header, String) {
        let scratch = Scratch::new();
        let path = scratch.path().join("x.qcow2").to_str().unwrap().to_owned();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([path.as_str(), size]);
        qemu_img(&args);
        let header = Qcow2Header::read(&File::open(&path).unwrap()).unwrap().unwrap();
        (scratch, header, path)
    }

    #[test]
    fn full_size_is_what_qemu_img_measures_or_a_little_more() {
        let cases = [
            ("", "10G"),
            ("", "3T"),
            ("cluster_size=4k", "7G"),
            ("cluster_size=2M", "1T"),
            ("extended_l2=on,cluster_size=128k", "100G"),
            ("refcount_bits=64", "64G"),
            ("compat=0.10", "12345678k"),
        ];
        for (options, size) in cases {
            let (_scratch, header, path) = header(options, size);
            let mut args = vec!["measure", "--output", "json", "-O", "qcow2"];
            let same = options.replace("compat=0.10", "");
            if !same.is_empty() {
                args.extend(["-o", same.as_str()]);
            }
            args.push(&path);
            let measured: serde_json::Value = serde_json::from_slice(&qemu_img(&args)).unwrap();
            let measured = measured["fully-allocated"].as_u64().unwrap();
            let ours = header.fully_allocated().unwrap();
            assert!(ours >= measured, "{options} {size}: {ours} < {measured}");
            assert!(
                ours - measured <= measured / 1000 + 8 * header.cluster_bytes,
                "{options}: {ours} {measured}"
            );
            assert!(header.presented(0).unwrap() >= 2 * measured + (1 << 30));
        }
    }

    #[test]
    fn what_stands_in_the_way_is_seen() {
        let (scratch, plain, base) = header("", "1M");
        assert_eq!((&plain.backing, plain.crypt_method, plain.external_data), (&None, 0, false));
        let overlay = scratch.path().join("o.qcow2").to_str().unwrap().to_owned();
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &overlay]);
        let read = |path: &str| Qcow2Header::read(&File::open(path).unwrap()).unwrap().unwrap();
        assert_eq!(read(&overlay).backing.as_deref(), Some(base.as_str()));
        let data = scratch.path().join("d.raw");
        let options = format!("data_file={}", data.display());
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, &overlay, "1M"]);
        assert!(read(&overlay).external_data);
        let secret = ["--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks,encrypt.key-secret=s"];
        let iterations = "encrypt.iter-time=10";
        qemu_img(
            &[&["create", "-q", "-f", "qcow2"], &secret[..], &["-o", iterations, &overlay, "1M"]].concat(),
        );
        assert_eq!(read(&overlay).crypt_method, 2);
    }

    #[test]
    fn nonsense_is_no_header_and_hostile_sizes_overflow_nothing() {
        let scratch = Scratch::new();
        let path = scratch.path().join("x");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            Qcow2Header::read(&File::open(&path).unwrap()).unwrap()
        };
        assert_eq!(read(b""), None);
        assert_eq!(read(&[0; 200]), None);
        let mut bytes = [0xff; 200];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        assert_eq!(read(&bytes), None);
        bytes[20..24].copy_from_slice(&9u32.to_be_bytes());
        bytes[96..100].copy_from_slice(&6u32.to_be_bytes());
        let header = read(&bytes).unwrap();
        assert_eq!(header.fully_allocated(), None);
        assert_eq!(header.presented(0), None);
        assert_eq!(header.backing.as_deref(), Some("?"));
        assert!(header.corrupt && header.unknown_bits != 0);
        for len in 0..bytes.len() {
            read(&bytes[..len]);
        }
    }
}
