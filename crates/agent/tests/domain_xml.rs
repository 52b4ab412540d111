//! Real definitions: what libvirt and virt-install write comes out as it went in, but for what we change.

use vmseal_agent::{
    domain_xml::{DiskDevice, DiskSource, DiskView, DomainXml, EncryptedSource, metadata_element},
    xml::{Document, Element, MAX_BYTES, MAX_DEPTH, Node, XmlError},
};
use vmseal_model::{
    id::{DiskId, DomainUuid, VmId},
    metadata::{DiskMetadata, VmMetadata},
    state::{DiskClass, InnerFormat},
};

const FULL: &str = include_str!("data/libvirt-full.xml");
const SAMPLES: [&str; 4] = [
    FULL,
    include_str!("data/virt-install-plain.xml"),
    include_str!("data/virt-install-rich.xml"),
    include_str!("data/virt-install-new.xml"),
];

fn source() -> EncryptedSource {
    EncryptedSource {
        disk: DiskId::from_bytes([0xd1; 16]),
        format: InnerFormat::Qcow2,
        socket: "/run/vmseal/libvirt-x/vda.sock".to_owned(),
    }
}

fn metadata() -> VmMetadata {
    let disk = |n: u8, header: Option<&str>| DiskMetadata {
        target: format!("vd{}", char::from(b'a' + n)),
        disk: DiskId::from_bytes([n; 16]),
        source: "/x/web'01 & <more>.img.vmseal".to_owned(),
        header: header.map(str::to_owned),
        format: if n == 0 { InnerFormat::Raw } else { InnerFormat::Qcow2 },
        class: DiskClass::Compatible,
        record: (0..=255).cycle().skip(n.into()).take(400).collect(),
    };
    VmMetadata {
        vm: VmId::from_bytes([7; 16]),
        domain: DomainUuid::from_bytes([8; 16]),
        disks: vec![disk(0, None), disk(1, Some("/x/h.luks"))],
    }
}

/// All of a tree but the disks and the metadata.
fn rest(xml: &DomainXml) -> Element {
    let mut root = Document::parse(&xml.to_xml()).unwrap().root;
    root.children.retain(|n| matches!(n, Node::Element(e) if e.name != "metadata"));
    root.child_mut("devices").unwrap().children.retain(|n| matches!(n, Node::Element(e) if e.name != "disk"));
    root
}

fn disk_element(xml: &DomainXml, target: &str) -> Element {
    let root = Document::parse(&xml.to_xml()).unwrap().root;
    let is = |e: &&Element| e.child("target").is_some_and(|t| t.get("dev") == Some(target));
    root.child("devices").unwrap().elements().filter(|e| e.name == "disk").find(is).unwrap().clone()
}

#[test]
fn samples_come_out_as_they_went_in() {
    for sample in SAMPLES {
        let first = Document::parse(sample).unwrap();
        let text = first.to_xml();
        assert_eq!(Document::parse(&text).unwrap(), first);
        // Whoever writes like us gets the very bytes back.
        assert_eq!(Document::parse(&text).unwrap().to_xml(), text);
    }
    // libvirt writes text as we do, and quotes attributes as we do: only the white space of an attribute and
    // quotation marks within are free to differ.
    let plain = |s: &str| s.replace('"', "'");
    assert_eq!(plain(&Document::parse(FULL).unwrap().to_xml()), plain(FULL));
}

#[test]
fn domain_is_read() {
    let xml = DomainXml::parse(FULL).unwrap();
    assert_eq!(xml.name(), Some("web01"));
    assert_eq!(xml.uuid(), Some("5f1c2b0e-8f0a-4f0e-9d55-0a4c2f2c7a11".parse().unwrap()));
    assert!(xml.has_tpm() && xml.has_nvram());
    assert_eq!(xml.metadata(), Ok(None));
    let plain = DomainXml::parse(SAMPLES[1]).unwrap();
    assert!(!plain.has_tpm() && !plain.has_nvram());
    assert!(DomainXml::parse(SAMPLES[2]).unwrap().has_tpm());

    let disks = xml.disks();
    let of = |target: &str| disks.iter().find(|d| d.target == target).unwrap();
    assert_eq!(
        of("vda"),
        &DiskView {
            target: "vda".into(),
            device: DiskDevice::Disk,
            source: DiskSource::File("/var/lib/libvirt/images/web'01 & more.qcow2".into()),
            format: Some("qcow2".into()),
            read_only: false,
            shareable: false,
            backing: false,
            transient: false,
            encryption: false,
            special: None,
        }
    );
    assert!(of("sda").read_only);
    assert_eq!(of("vdb").source, DiskSource::Block("/dev/vg/lv".into()));
    assert!(of("vdb").shareable);
    assert_eq!(of("vdc").source, DiskSource::Other("network rbd".into()));
    assert!(of("vdd").backing && of("vdd").transient && of("vdd").encryption);
    assert_eq!(of("sdb").device, DiskDevice::Lun);
    assert_eq!((of("sdc").device, &of("sdc").source), (DiskDevice::Cdrom, &DiskSource::None));
}

