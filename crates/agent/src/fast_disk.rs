//! The form of a `fast` disk in a definition, the way into it and the way back.
//!
//! A `<disk>` element in, changed; what libvirt refuses on a vhost-user disk is set aside, to be put back with another
//! class. What would change for the guest or the administrator by being left out is an obstacle instead, in words.
//! What libvirt refuses was tried with 11.3; it knows no domain but the disk.

use vmseal_model::{control::MAX_QUEUES, metadata::Aside};

use crate::xml::{Element, Node};

/// Between two tries of QEMU's to reach a worker that went away, in seconds. It tries for ever.
const RECONNECT_SECONDS: &str = "1";
/// Queues of a disk for which nobody said how many: more cost memory and threads of the worker, and bring little.
const QUEUES: u32 = 4;
/// What `<driver>` says to QEMU's block layer, through which a vhost-user disk does not go.
const BLOCK_LAYER: [&str; 8] =
    ["cache", "copy_on_read", "detect_zeroes", "discard", "discard_no_unref", "io", "ioeventfd", "iothread"];
/// Elements a vhost-user disk may have. The chain and the authentication are of the old source.
const ALLOWED: [&str; 10] =
    ["acpi", "address", "alias", "auth", "backingStore", "boot", "driver", "mirror", "source", "target"];

/// Whether a disk has that form.
pub(crate) fn is_fast(disk: &Element) -> bool {
    disk.get("type") == Some("vhostuser")
}

/// What keeps a disk from being fast.
pub(crate) fn obstacle(disk: &Element) -> Option<String> {
    let bus = disk.child("target").and_then(|target| target.get("bus")).unwrap_or("unnamed");
    if bus != "virtio" {
        return Some(format!("its bus is {bus}, and a fast disk is a virtio disk"));
    }
    let refused = |element: &&Element| element.name != "serial" && !ALLOWED.contains(&element.name.as_str());
    if let Some(element) = disk.elements().find(refused) {
        let why = match element.name.as_str() {
            "readonly" | "shareable" | "transient" => "libvirt refuses that of a fast disk",
            "iotune" | "throttlefilters" => "QEMU cannot throttle what it does not see",
            _ => "libvirt refuses that on a fast disk",
        };
        return Some(format!("its definition has <{}>: {why}", element.name));
    }
    let driver = disk.child("driver")?;
    if driver.get("iommu") == Some("on") {
        return Some("its driver says iommu='on', which a fast disk cannot have".to_owned());
    }
    let inside = driver.elements().next()?;
    Some(format!("its driver has <{}>, which a fast disk cannot have", inside.name))
}

/// Gives a disk that form and that socket, with a queue for each of so many CPUs; what was set aside for it. One that is
/// fast already keeps what is set aside of it.
pub(crate) fn enter(disk: &mut Element, socket: &str, cpus: u32, known: Aside) -> Aside {
    let source = Element::new("source")
        .with("type", "unix")
        .with("path", socket)
        .with_child(Element::new("reconnect").with("enabled", "yes").with("timeout", RECONNECT_SECONDS));
    if is_fast(disk) {
        replace_source(disk, source);
        return known;
    }
    let mut aside = Aside::new();
    let mut keep = |part: &str, value: &str| aside.insert(part.to_owned(), value.to_owned());
    disk.set("type", "vhostuser");
    // libvirt puts it there itself if nobody else does.
    keep("snapshot", disk.get("snapshot").unwrap_or_default());
    disk.set("snapshot", "no");
    if let Some(index) = disk.position("serial") {
        if let Some(serial) = disk.child("serial") {
            keep("serial", &serial.text());
        }
        disk.remove_child(index);
    }
    let driver = driver(disk);
    driver.set("type", "raw");
    for part in BLOCK_LAYER {
        if let Some(value) = driver.get(part) {
            keep(&format!("driver.{part}"), value);
        }
        driver.unset(part);
    }
    // An encrypted disk's are ours. A clear one's own go with every class, and libvirt's come back.
    driver.unset("error_policy");
    driver.unset("rerror_policy");
    // Without it QEMU asks for one queue a CPU, and does not start if the worker has fewer.
    let queues = driver.get("queues").map(|text| text.parse().unwrap_or(u32::MAX));
    if queues.is_none_or(|queues| queues > u32::from(MAX_QUEUES)) {
        keep("driver.queues", driver.get("queues").unwrap_or_default());
        driver.set("queues", &cpus.clamp(1, QUEUES).to_string());
    }
    replace_source(disk, source);
    aside
}

/// Puts back what was set aside. Type and source are the caller's to change.
pub(crate) fn leave(disk: &mut Element, aside: &Aside) {
    for (part, value) in aside {
        match (part.as_str(), part.strip_prefix("driver.")) {
            ("serial", _) if disk.child("serial").is_none() => {
                let mut serial = Element::new("serial");
                serial.children.push(Node::Text(value.clone()));
                let at = disk.position("target").map_or(disk.children.len(), |index| index + 1);
                disk.children.insert(at, Node::Element(serial));
            }
            ("snapshot", _) if disk.get("snapshot") == Some("no") => put(disk, "snapshot", value),
            (_, Some(attribute)) if is_attribute(attribute) => put(driver(disk), attribute, value),
            // What a newer version set aside, or somebody else has put there since.
            _ => {}
        }
    }
}

/// Metadata may hold anything; only what [`enter`] sets aside is put back.
fn is_attribute(name: &str) -> bool {
    name == "queues" || BLOCK_LAYER.contains(&name)
}

fn put(element: &mut Element, attribute: &str, value: &str) {
    if value.is_empty() {
        element.unset(attribute);
    } else {
        element.set(attribute, value);
    }
}

/// The `<driver>` of a disk, made if there is none.
pub(crate) fn driver(disk: &mut Element) -> &mut Element {
    if disk.child("driver").is_none() {
        disk.children.insert(0, Node::Element(Element::new("driver").with("name", "qemu")));
    }
    let driver = disk.child_mut("driver").expect("put there above");
    if driver.get("name").is_none() {
        driver.attributes.insert(0, ("name".to_owned(), "qemu".to_owned()));
    }
    driver
}

/// The backing store belongs to the source: it was the chain of the old one, and libvirt finds out again.
pub(crate) fn replace_source(disk: &mut Element, source: Element) {
    for gone in ["backingStore", "mirror"] {
        while let Some(index) = disk.position(gone) {
            disk.remove_child(index);
        }
    }
    match disk.position("source") {
        Some(index) => disk.children[index] = Node::Element(source),
        None => {
            let at = disk.position("target").unwrap_or(disk.children.len());
            disk.children.insert(at, Node::Element(source));
        }
    }
}
