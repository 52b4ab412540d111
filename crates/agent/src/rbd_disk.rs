//! An RBD image as a disk's source in a definition, the way out of it and the way back.
//!
//! A `<disk>` element in, changed. Monitors, user and the name of libvirt's secret are set aside as they stand, to be put
//! back when the disk is decrypted; the secret itself is libvirt's and is never asked for.

use vmseal_model::metadata::Aside;

use crate::{
    fast_disk::replace_source,
    rbd::Location,
    xml::{Document, Element, Node},
};

/// What is set aside: the whole source, and an `<auth>` that stood beside it.
const SOURCE: &str = "rbd.source";
const AUTH: &str = "rbd.auth";

/// What of a source is put back.
const CHILDREN: [&str; 3] = ["auth", "config", "host"];

/// The image a disk is on; why it is none that can be told by a name.
pub(crate) fn location(disk: &Element, source: &Element) -> Result<Location, &'static str> {
    if source.child("snapshot").is_some() {
        return Err("it names a snapshot");
    }
    let mut location = Location::named(source.get("name").unwrap_or_default())?;
    let auth = source.child("auth").or_else(|| disk.child("auth"));
    location.user = auth.and_then(|auth| auth.get("username")).map(str::to_owned);
    location.conf = source.child("config").and_then(|config| config.get("file")).map(str::to_owned);
    let host = |host: &Element| {
        let name = host.get("name").filter(|name| !name.is_empty())?;
        let name =
            if name.contains(':') && !name.starts_with('[') { format!("[{name}]") } else { name.to_owned() };
        Some(host.get("port").map_or_else(|| name.clone(), |port| format!("{name}:{port}")))
    };
    let hosts: Vec<String> = source.elements().filter(|e| e.name == "host").filter_map(host).collect();
    location.monitors = (!hosts.is_empty()).then(|| hosts.join(","));
    Ok(location)
}

/// Takes what belongs to an image out of a disk that is on one, to be set aside; what is set aside of one of ours stays.
pub(crate) fn enter(disk: &mut Element, known: &Aside) -> Aside {
    let source = disk.child("source").filter(|source| source.get("protocol") == Some("rbd"));
    let Some(source) = source.map(Element::to_xml) else {
        let ours = |(part, _): &(&String, &String)| [SOURCE, AUTH].contains(&part.as_str());
        return known.iter().filter(ours).map(|(part, value)| (part.clone(), value.clone())).collect();
    };
    let mut aside = Aside::from([(SOURCE.to_owned(), source)]);
    if let Some(index) = disk.position("auth") {
        aside.extend(disk.child("auth").map(|auth| (AUTH.to_owned(), auth.to_xml())));
        disk.remove_child(index);
    }
    aside
}

/// Puts a disk on an image, with what was set aside.
pub(crate) fn leave(disk: &mut Element, location: &Location, aside: &Aside) {
    disk.set("type", "network");
    let known = read(aside, SOURCE, "source").map(|mut source| {
        source.attributes.clear();
        source
            .children
            .retain(|node| matches!(node, Node::Element(e) if CHILDREN.contains(&e.name.as_str())));
        source
    });
    let mut source = known.unwrap_or_else(|| source_of(location));
    source.set("protocol", "rbd");
    source.set("name", &location.name());
    replace_source(disk, source);
    if let Some(auth) = read(aside, AUTH, "auth").filter(|_| disk.child("auth").is_none()) {
        let at = disk.position("source").unwrap_or(disk.children.len());
        disk.children.insert(at, Node::Element(auth));
    }
}

/// Metadata may hold anything; only an element of that name is put back.
fn read(aside: &Aside, part: &str, name: &str) -> Option<Element> {
    Some(Document::parse(aside.get(part)?).ok()?.root).filter(|element| element.name == name)
}

/// A source as far as a location says it.
fn source_of(location: &Location) -> Element {
    let mut source = Element::new("source");
    for monitor in location.monitors.iter().flat_map(|monitors| monitors.split(',')) {
        let (name, port) = match monitor.rsplit_once(':') {
            Some((name, port)) if port.chars().all(|c| c.is_ascii_digit()) => (name, Some(port)),
            _ => (monitor, None),
        };
        let mut host = Element::new("host").with("name", name.trim_matches(['[', ']']));
        if let Some(port) = port {
            host.set("port", port);
        }
        source.children.push(Node::Element(host));
    }
    if let Some(conf) = &location.conf {
        source.children.push(Node::Element(Element::new("config").with("file", conf)));
    }
    source
}