#[test]
fn encrypted_disk_has_our_form_and_keeps_what_is_the_guests() {
    let mut xml = DomainXml::parse(FULL).unwrap();
    let before = xml.clone();
    xml.encrypt_disk("vda", &source()).unwrap();
    let disk = disk_element(&xml, "vda");
    let old = disk_element(&before, "vda");
    assert_eq!(
        (disk.get("type"), disk.get("device"), disk.get("snapshot")),
        (Some("network"), Some("disk"), Some("no"))
    );
    let driver: Vec<_> =
        disk.child("driver").unwrap().attributes.iter().map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!(
        driver,
        [
            "name=qemu",
            "type=qcow2",
            "cache=writeback",
            "discard=unmap",
            "detect_zeroes=unmap",
            "iothread=1",
            "queues=2",
            "error_policy=stop",
            "rerror_policy=stop"
        ]
    );
    assert_eq!(
        disk.child("source").unwrap().to_xml(),
        "<source protocol='nbd' name='d1d1d1d1-d1d1-d1d1-d1d1-d1d1d1d1d1d1'><host transport='unix' \
         socket='/run/vmseal/libvirt-x/vda.sock'/><reconnect delay='600'/></source>"
    );
    for kept in ["target", "iotune", "serial", "boot", "alias", "address"] {
        assert_eq!(disk.child(kept), old.child(kept), "{kept}");
    }
    assert!(disk.child("backingStore").is_none());
    assert_eq!(rest(&xml), rest(&before));
    for other in ["sda", "vdb", "vdc", "vdd", "sdb", "sdc"] {
        assert_eq!(disk_element(&xml, other), disk_element(&before, other));
    }
    assert_eq!(
        xml.disk("vda").unwrap().source,
        DiskSource::NbdUnix {
            socket: source().socket,
            export: "d1d1d1d1-d1d1-d1d1-d1d1-d1d1d1d1d1d1".into()
        }
    );
}

#[test]
fn cleared_disk_is_as_before_but_for_what_only_held_there() {
    let mut xml = DomainXml::parse(FULL).unwrap();
    let before = xml.clone();
    xml.encrypt_disk("sda", &EncryptedSource { format: InnerFormat::Raw, ..source() }).unwrap();
    xml.clear_disk("sda", "/var/lib/libvirt/images/data.img", InnerFormat::Raw).unwrap();
    let mut disk = disk_element(&xml, "sda");
    let driver = disk.child_mut("driver").unwrap();
    assert_eq!((driver.get("cache"), driver.get("discard")), (Some("none"), Some("unmap")));
    driver.unset("cache");
    driver.unset("discard");
    assert_eq!(disk, disk_element(&before, "sda"));
    assert_eq!(rest(&xml), rest(&before));
}

#[test]
fn disk_without_driver_gets_one() {
    let mut xml = DomainXml::parse(SAMPLES[1]).unwrap();
    xml.encrypt_disk("hda", &source()).unwrap();
    assert_eq!(disk_element(&xml, "hda").child("driver").unwrap().get("name"), Some("qemu"));
    let mut rich = DomainXml::parse(SAMPLES[2]).unwrap();
    rich.encrypt_disk("sda", &source()).unwrap();
    let driver = disk_element(&rich, "sda").child("driver").unwrap().clone();
    assert_eq!(
        (driver.get("name"), driver.get("cache"), driver.get("io")),
        (Some("qemu"), Some("writeback"), None)
    );
}

#[test]
fn missing_disk_is_named() {
    let mut xml = DomainXml::parse(FULL).unwrap();
    assert_eq!(xml.encrypt_disk("vdz", &source()), Err(XmlError::NoDisk { target: "vdz".into() }));
    assert_eq!(xml.clear_disk("", "/x", InnerFormat::Raw), Err(XmlError::NoDisk { target: "".into() }));
}

