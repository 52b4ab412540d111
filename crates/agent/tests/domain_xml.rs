//! Real definitions: what libvirt and virt-install write comes out as it went in, but for what we change.

use vmseal_agent::{
    domain_xml::{DiskDevice, DiskSource, DiskView, DomainXml, EncryptedSource, metadata_element},
    xml::{Document, Element, MAX_BYTES, MAX_DEPTH, Node, XmlError},
};
use vmseal_model::{
    class::{Chosen, ClassChoice, DiskClass},
    id::{DiskId, DomainUuid, VmId},
    metadata::{Aside, DiskMetadata, SharedMemory, VmMetadata},
    state::InnerFormat,
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
        class: DiskClass::Compatible,
    }
}

fn fast_source() -> EncryptedSource {
    EncryptedSource { format: InnerFormat::Raw, class: DiskClass::Fast, ..source() }
}

fn metadata() -> VmMetadata {
    let disk = |n: u8, header: Option<&str>| DiskMetadata {
        target: format!("vd{}", char::from(b'a' + n)),
        disk: DiskId::from_bytes([n; 16]),
        source: "/x/web'01 & <more>.img.vmseal".to_owned(),
        header: header.map(str::to_owned),
        format: if n == 0 { InnerFormat::Raw } else { InnerFormat::Qcow2 },
        class: DiskClass::Compatible,
        chosen: None,
        aside: Aside::new(),
        record: (0..=255).cycle().skip(n.into()).take(400).collect(),
    };
    VmMetadata {
        vm: VmId::from_bytes([7; 16]),
        domain: DomainUuid::from_bytes([8; 16]),
        memory: SharedMemory::default(),
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
    let DiskSource::Rbd(image) = &of("vdc").source else { panic!("{:?}", of("vdc").source) };
    assert_eq!(image.to_string(), r"rbd:pool/img:mon_host=mon1\:6789");
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
    xml.clear_disk("sda", source().disk, "/var/lib/libvirt/images/data.img", InnerFormat::Raw).unwrap();
    let mut disk = disk_element(&xml, "sda");
    let driver = disk.child_mut("driver").unwrap();
    assert_eq!((driver.get("cache"), driver.get("discard")), (Some("none"), Some("unmap")));
    driver.unset("cache");
    driver.unset("discard");
    assert_eq!(disk, disk_element(&before, "sda"));
    assert_eq!(rest(&xml), rest(&before));
}

#[test]
fn rbd_disk_comes_back_with_its_monitors_and_the_name_of_its_secret() {
    let secret = "<secret type='ceph' uuid='b35eba3b-8f69-4e26-a2b6-0b1c9a5d8a11'/>";
    let auth = format!("<auth username='libvirt'>{secret}</auth>");
    let hosts = "<host name='10.0.0.1' port='6789'/><host name='::1'/><config file='/etc/ceph/b.conf'/>";
    for (beside, within) in [(auth.as_str(), ""), ("", auth.as_str())] {
        let text = format!(
            "<domain><name>a</name><uuid>5f1c2b0e-8f0a-4f0e-9d55-0a4c2f2c7a11</uuid><vcpu>1</vcpu><devices>\
             <disk type='network' device='disk'><driver name='qemu' type='raw'/>{beside}<source protocol='rbd' \
             name='vms/web01'>{hosts}{within}</source><target dev='vda' bus='virtio'/></disk></devices></domain>"
        );
        let before = DomainXml::parse(&text).unwrap();
        let DiskSource::Rbd(image) = before.disks().remove(0).source else { panic!("{text}") };
        assert_eq!(
            image.to_string(),
            r"rbd:vms/web01:id=libvirt:mon_host=10.0.0.1\:6789,[\:\:1]:conf=/etc/ceph/b.conf"
        );
        let mut xml = before.clone();
        // Through both classes, as `disk set --class` does it.
        use DiskClass::{Compatible, Fast, Ublk};
        for class in [Compatible, Fast, Ublk, Compatible, Ublk, Fast] {
            let aside = xml.encrypt_disk("vda", &EncryptedSource { class, ..fast_source() }).unwrap();
            let shown = xml.to_xml();
            assert!(!shown[shown.find("<disk").unwrap()..].contains("auth"), "{shown}");
            let (vm, domain) = (VmId::from_bytes([1; 16]), before.uuid().unwrap());
            let disk = DiskMetadata {
                target: "vda".into(),
                source: image.beside("web01.vmseal").to_string(),
                header: None,
                format: InnerFormat::Raw,
                class,
                aside,
                disk: source().disk,
                ..metadata().disks.remove(0)
            };
            xml.set_disks(vm, domain, vec![disk]).unwrap();
            xml = DomainXml::parse(&xml.to_xml()).unwrap();
            assert!(xml.metadata().unwrap().is_some());
        }
        xml.clear_disk("vda", source().disk, &image.to_string(), InnerFormat::Raw).unwrap();
        xml.set_disks(VmId::from_bytes([1; 16]), before.uuid().unwrap(), Vec::new()).unwrap();
        assert_eq!(xml.disks(), before.disks());
        for part in [secret, hosts] {
            assert!(xml.to_xml().contains(part), "{}", xml.to_xml());
        }
    }
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
    assert_eq!(
        xml.clear_disk("", source().disk, "/x", InnerFormat::Raw),
        Err(XmlError::NoDisk { target: "".into() })
    );
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
        read.clear_disk(target, source().disk, "/x/web'01 & more.img", InnerFormat::Raw).unwrap();
        read.remove_metadata();
        let cleared = through_libvirt(&read, &dir);
        assert_eq!(cleared.disk(target).unwrap().source, DiskSource::File("/x/web'01 & more.img".into()));
        assert!(!cleared.has_metadata());
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

/// A disk as an administrator may have tuned it, and one without a word.
const TUNED: &str = "<domain type='test'>
  <name>tuned</name>
  <uuid>5f1c2b0e-8f0a-4f0e-9d55-0a4c2f2c7a12</uuid>
  <memory unit='KiB'>131072</memory>
  <vcpu>6</vcpu>
  <iothreads>1</iothreads>
  <os><type>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='writeback' io='threads' discard='unmap' detect_zeroes='on' iothread='1' queue_size='256' packed='on'/>
      <source file='/x/a.img'/>
      <target dev='vda' bus='virtio'/>
      <serial>VS-vda</serial>
      <boot order='1'/>
      <alias name='ua-root'/>
    </disk>
    <disk type='file' device='disk' snapshot='external'>
      <driver name='qemu' type='raw'/>
      <source file='/x/b.img'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
  </devices>
</domain>";

fn attributes(element: &Element) -> Vec<String> {
    let mut all: Vec<_> = element.attributes.iter().map(|(name, value)| format!("{name}={value}")).collect();
    all.sort();
    all
}

/// Puts a disk's class into definition and metadata, as a task does.
fn id_of(target: &str) -> DiskId {
    DiskId::from_bytes([target.as_bytes()[2]; 16])
}

fn set_class(xml: &mut DomainXml, target: &str, class: DiskClass) {
    let mut disks = xml.metadata().unwrap().map(|m| m.disks).unwrap_or_default();
    let id = id_of(target);
    let aside = xml.encrypt_disk(target, &EncryptedSource { class, disk: id, ..fast_source() }).unwrap();
    disks.retain(|disk| disk.disk != id);
    let target = target.to_owned();
    disks.push(DiskMetadata { target, disk: id, class, aside, ..metadata().disks[0].clone() });
    xml.set_disks(metadata().vm, metadata().domain, disks).unwrap();
}

#[test]
fn libvirt_takes_fast_disks_and_all_that_was_set_aside_comes_back() {
    let dir = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("libvirt-fast");
    std::fs::create_dir_all(&dir).unwrap();
    let plain = through_libvirt(&DomainXml::parse(TUNED).unwrap(), &dir);
    let mut xml = plain.clone();
    set_class(&mut xml, "vda", DiskClass::Fast);
    set_class(&mut xml, "vdb", DiskClass::Fast);
    xml.add_encrypted_disk("vdc", &fast_source()).unwrap();
    let mut fast = through_libvirt(&xml, &dir);
    for target in ["vda", "vdb", "vdc"] {
        let source = DiskSource::VhostUser { socket: fast_source().socket };
        assert_eq!(fast.disk(target).unwrap().source, source);
        let reconnect =
            disk_element(&fast, target).child("source").unwrap().child("reconnect").unwrap().clone();
        assert_eq!(attributes(&reconnect), ["enabled=yes", "timeout=1"]);
    }
    let driver = |xml: &DomainXml, target| attributes(disk_element(xml, target).child("driver").unwrap());
    assert_eq!(driver(&fast, "vda"), ["name=qemu", "packed=on", "queue_size=256", "queues=4", "type=raw"]);
    for kept in ["target", "boot", "alias"] {
        assert_eq!(disk_element(&fast, "vda").child(kept), disk_element(&plain, "vda").child(kept), "{kept}");
    }
    assert!(fast.to_xml().contains("<access mode='shared'/>"));
    let aside = fast.metadata().unwrap().unwrap().disks[0].aside.clone();
    assert_eq!(aside.get("serial").map(String::as_str), Some("VS-vda"));

    // A fast disk that is put there again loses nothing.
    set_class(&mut fast, "vda", DiskClass::Fast);
    assert_eq!(
        fast.metadata().unwrap().unwrap().disks.iter().find(|d| d.target == "vda").unwrap().aside,
        aside
    );

    // Nor does one whose target somebody changed: what was set aside is the disk's, not the name's.
    let renamed = fast.to_xml().replace("<target dev='vda'", "<target dev='vdz'");
    let mut renamed = DomainXml::parse(&renamed).unwrap();
    renamed.clear_disk("vdz", id_of("vda"), "/x/a.img", InnerFormat::Raw).unwrap();
    assert_eq!(disk_element(&renamed, "vdz").child("serial"), disk_element(&plain, "vda").child("serial"));

    let mut compatible = fast.clone();
    set_class(&mut compatible, "vda", DiskClass::Compatible);
    assert!(compatible.to_xml().contains("<access mode='shared'/>"), "the other one is fast still");
    set_class(&mut compatible, "vdb", DiskClass::Compatible);
    let compatible = through_libvirt(&compatible, &dir);
    let disk = disk_element(&compatible, "vda");
    assert_eq!(disk.get("snapshot"), None);
    assert_eq!(disk.child("serial"), disk_element(&plain, "vda").child("serial"));
    assert_eq!(disk_element(&compatible, "vdb").get("snapshot"), Some("external"));
    let tuned = driver(&compatible, "vda");
    for part in ["cache=writeback", "detect_zeroes=on", "iothread=1", "error_policy=stop"] {
        assert!(tuned.iter().any(|p| p == part), "{part} in {tuned:?}");
    }
    assert!(!tuned.iter().any(|part| part.starts_with("queues")), "{tuned:?}");

    // Straight to clear, all is as it was.
    fast.clear_disk("vda", id_of("vda"), "/x/a.img", InnerFormat::Raw).unwrap();
    fast.clear_disk("vdb", id_of("vdb"), "/x/b.img", InnerFormat::Raw).unwrap();
    fast.set_disks(metadata().vm, metadata().domain, Vec::new()).unwrap();
    let shared = fast.to_xml().contains("<access mode='shared'/>");
    assert!(shared, "vdc, which nobody told of, works in the guest's memory");
    for target in ["vda", "vdb"] {
        let (now, before) = (disk_element(&fast, target), disk_element(&plain, target));
        assert_eq!(attributes(&now), attributes(&before));
        assert_eq!(driver(&fast, target), driver(&plain, target));
        for child in ["source", "target", "serial", "boot", "alias"] {
            assert_eq!(now.child(child), before.child(child), "{target} {child}");
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn libvirt_takes_block_devices_and_all_that_was_set_aside_comes_back() {
    let dir = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("libvirt-ublk");
    std::fs::create_dir_all(&dir).unwrap();
    let plain = through_libvirt(&DomainXml::parse(TUNED).unwrap(), &dir);
    let mut xml = plain.clone();
    set_class(&mut xml, "vda", DiskClass::Ublk);
    set_class(&mut xml, "vdb", DiskClass::Ublk);
    xml.add_encrypted_disk("sda", &EncryptedSource { class: DiskClass::Ublk, ..source() }).unwrap();
    let mut ublk = through_libvirt(&xml, &dir);
    let driver = |xml: &DomainXml, target| attributes(disk_element(xml, target).child("driver").unwrap());
    for (target, id) in [("vda", id_of("vda")), ("vdb", id_of("vdb")), ("sda", source().disk)] {
        let device = format!("/dev/vmseal/{id}");
        assert_eq!(ublk.disk(target).unwrap().source, DiskSource::Block(device), "{target}");
        for part in ["cache=none", "io=io_uring", "discard=unmap", "error_policy=stop", "rerror_policy=stop"]
        {
            assert!(driver(&ublk, target).iter().any(|p| p == part), "{part} in {:?}", driver(&ublk, target));
        }
    }
    assert_eq!(ublk.disk("sda").unwrap().format.as_deref(), Some("qcow2"));
    for part in ["detect_zeroes=on", "iothread=1", "packed=on", "queue_size=256"] {
        assert!(driver(&ublk, "vda").iter().any(|p| p == part), "what is not in the way stays: {part}");
    }
    for kept in ["target", "boot", "alias", "serial"] {
        assert_eq!(disk_element(&ublk, "vda").child(kept), disk_element(&plain, "vda").child(kept), "{kept}");
    }
    assert!(!ublk.to_xml().contains("memoryBacking"));
    let aside = |xml: &DomainXml, target: &str| {
        let disks = xml.metadata().unwrap().unwrap().disks;
        disks.into_iter().find(|disk| disk.target == target).unwrap().aside
    };
    let set_aside = aside(&ublk, "vda");
    set_class(&mut ublk, "vda", DiskClass::Ublk);
    assert_eq!(aside(&ublk, "vda"), set_aside, "one that is put there again loses nothing");

    // By every way there is, and straight to clear, all is as it was.
    for way in [&[][..], &[DiskClass::Fast], &[DiskClass::Fast, DiskClass::Ublk], &[DiskClass::Compatible]] {
        let mut clear = ublk.clone();
        for class in way {
            set_class(&mut clear, "vda", *class);
            set_class(&mut clear, "vdb", *class);
            clear = through_libvirt(&clear, &dir);
        }
        clear.clear_disk("vda", id_of("vda"), "/x/a.img", InnerFormat::Raw).unwrap();
        clear.clear_disk("vdb", id_of("vdb"), "/x/b.img", InnerFormat::Raw).unwrap();
        for target in ["vda", "vdb"] {
            let (now, before) = (disk_element(&clear, target), disk_element(&plain, target));
            assert_eq!(attributes(&now), attributes(&before), "{way:?}");
            // What a network disk cannot have is lost by that class, and what it puts there stays.
            if !way.contains(&DiskClass::Compatible) {
                assert_eq!(driver(&clear, target), driver(&plain, target), "{way:?}");
            }
            for child in ["source", "target", "serial", "boot", "alias"] {
                assert_eq!(now.child(child), before.child(child), "{target} {child} {way:?}");
            }
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn metadata_says_how_a_class_came_about_and_reads_on_where_that_is_not_understood() {
    let mut written = metadata();
    let why = "hosts <a>, 'b' & \"c\" have no ublk".to_owned();
    written.disks[0].chosen = Some(Chosen { asked: ClassChoice::Auto, why });
    let mut xml = DomainXml::parse(SAMPLES[1]).unwrap();
    xml.set_metadata(&written);
    assert_eq!(DomainXml::parse(&xml.to_xml()).unwrap().metadata().unwrap(), Some(written.clone()));
    let newer =
        xml.to_xml().replace("asked=\"auto\"", "asked=\"warp\"").replace("asked='auto'", "asked='warp'");
    written.disks[0].chosen = None;
    assert_eq!(DomainXml::parse(&newer).unwrap().metadata().unwrap(), Some(written));
}

#[test]
fn metadata_of_a_fast_disk_reads_back_with_what_was_set_aside() {
    let mut written = metadata();
    written.memory = SharedMemory { source: true, access: false };
    written.disks[0].class = DiskClass::Fast;
    written.disks[0].aside = [("serial", "a <b> & 'c'"), ("snapshot", ""), ("driver.io", "native")]
        .map(|(k, v)| (k.into(), v.into()))
        .into();
    let mut xml = DomainXml::parse(SAMPLES[1]).unwrap();
    xml.set_metadata(&written);
    assert_eq!(DomainXml::parse(&xml.to_xml()).unwrap().metadata().unwrap(), Some(written));
    // What is set aside is bounded, whoever wrote it.
    let many = "<vmseal:aside of='x'/>".replace("'x'", "'driver.y'");
    let text = xml.to_xml().replacen("<vmseal:record>", &format!("{}<vmseal:record>", many.repeat(65)), 1);
    assert!(DomainXml::parse(&text).unwrap().metadata().is_ok(), "the same part again is one part");
    let many: String = (0..65).map(|n| format!("<vmseal:aside of='{n}'/>")).collect();
    let text = xml.to_xml().replacen("<vmseal:record>", &format!("{many}<vmseal:record>"), 1);
    assert!(DomainXml::parse(&text).unwrap().metadata().unwrap_err().to_string().contains("set aside"));
}

#[test]
fn aside_that_somebody_made_up_puts_nothing_into_a_disk() {
    let mut xml = DomainXml::parse(TUNED).unwrap();
    set_class(&mut xml, "vdb", DiskClass::Fast);
    let mut forged = xml.metadata().unwrap().unwrap();
    forged.disks[0].aside =
        [("driver.type", "qcow2"), ("driver.name", "x"), ("source", "/etc/shadow"), ("driver.x", "1")]
            .map(|(k, v)| (k.into(), v.into()))
            .into();
    xml.set_metadata(&forged);
    set_class(&mut xml, "vdb", DiskClass::Compatible);
    let driver = disk_element(&xml, "vdb").child("driver").unwrap().clone();
    assert_eq!((driver.get("type"), driver.get("name"), driver.get("x")), (Some("raw"), Some("qemu"), None));
    assert!(!xml.to_xml().contains("/etc/shadow"));
}
