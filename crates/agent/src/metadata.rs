//! Our element in a domain's `<metadata>`: [`VmMetadata`] in, XML out, and back. Format:
//! `docs/formats/domain-metadata.md`.
//!
//! Shape is checked here and nothing else: whether a record in it verifies, and is the newest, is asked elsewhere.
//! Attributes and elements it does not know are passed over, so that an older agent reads what a newer one wrote.

use std::collections::HashSet;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use vmseal_model::{
    class::{Chosen, ClassChoice, DiskClass},
    metadata::{Aside, DiskMetadata, NAMESPACE, PREFIX, SharedMemory, VmMetadata},
    record::MAX_RECORD_LEN,
    state::InnerFormat,
};

use crate::{
    rbd::Location,
    xml::{Element, XmlError},
};

/// Most disks of one domain that are read.
pub const MAX_DISKS: usize = 1024;
/// Most parts of one disk that are read as set aside, and most bytes of one.
const MAX_ASIDE: usize = 64;
const MAX_ASIDE_BYTES: usize = 4096;
/// Most characters that are read of why a disk has its class.
const MAX_WHY: usize = 500;

/// The element as `virDomainSetMetadata` wants it: without prefix and namespace, which libvirt puts in itself and
/// refuses to find there already.
pub fn metadata_element(metadata: &VmMetadata) -> String {
    to_element(metadata, "").to_xml()
}

/// The element as it stands in a domain's definition, with its namespace.
pub(crate) fn qualified_element(metadata: &VmMetadata) -> Element {
    let mut element = to_element(metadata, &format!("{PREFIX}:"));
    element.attributes.insert(0, (format!("xmlns:{PREFIX}"), NAMESPACE.to_owned()));
    element
}

fn to_element(metadata: &VmMetadata, prefix: &str) -> Element {
    let named = |name: &str| Element::new(&format!("{prefix}{name}"));
    let mut vm =
        named("vm").with("id", &metadata.vm.to_string()).with("domain", &metadata.domain.to_string());
    if metadata.memory != SharedMemory::default() {
        let parts = [("source", metadata.memory.source), ("access", metadata.memory.access)];
        let ours: Vec<_> = parts.iter().filter(|(_, ours)| *ours).map(|(name, _)| *name).collect();
        vm.set("memory", &ours.join(" "));
    }
    for disk in &metadata.disks {
        let mut element = named("disk")
            .with("target", &disk.target)
            .with("id", &disk.disk.to_string())
            .with("source", &disk.source);
        if let Some(header) = &disk.header {
            element.set("header", header);
        }
        element.set("format", disk.format.as_str());
        element.set("class", disk.class.as_str());
        if let Some(chosen) = &disk.chosen {
            element.set("asked", chosen.asked.as_str());
            element.set("why", &chosen.why);
        }
        for (part, value) in &disk.aside {
            let mut aside = named("aside").with("of", part);
            if !value.is_empty() {
                aside.children.push(crate::xml::Node::Text(value.clone()));
            }
            element = element.with_child(aside);
        }
        let mut record = named("record");
        record.children.push(crate::xml::Node::Text(STANDARD.encode(&disk.record)));
        vm = vm.with_child(element.with_child(record));
    }
    vm
}

/// Reads the element; `ancestors` from the document's root down.
pub(crate) fn from_element(vm: &Element, ancestors: &[&Element]) -> Result<VmMetadata, XmlError> {
    let memory = vm.get("memory").unwrap_or_default();
    let memory = |part: &str| memory.split_ascii_whitespace().any(|word| word == part);
    let mut metadata = VmMetadata {
        vm: id(vm, "id", "the VM")?,
        domain: id(vm, "domain", "the VM")?,
        memory: SharedMemory { source: memory("source"), access: memory("access") },
        disks: Vec::new(),
    };
    let mut scope = ancestors.to_vec();
    scope.push(vm);
    let mut seen = HashSet::new();
    for element in ours(vm, &scope, "disk") {
        if metadata.disks.len() == MAX_DISKS {
            return Err(damaged(format!("more than {MAX_DISKS} disks")));
        }
        let disk = disk(element, &scope)?;
        if !seen.insert(disk.target.clone()) || metadata.disks.iter().any(|d| d.disk == disk.disk) {
            return Err(damaged(format!("disk {} is named twice", disk.target)));
        }
        metadata.disks.push(disk);
    }
    Ok(metadata)
}

