//! `<memoryBacking>` of a domain: a vhost-user back end works in the guest's memory, so that must be shared.
//!
//! A domain element in, changed; which parts are ours is told and given back, so that they go again and what an
//! administrator had there stays. What he says against it is an obstacle, in words.

use vmseal_model::metadata::SharedMemory;

use crate::xml::{Element, Node};

/// What the domain says against its memory being shared.
pub(crate) fn obstacle(domain: &Element) -> Option<String> {
    let backing = domain.child("memoryBacking");
    let part = |name: &str, attribute: &str| backing?.child(name)?.get(attribute);
    if let Some(mode) = part("access", "mode").filter(|mode| *mode != "shared") {
        return Some(format!(
            "the VM's <memoryBacking> says access='{mode}', and a fast disk needs shared memory"
        ));
    }
    if part("source", "type") == Some("anonymous") {
        return Some("the VM's <memoryBacking> says source='anonymous', which cannot be shared".to_owned());
    }
    let numa = domain.child("cpu").and_then(|cpu| cpu.child("numa"));
    let cells = numa.into_iter().flat_map(Element::elements);
    if cells.into_iter().any(|cell| cell.get("memAccess") == Some("private")) {
        return Some(
            "a NUMA cell of the VM says memAccess='private', and a fast disk needs shared memory".to_owned(),
        );
    }
    let devices = domain.child("devices").into_iter().flat_map(Element::elements);
    let mut modules = devices.filter(|device| device.name == "memory");
    modules.any(|module| module.get("access") == Some("private")).then(|| {
        "a memory device of the VM says access='private', and a fast disk needs shared memory".to_owned()
    })
}

/// Has the memory shared; the parts that were put there for it.
pub(crate) fn share(domain: &mut Element) -> SharedMemory {
    if domain.child("memoryBacking").is_none() {
        let after = ["currentMemory", "memory", "maxMemory", "uuid", "name"];
        let at = after.iter().find_map(|name| domain.position(name)).map_or(0, |index| index + 1);
        domain.children.insert(at, Node::Element(Element::new("memoryBacking")));
        domain.children.insert(at, Node::Text("\n  ".to_owned()));
    }
    let backing = domain.child_mut("memoryBacking").expect("put there above");
    // Huge pages are files already.
    let source = backing.child("source").is_none() && backing.child("hugepages").is_none();
    let access = backing.child("access").is_none();
    if source {
        backing.append(Element::new("source").with("type", "memfd"));
    }
    if access {
        backing.append(Element::new("access").with("mode", "shared"));
    }
    SharedMemory { source, access }
}

/// Takes out what was put there, unless something else in the domain needs it by now or it was changed since.
pub(crate) fn unshare(domain: &mut Element, ours: SharedMemory) {
    if ours == SharedMemory::default() || is_needed(domain) {
        return;
    }
    let Some(backing) = domain.child_mut("memoryBacking") else { return };
    for (ours, name, attribute, value) in
        [(ours.source, "source", "type", "memfd"), (ours.access, "access", "mode", "shared")]
    {
        let as_put = |element: &Element| {
            element.attributes.len() == 1
                && element.get(attribute) == Some(value)
                && element.elements().next().is_none()
        };
        if ours
            && let Some(index) = backing.position(name)
            && backing.child(name).is_some_and(as_put)
        {
            backing.remove_child(index);
        }
    }
    if backing.elements().next().is_none()
        && backing.attributes.is_empty()
        && let Some(index) = domain.position("memoryBacking")
    {
        domain.remove_child(index);
    }
}

/// Whether a device works in the guest's memory from another process: virtiofs, vhost-user of any kind.
fn is_needed(domain: &Element) -> bool {
    let devices = domain.child("devices").into_iter().flat_map(Element::elements);
    devices.into_iter().any(|device| {
        let driver = device.child("driver");
        device.get("type") == Some("vhostuser")
            || driver.is_some_and(|d| d.get("type") == Some("virtiofs") || d.get("name") == Some("vhostuser"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::Document;

    fn domain(backing: &str, devices: &str) -> Element {
        let xml =
            format!("<domain><name>a</name><memory>1</memory>{backing}<devices>{devices}</devices></domain>");
        Document::parse(&xml).unwrap().root
    }

    const OURS: &str = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";

    #[test]
    fn what_was_put_there_goes_and_what_was_there_stays() {
        for (before, ours, shared) in [
            ("", (true, true), OURS),
            (
                "<memoryBacking><locked/></memoryBacking>",
                (true, true),
                "<memoryBacking><locked/><source type='memfd'/><access mode='shared'/></memoryBacking>",
            ),
            (
                "<memoryBacking><hugepages/></memoryBacking>",
                (false, true),
                "<memoryBacking><hugepages/><access mode='shared'/></memoryBacking>",
            ),
            (
                "<memoryBacking><source type='file'/></memoryBacking>",
                (false, true),
                "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>",
            ),
            (OURS, (false, false), OURS),
        ] {
            let mut domain = domain(before, "");
            let unchanged = domain.clone();
            assert_eq!(obstacle(&domain), None);
            let put = share(&mut domain);
            assert_eq!((put.source, put.access), ours, "{before}");
            assert_eq!(domain.child("memoryBacking").unwrap().to_xml(), shared);
            assert_eq!(share(&mut domain), SharedMemory::default(), "again puts nothing");
            unshare(&mut domain, put);
            assert_eq!(domain, unchanged, "{before}");
        }
    }

    #[test]
    fn memory_stays_shared_while_something_else_needs_it_or_somebody_changed_it() {
        let ours = SharedMemory { source: true, access: true };
        for device in [
            "<filesystem type='mount'><driver type='virtiofs'/></filesystem>",
            "<interface type='vhostuser'/>",
            "<disk type='vhostuser'/>",
            "<video><driver name='vhostuser'/></video>",
        ] {
            let mut domain = domain(OURS, device);
            unshare(&mut domain, ours);
            assert!(domain.child("memoryBacking").is_some(), "{device}");
        }
        let mut domain =
            domain("<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>", "");
        unshare(&mut domain, ours);
        let left = domain.child("memoryBacking").unwrap().to_xml();
        assert_eq!(left, "<memoryBacking><source type='file'/></memoryBacking>");
    }

    #[test]
    fn word_against_it_is_an_obstacle() {
        for (backing, devices, word) in [
            ("<memoryBacking><access mode='private'/></memoryBacking>", "", "access='private'"),
            ("<memoryBacking><source type='anonymous'/></memoryBacking>", "", "anonymous"),
            ("<cpu><numa><cell id='0' memAccess='private'/></numa></cpu>", "", "NUMA"),
            ("", "<memory model='dimm' access='private'/>", "memory device"),
        ] {
            let why = obstacle(&domain(backing, devices)).expect(backing);
            assert!(why.contains(word), "{why}");
        }
    }
}
