//! What an image lies on: the name of a backing file, as QEMU reads it.
//!
//! An image file in, the next file of its chain out. A name that leads nowhere we can look is told apart from none:
//! what nobody can see must not be taken for free. Source: QEMU, `block.c` (`path_has_protocol`, `json:`).

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    causes::causes,
    tasks::{image::canonical, qcow2::Qcow2Header},
    volume::open_regular,
};

/// Protocols of QEMU that name no file of this host.
const ELSEWHERE: [&str; 8] = ["nbd", "nbd+tcp", "rbd", "http", "https", "ftp", "ftps", "iscsi"];
/// Drivers of QEMU that open what their name says.
const FILES: [&str; 3] = ["file", "host_device", "host_cdrom"];

/// What is below an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Nothing that is a file of this host.
    Nothing,
    /// This file.
    File(PathBuf),
    /// Something, and it cannot be told what: why.
    Unknown(String),
}

/// Looks at an image of a format with headers. Only regular files are opened.
pub(crate) fn backing_of(path: &Path) -> Backing {
    let unknown = |why: &dyn std::fmt::Display| Backing::Unknown(format!("{}: {why}", path.display()));
    let real = canonical(path);
    match fs::metadata(&real) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Backing::Nothing,
        Err(e) if e.kind() == ErrorKind::NotFound => return Backing::Nothing,
        Err(e) => return unknown(&e),
    }
    let file = match open_regular(&real, false) {
        Ok(file) => file,
        Err(e) => return Backing::Unknown(causes(&e)),
    };
    match Qcow2Header::read(&file) {
        Ok(None) => Backing::Nothing,
        Ok(Some(header)) if header.external_data => unknown(&"its data is in another file"),
        Ok(Some(header)) => match header.backing {
            None => Backing::Nothing,
            Some(name) => {
                // A name is relative to the image as it was named, links and all.
                let found = resolve(&name, path.parent().unwrap_or(Path::new("/")));
                found.unwrap_or_else(|| unknown(&format_args!("it lies on '{}'", name.escape_debug())))
            }
        },
        Err(e) => unknown(&e),
    }
}

/// What a backing file's name means. `None` if that cannot be told.
fn resolve(name: &str, directory: &Path) -> Option<Backing> {
    // It could not be read, or is not text.
    if name == "?" || name.contains('\u{fffd}') {
        return None;
    }
    if let Some(json) = name.strip_prefix("json:") {
        return of_json(&serde_json::from_str(json).ok()?, "");
    }
    match name.split_once(':') {
        // A colon before any slash ends a protocol.
        Some((protocol, rest)) if !protocol.contains('/') => {
            if FILES.contains(&protocol) {
                Some(Backing::File(directory.join(rest)))
            } else {
                ELSEWHERE.contains(&protocol).then_some(Backing::Nothing)
            }
        }
        _ => Some(Backing::File(directory.join(name))),
    }
}

/// The file in a block device's description, nested (`"file": {…}`) or flat (`"file.filename"`).
fn of_json(node: &Value, prefix: &str) -> Option<Backing> {
    // Only what is known to say it all: no second file (`backing`, `data-file`, `children`) beside the first.
    const KNOWN: [&str; 12] = [
        "driver",
        "filename",
        "file",
        "offset",
        "size",
        "cache",
        "read-only",
        "discard",
        "aio",
        "node-name",
        "detect-zeroes",
        "locking",
    ];
    let fields = node.as_object()?;
    let strange = |key: &String| {
        let first = |key: &str| key.split('.').next().is_some_and(|word| KNOWN.contains(&word));
        key.strip_prefix(prefix).is_some_and(|key| !first(key))
    };
    let text = |key: &str| fields.get(&format!("{prefix}{key}")).and_then(Value::as_str);
    let driver = text("driver");
    if driver.is_some_and(|driver| ELSEWHERE.contains(&driver)) {
        return Some(Backing::Nothing);
    }
    if fields.keys().any(strange) {
        return None;
    }
    if let Some(path) = text("filename") {
        let absolute = path.starts_with('/') && driver.is_none_or(|driver| FILES.contains(&driver));
        return absolute.then(|| Backing::File(path.into()));
    }
    let file = format!("{prefix}file");
    match fields.get(&file) {
        Some(inner) => of_json(inner, ""),
        None => {
            let below = format!("{file}.");
            fields.keys().any(|key| key.starts_with(&below)).then(|| of_json(node, &below)).flatten()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> Option<Backing> {
        Some(Backing::File(path.into()))
    }

    #[test]
    fn names_are_read_as_qemu_reads_them() {
        let read = |name: &str| resolve(name, Path::new("/x"));
        assert_eq!(read("base.img"), file("/x/base.img"));
        assert_eq!(read("/y/base.img"), file("/y/base.img"));
        assert_eq!(read("./a:b.img"), file("/x/./a:b.img"));
        assert_eq!(read("file:/y/base.img"), file("/y/base.img"));
        assert_eq!(read("file:base.img"), file("/x/base.img"));
        assert_eq!(read("host_device:/dev/vg/lv"), file("/dev/vg/lv"));
        for elsewhere in ["nbd:localhost:10809", "rbd:pool/image", "https://host/base.img"] {
            assert_eq!(read(elsewhere), Some(Backing::Nothing), "{elsewhere}");
        }
        for unknown in ["?", "a\u{fffd}.img", "blkdebug::/x/base.img", "fat:/x", "nfs://host/x/base.img"] {
            assert_eq!(read(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn descriptions_in_json_are_followed_to_their_file() {
        let read = |json: &str| resolve(&format!("json:{json}"), Path::new("/x"));
        for json in [
            r#"{"driver":"qcow2","file":{"driver":"file","filename":"/y/b.img"}}"#,
            r#"{"driver":"qcow2","file.driver":"file","file.filename":"/y/b.img"}"#,
            r#"{"file.filename":"/y/b.img"}"#,
            r#"{"driver":"file","filename":"/y/b.img"}"#,
            r#"{"driver":"raw","offset":512,"file":{"driver":"host_device","filename":"/y/b.img"}}"#,
            r#"{"driver":"raw","file.file.filename":"/y/b.img"}"#,
        ] {
            assert_eq!(read(json), file("/y/b.img"), "{json}");
        }
        for json in [
            r#"{"driver":"nbd","server":{"type":"inet","host":"h","port":"1"}}"#,
            r#"{"driver":"raw","file":{"driver":"rbd","pool":"p","image":"i"}}"#,
            r#"{"driver":"raw","file.driver":"nbd","file.host":"h"}"#,
        ] {
            assert_eq!(read(json), Some(Backing::Nothing), "{json}");
        }
        for json in [
            "",
            "{}",
            "[]",
            "{",
            r#"{"driver":"file","filename":"b.img"}"#,
            r#"{"driver":"blkverify","test":{"filename":"/y/b.img"}}"#,
            r#"{"driver":"vvfat","filename":"/y/b.img"}"#,
            r#"{"driver":"qcow2","file":{"filename":"/y/b.img"},"backing":{"filename":"/y/c.img"}}"#,
            r#"{"driver":"qcow2","file.filename":"/y/b.img","backing.file.filename":"/y/c.img"}"#,
            r#"{"driver":"qcow2","file":"node3"}"#,
            r#"{"driver":"file","filename":7}"#,
        ] {
            assert_eq!(read(json), None, "{json}");
        }
    }
}
