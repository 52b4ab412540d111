//! Where an image is, as text that stands wherever a path of a file may: `rbd:pool/image`, in QEMU's own form.
//!
//! Text in, names out, and back. After the image come options, `:id=USER`, `:mon_host=ADDRESSES`, `:conf=FILE`; in them
//! and in names a backslash takes its meaning from `:`, `=`, `@` and itself (QEMU, `block/rbd.c`). Others are refused:
//! what is not understood must not be dropped, and a key (`key=`) must stand nowhere.

use std::{fmt, path::Path};

use crate::rbd::RbdError;

/// Begins every location.
const SCHEME: &str = "rbd:";
/// Longest name of a pool, a namespace or an image; Ceph's own limits are near.
const MAX_NAME: usize = 256;

/// An image and how its cluster is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Pool.
    pub pool: String,
    /// Namespace within it.
    pub namespace: Option<String>,
    /// Image.
    pub image: String,
    /// Ceph user without `client.`, where the definition names one.
    pub user: Option<String>,
    /// Monitors, where the definition names some: `10.0.0.1:6789,10.0.0.2:6789`.
    pub monitors: Option<String>,
    /// Configuration file, where the definition names one.
    pub conf: Option<String>,
}

impl Location {
    /// Whether a text is meant as a location: no path of a file begins so.
    pub fn is_meant_by(text: &str) -> bool {
        text.starts_with(SCHEME)
    }

    /// The same of a path.
    pub fn of_path(path: &Path) -> Option<Result<Self, RbdError>> {
        path.to_str().filter(|text| Self::is_meant_by(text)).map(Self::parse)
    }

    /// Reads a location.
    ///
    /// # Errors
    ///
    /// [`RbdError::Location`].
    pub fn parse(text: &str) -> Result<Self, RbdError> {
        let wrong = |reason| RbdError::Location { text: text.to_owned(), reason };
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| wrong("it does not begin with rbd:"))?;
        let mut parts = split(rest).ok_or_else(|| wrong("it ends in a backslash"))?.into_iter();
        let name = parts.next().unwrap_or_default();
        let mut this = Self::named(&name).map_err(wrong)?;
        for option in parts {
            let (key, value) = option.split_once('=').ok_or_else(|| wrong("an option has no value"))?;
            if value.is_empty() || value.chars().any(char::is_control) {
                return Err(wrong("an option's value is empty or holds control characters"));
            }
            let slot = match key {
                "id" => &mut this.user,
                "mon_host" => &mut this.monitors,
                "conf" => &mut this.conf,
                "key" | "keyring" => return Err(wrong("keys and keyrings are named in agent.toml only")),
                _ => return Err(wrong("only the options id, mon_host and conf are understood")),
            };
            *slot = Some(value.to_owned());
        }
        if this.conf.as_ref().is_some_and(|conf| !conf.starts_with('/')) {
            return Err(wrong("conf is not an absolute path"));
        }
        Ok(this)
    }

    /// By the name a definition has for it: `pool/image` or `pool/namespace/image`.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn named(name: &str) -> Result<Self, &'static str> {
        let parts: Vec<&str> = name.split('/').collect();
        let (pool, namespace, image) = match parts[..] {
            [pool, image] => (pool, None, image),
            [pool, namespace, image] => (pool, Some(namespace), image),
            _ => return Err("it is not POOL/IMAGE or POOL/NAMESPACE/IMAGE"),
        };
        for part in [Some(pool), namespace, Some(image)].into_iter().flatten() {
            if part.is_empty() || part.len() > MAX_NAME {
                return Err("a name in it is empty or too long");
            }
            if part.contains('@') {
                return Err("it names a snapshot");
            }
            if part.chars().any(char::is_control) {
                return Err("it holds control characters");
            }
        }
        Ok(Self {
            pool: pool.to_owned(),
            namespace: namespace.map(str::to_owned),
            image: image.to_owned(),
            user: None,
            monitors: None,
            conf: None,
        })
    }

    /// Another image beside this one.
    pub fn beside(&self, image: &str) -> Self {
        Self { image: image.to_owned(), ..self.clone() }
    }

    /// The same without a user.
    pub fn anonymous(&self) -> Self {
        Self { user: None, ..self.clone() }
    }

    /// Pool and image, as definitions and `rbd` have them.
    pub fn name(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{}/{namespace}/{}", self.pool, self.image),
            None => format!("{}/{}", self.pool, self.image),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", escaped(&self.name()))?;
        for (key, value) in [("id", &self.user), ("mon_host", &self.monitors), ("conf", &self.conf)] {
            if let Some(value) = value {
                write!(f, ":{key}={}", escaped(value))?;
            }
        }
        Ok(())
    }
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, ':' | '=' | '@' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// The parts between colons, without backslashes. `None` if it ends in one.
fn split(text: &str) -> Option<Vec<String>> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        let last = parts.last_mut()?;
        match c {
            ':' => parts.push(String::new()),
            '\\' => last.push(chars.next()?),
            c => last.push(c),
        }
    }
    Some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn location_is_read_as_qemu_reads_it_and_written_so() {
        let text = r"rbd:vms/web01:id=libvirt:mon_host=10.0.0.1\:6789,[\:\:1]\:6789:conf=/etc/ceph/b.conf";
        let location = Location::parse(text).unwrap();
        assert_eq!((location.pool.as_str(), location.image.as_str()), ("vms", "web01"));
        assert_eq!(location.user.as_deref(), Some("libvirt"));
        assert_eq!(location.monitors.as_deref(), Some("10.0.0.1:6789,[::1]:6789"));
        assert_eq!(location.conf.as_deref(), Some("/etc/ceph/b.conf"));
        assert_eq!(location.to_string(), text);
        assert_eq!(location.beside("web02").name(), "vms/web02");
        let odd = Location { image: r"a:b=c\d".into(), ..Location::named("p/n/x").unwrap() };
        assert_eq!(Location::parse(&odd.to_string()).unwrap(), odd);
        assert_eq!(odd.namespace.as_deref(), Some("n"));
    }

    #[test]
    fn what_is_no_image_is_refused_with_the_reason() {
        for (bad, why) in [
            ("/x.img", "begin"),
            ("rbd:pool", "POOL/IMAGE"),
            ("rbd:a/b/c/d", "POOL/IMAGE"),
            ("rbd:/x", "empty"),
            ("rbd:p/x@snap", "snapshot"),
            ("rbd:p/x\n", "control"),
            ("rbd:p/x:id", "no value"),
            ("rbd:p/x:id=", "empty"),
            ("rbd:p/x:key=AQ==", "agent.toml"),
            ("rbd:p/x:keyring=/k", "agent.toml"),
            ("rbd:p/x:rbd_cache=true", "understood"),
            ("rbd:p/x:conf=b.conf", "absolute"),
            ("rbd:p/x\\", "backslash"),
        ] {
            let error = Location::parse(bad).unwrap_err();
            assert!(
                matches!(&error, RbdError::Location { reason, .. } if reason.contains(why)),
                "{bad}: {error}"
            );
        }
        assert!(Location::of_path(Path::new("/x")).is_none());
    }
}