fn disk(element: &Element, scope: &[&Element]) -> Result<DiskMetadata, XmlError> {
    let target = text(element, "target", "a disk")?.to_owned();
    if !is_target(&target) {
        return Err(damaged(format!("'{}' is no target", shortened(&target))));
    }
    let about = format!("disk {target}");
    let format = text(element, "format", &about)?;
    let class = text(element, "class", &about)?;
    let mut scope = scope.to_vec();
    scope.push(element);
    let record: Vec<u8> = match ours(element, &scope, "record").next() {
        Some(record) => decode_record(&record.text(), &target)?,
        None => return Err(damaged(format!("{about} has no record"))),
    };
    Ok(DiskMetadata {
        disk: id(element, "id", &about)?,
        source: path(element, "source", &about)?.to_owned(),
        header: match element.get("header") {
            Some(_) => Some(path(element, "header", &about)?.to_owned()),
            None => None,
        },
        format: InnerFormat::from_libvirt(format)
            .ok_or_else(|| damaged(format!("{about} has the format '{}'", shortened(format))))?,
        class: DiskClass::from_word(class).ok_or_else(|| {
            damaged(format!("{about} has the class '{}', which this version does not know", shortened(class)))
        })?,
        chosen: chosen(element),
        aside: aside(element, &scope, &about)?,
        target,
        record,
    })
}

/// For people only, so what is not understood is not there.
fn chosen(element: &Element) -> Option<Chosen> {
    let asked = ClassChoice::from_word(element.get("asked").filter(|word| !word.is_empty())?)?;
    let why = element.get("why").unwrap_or_default().chars().take(MAX_WHY).collect();
    Some(Chosen { asked, why })
}

fn decode_record(text: &str, target: &str) -> Result<Vec<u8>, XmlError> {
    let packed: String = text.split_ascii_whitespace().collect();
    let bad = |reason: &str| damaged(format!("the record of disk {target} {reason}"));
    if packed.len() > MAX_RECORD_LEN.div_ceil(3) * 4 {
        return Err(bad("is too long"));
    }
    let record = STANDARD.decode(packed).map_err(|_| bad("is not base64"))?;
    if record.is_empty() || record.len() > MAX_RECORD_LEN {
        return Err(bad("is empty or too long"));
    }
    Ok(record)
}

/// Whether this is a target device name: letters and digits; it becomes the name of a socket.
pub fn is_target(text: &str) -> bool {
    (1..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

fn aside(element: &Element, scope: &[&Element], about: &str) -> Result<Aside, XmlError> {
    let mut aside = Aside::new();
    for part in ours(element, scope, "aside") {
        let (name, value) = (text(part, "of", about)?, part.text());
        if aside.len() == MAX_ASIDE || name.len() + value.len() > MAX_ASIDE_BYTES {
            return Err(damaged(format!("more is set aside of {about} than a disk has")));
        }
        aside.insert(name.to_owned(), value);
    }
    Ok(aside)
}

/// Child elements of our namespace by that name.
fn ours<'a>(
    parent: &'a Element,
    scope: &'a [&'a Element],
    local: &'static str,
) -> impl Iterator<Item = &'a Element> {
    parent.elements().filter(move |e| e.local_name() == local && e.namespace(scope) == Some(NAMESPACE))
}

fn text<'a>(element: &'a Element, attribute: &str, about: &str) -> Result<&'a str, XmlError> {
    element.get(attribute).ok_or_else(|| damaged(format!("{about} has no '{attribute}'")))
}

fn path<'a>(element: &'a Element, attribute: &str, about: &str) -> Result<&'a str, XmlError> {
    let path = text(element, attribute, about)?;
    let image = attribute == "source" && Location::parse(path).is_ok();
    if path.starts_with('/') || image {
        Ok(path)
    } else {
        Err(damaged(format!("{about}: '{attribute}' is neither an absolute path nor an RBD image")))
    }
}

fn id<T: std::str::FromStr>(element: &Element, attribute: &str, about: &str) -> Result<T, XmlError> {
    text(element, attribute, about)?
        .parse()
        .map_err(|_| damaged(format!("'{attribute}' of {about} is not an id")))
}

fn shortened(text: &str) -> String {
    text.escape_debug().take(40).collect()
}

fn damaged(reason: String) -> XmlError {
    XmlError::Metadata { reason }
}