#[test]
fn added_disk_follows_the_others() {
    for sample in SAMPLES {
        let mut xml = DomainXml::parse(sample).unwrap();
        let (before, count) = (xml.clone(), xml.disks().len());
        xml.add_encrypted_disk("vdx", &source()).unwrap();
        assert_eq!(xml.disks().len(), count + 1);
        assert_eq!(xml.disks()[count].target, "vdx");
        assert_eq!(disk_element(&xml, "vdx").child("target").unwrap().get("bus"), Some("virtio"));
        assert_eq!(rest(&xml), rest(&before));
        assert!(matches!(xml.add_encrypted_disk("vdx", &source()), Err(XmlError::DiskExists { .. })));
    }
    let mut xml = DomainXml::parse(FULL).unwrap();
    xml.add_encrypted_disk("sdz", &source()).unwrap();
    assert_eq!(disk_element(&xml, "sdz").child("target").unwrap().get("bus"), Some("scsi"));
}

#[test]
fn metadata_reads_back_and_foreign_metadata_stays() {
    for sample in SAMPLES {
        let before = DomainXml::parse(sample).unwrap();
        let mut xml = before.clone();
        xml.set_metadata(&metadata());
        let mut read = DomainXml::parse(&xml.to_xml()).unwrap();
        assert_eq!(read.metadata().unwrap().unwrap(), metadata());
        assert_eq!(rest(&read), rest(&before));
        let once = read.to_xml();
        read.set_metadata(&metadata());
        assert_eq!(read.to_xml(), once);
        read.remove_metadata();
        assert!(!read.has_metadata());
        assert_eq!(read.to_xml(), before.to_xml());
    }
    let mut xml = DomainXml::parse(FULL).unwrap();
    xml.set_metadata(&metadata());
    assert!(xml.to_xml().contains("cockpit_machines:has_install_phase"));
}

#[test]
fn metadata_is_found_by_namespace_not_by_prefix() {
    let inner = metadata_element(&metadata());
    let with = |attributes: &str, element: &str| {
        format!("<domain{attributes}><name>x</name><metadata>{element}</metadata><devices/></domain>")
    };
    let default = inner.replacen("<vm ", "<vm xmlns='urn:vmseal:domain:1' ", 1);
    assert_eq!(DomainXml::parse(&with("", &default)).unwrap().metadata().unwrap(), Some(metadata()));
    let other = inner.replace("</", "</q:").replace("<", "<q:").replace("<q:/q:", "</q:");
    let xml = with(" xmlns:q='urn:vmseal:domain:1'", &other);
    assert_eq!(DomainXml::parse(&xml).unwrap().metadata().unwrap(), Some(metadata()));
    let foreign = inner.replacen("<vm ", "<vm xmlns='urn:somebody:else' ", 1);
    assert_eq!(DomainXml::parse(&with("", &foreign)).unwrap().metadata().unwrap(), None);
    // What libvirt's API is given has no namespace: libvirt adds it and refuses one that is there.
    assert!(!inner.contains("xmlns") && inner.starts_with("<vm id="));
}

#[test]
fn damaged_metadata_is_an_error_that_names_the_defect() {
    let mut xml = DomainXml::parse(SAMPLES[1]).unwrap();
    xml.set_metadata(&metadata());
    let good = xml.to_xml();
    let vm = metadata().vm.to_string();
    let long = format!("<vmseal:record>{}", "A".repeat(30_000));
    let cases = [
        (vm.as_str(), "nonsense", "'id' of the VM"),
        ("format='raw'", "format='vmdk'", "format 'vmdk'"),
        ("class='compatible'", "class='warp'", "class 'warp'"),
        ("target='vdb'", "target='vda'", "named twice"),
        ("target='vda'", "target='../vda'", "no target"),
        ("source='/x/", "source='x/", "absolute"),
        ("<vmseal:record>", "<vmseal:record>!", "base64"),
        ("<vmseal:record>", &long, "too long"),
        ("vmseal:record>", "vmseal:other>", "no record"),
        (" source='", " origin='", "no 'source'"),
    ];
    for (from, to, expected) in cases {
        let bad = good.replace(from, to);
        assert_ne!(bad, good, "{from}");
        let text = DomainXml::parse(&bad).unwrap().metadata().unwrap_err().to_string();
        assert!(text.contains(expected), "{text} for {to}");
    }
    let unknown = good.replace("class='compatible'", "class='compatible' newer='1'");
    assert_eq!(DomainXml::parse(&unknown).unwrap().metadata().unwrap(), Some(metadata()));
}

#[test]
fn text_and_attributes_survive_every_character() {
    let nasty = "a<b>&\"'\t\n\r ]]> ä\u{1f512} &amp; &#10;";
    let mut element = Element::new("x").with("a", nasty);
    element.children.push(Node::Text(nasty.to_owned()));
    element.children.push(Node::CData("<raw>&".to_owned()));
    element.children.push(Node::Comment(" c ".to_owned()));
    element.children.push(Node::Instruction("pi some thing".to_owned()));
    let read = Document::parse(&element.to_xml()).unwrap().root;
    assert_eq!(read, element);
}

#[test]
fn hostile_documents_are_refused() {
    let parse = |text: &str| Document::parse(text).unwrap_err();
    assert!(matches!(parse("<!DOCTYPE d [<!ENTITY a 'b'>]><d>&a;</d>"), XmlError::DocumentType));
    assert!(matches!(parse("<d>&a;</d>"), XmlError::Malformed { .. }));
    assert!(matches!(parse("<d a='&a;'/>"), XmlError::Malformed { .. }));
    assert!(matches!(parse("<d>&#1;</d>"), XmlError::Malformed { .. }));
    assert!(matches!(parse("<d a='1' a='2'/>"), XmlError::Malformed { .. }));
    assert!(matches!(parse("<d><e></d></e>"), XmlError::Malformed { .. }));
    assert!(matches!(parse("<d>"), XmlError::Malformed { .. }));
    assert!(matches!(parse("<d/>text"), XmlError::Malformed { .. }));
    assert!(matches!(parse(""), XmlError::Empty));
    assert!(matches!(parse(" <!-- c --> "), XmlError::Empty));
    assert!(matches!(parse(&"<d>".repeat(MAX_DEPTH + 1)), XmlError::TooDeep));
    assert!(matches!(parse(&" ".repeat(MAX_BYTES + 1)), XmlError::TooLong { .. }));
    assert!(matches!(parse("<d<e/>"), XmlError::Malformed { .. }));
    assert!(matches!(DomainXml::parse("<network/>"), Err(XmlError::Root { .. })));
    let two = include_str!("data/virt-install-two-steps.xml");
    assert!(DomainXml::parse(two).unwrap_err().to_string().contains("--print-step"));
}

/// The text through libvirt itself: its parser, its writer, its schema.
fn through_libvirt(xml: &DomainXml, dir: &std::path::Path) -> DomainXml {
    let file = dir.join("domain.xml");
    std::fs::write(&file, xml.to_xml()).unwrap();
    let valid = std::process::Command::new("virt-xml-validate").arg(&file).arg("domain").output();
    let valid = valid.expect("libvirt-clients is installed");
    assert!(valid.status.success(), "{}", String::from_utf8_lossy(&valid.stderr));
    let script = format!("define {}; dumpxml {} --inactive", file.display(), xml.name().unwrap());
    let shown =
        std::process::Command::new("virsh").args(["-q", "-c", "test:///default", &script]).output().unwrap();
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
    let text = String::from_utf8(shown.stdout).unwrap();
    let text = text.find("<domain").map(|at| text[at..].trim()).unwrap_or(&text);
    DomainXml::parse(text).unwrap()
}

#[test]
fn libvirt_takes_what_we_write_and_gives_it_back() {
    let dir = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("libvirt-round-trip");
    std::fs::create_dir_all(&dir).unwrap();
    for (sample, target) in [(SAMPLES[1], "hda"), (SAMPLES[2], "sda"), (SAMPLES[3], "hda")] {
        let mut xml = DomainXml::parse(sample).unwrap();
        xml.encrypt_disk(target, &source()).unwrap();
        xml.add_encrypted_disk("vdx", &source()).unwrap();
        xml.set_metadata(&metadata());
        let mut read = through_libvirt(&xml, &dir);
        assert_eq!(read.metadata().unwrap(), Some(metadata()));
        for target in [target, "vdx"] {
            let disk = read.disk(target).unwrap();
            let export = source().disk.to_string();
            assert_eq!(disk.source, DiskSource::NbdUnix { socket: source().socket, export });
            let element = disk_element(&read, target);
            assert_eq!(
                element.child("source").unwrap().child("reconnect").unwrap().get("delay"),
                Some("600")
            );
            let driver = element.child("driver").unwrap();
            assert_eq!(
                (driver.get("error_policy"), driver.get("rerror_policy")),
                (Some("stop"), Some("stop"))
            );
        }
        read.clear_disk(target, "/x/web'01 & more.img", InnerFormat::Raw).unwrap();
        read.remove_metadata();
        let cleared = through_libvirt(&read, &dir);
        assert_eq!(cleared.disk(target).unwrap().source, DiskSource::File("/x/web'01 & more.img".into()));
        assert!(!cleared.has_metadata());
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
