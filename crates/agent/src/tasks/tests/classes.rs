//! Classes of disks: encrypted and made as `fast`, changed while the VM is off, refused where they cannot be.

use vmseal_model::{
    class::{ClassChoice, DiskClass, GroupCapabilities},
    id::{DomainUuid, TaskId},
    refusal::Code,
    state::{InnerFormat, VmState},
    task::{SetClassStep, SourceFate, TaskState},
};

use super::lab::*;
use crate::{
    adopt::adopt,
    config::AgentConfig,
    domain_xml::{DiskSource, DomainXml},
    ports::{Definition, Hypervisor, TaskReport},
    start::plan::{Plan, plan},
    tasks::command::{TaskCommand, Work},
};

const OTHER: TaskId = TaskId::from_bytes([9; 16]);
/// A disk with all that has to be set aside, and memory with something of its owner's.
const DISK: &str = "<driver name='qemu' type='raw' cache='writeback' iothread='1' queues='2'/>";
const REST: &str = "<serial>VS-vda</serial><boot order='1'/>";

fn config() -> AgentConfig {
    AgentConfig { run_dir: "/run/vmseal".into(), ..AgentConfig::default() }
}

/// A VM that is off, with one raw disk that says more than most.
fn clear() -> Lab {
    let lab = Lab::new();
    let raw = lab.raw_image("a.img", 200_000);
    lab.define(&[("vda", &raw, "raw")]);
    lab.libvirt.change(DOMAIN, |_, xml| {
        *xml = xml
            .replace("<driver name='qemu' type='raw'/>", DISK)
            .replace("bus='virtio'/>", &format!("bus='virtio'/>{REST}"))
            .replace("<devices>", "<memoryBacking><locked/></memoryBacking><devices>");
    });
    lab
}

fn encrypted(class: ClassChoice) -> Lab {
    let mut lab = clear();
    let report = lab.run_as(OTHER, encrypt_as(class));
    assert_eq!(report.state, TaskState::Succeeded, "{report:?}");
    lab
}

fn set(class: ClassChoice) -> Work {
    Work::SetDisk { domain: DOMAIN, target: "vda".into(), class, hosts: hosts() }
}

/// What every place that names the class says: the definition, its metadata, the store, a start.
fn check_class(lab: &Lab, class: DiskClass) {
    let xml = lab.xml();
    let metadata = xml.metadata().unwrap().unwrap();
    let entry = &metadata.disks[0];
    let socket = format!("/run/vmseal/libvirt-{DOMAIN}/vda.sock");
    let (source, backing) = match class {
        DiskClass::Compatible => (
            DiskSource::NbdUnix { socket, export: entry.disk.to_string() },
            "<memoryBacking><locked/></memoryBacking>",
        ),
        DiskClass::Ublk => (
            DiskSource::Block(format!("/dev/vmseal/{}", entry.disk)),
            "<memoryBacking><locked/></memoryBacking>",
        ),
        DiskClass::Fast => (
            DiskSource::VhostUser { socket },
            "<memoryBacking><locked/><source type='memfd'/><access mode='shared'/></memoryBacking>",
        ),
    };
    assert_eq!(xml.disk("vda").unwrap().source, source);
    assert_eq!((metadata.disks.len(), entry.class), (1, class));
    assert_eq!(lab.store().disk(entry.disk).unwrap().1.class, class);
    let text = xml.to_xml();
    assert!(text.contains(backing), "{text}");
    let planned = start(lab);
    let serial = if class == DiskClass::Fast { "VS-vda" } else { "" };
    assert_eq!((planned.disks[0].class, planned.disks[0].serial.as_str()), (class, serial));
}

fn start(lab: &Lab) -> Plan {
    plan(&lab.xml(), &config(), &lab.store()).unwrap().unwrap()
}

fn succeeded(report: &TaskReport) -> &str {
    assert_eq!(report.state, TaskState::Succeeded, "{report:?}");
    &report.message
}

#[test]
fn disk_is_encrypted_as_fast_and_decrypted_to_what_it_was() {
    let mut lab = clear();
    let before = lab.xml();
    succeeded(&lab.run_as(OTHER, encrypt_as(ClassChoice::Fast)));
    check_class(&lab, DiskClass::Fast);
    succeeded(&lab.run(decrypt(&[], SourceFate::Wipe)));
    assert_eq!(sorted(&lab.xml().to_xml()), sorted(&before.to_xml()));
}

/// The words in the metadata for how the class came about.
fn chosen(lab: &Lab) -> (ClassChoice, String) {
    let chosen = lab.xml().metadata().unwrap().unwrap().disks[0].chosen.clone().unwrap();
    (chosen.asked, chosen.why)
}

#[test]
fn auto_is_compatible_where_there_is_no_ublk_and_says_why() {
    let lab = encrypted(ClassChoice::Auto);
    check_class(&lab, DiskClass::Compatible);
    assert_eq!(chosen(&lab), (ClassChoice::Auto, "its host has no ublk".into()));
    let lab = encrypted(ClassChoice::Fast);
    assert_eq!(chosen(&lab), (ClassChoice::Fast, "it was asked for".into()));
}

#[test]
fn auto_is_compatible_where_another_host_has_no_ublk() {
    let mut lab = clear();
    lab.ublk = true;
    let Work::EncryptVm { domain, targets, key, class, source, .. } = encrypt_as(ClassChoice::Auto) else {
        panic!()
    };
    let hosts = GroupCapabilities { ublk: false, without_ublk: vec!["hv2".into()] };
    succeeded(&lab.run_as(OTHER, Work::EncryptVm { domain, targets, key, class, hosts, source }));
    check_class(&lab, DiskClass::Compatible);
    assert_eq!(chosen(&lab), (ClassChoice::Auto, "host hv2 has no ublk".into()));
}

#[test]
fn disk_is_a_block_device_where_every_host_has_ublk_and_decrypted_to_what_it_was() {
    let mut lab = clear();
    lab.ublk = true;
    let before = lab.xml();
    succeeded(&lab.run_as(OTHER, encrypt_as(ClassChoice::Auto)));
    check_class(&lab, DiskClass::Ublk);
    assert_eq!(chosen(&lab), (ClassChoice::Auto, "every host has ublk".into()));
    succeeded(&lab.run(decrypt(&[], SourceFate::Wipe)));
    assert_eq!(sorted(&lab.xml().to_xml()), sorted(&before.to_xml()));
}

#[test]
fn class_goes_cold_from_each_of_the_three_to_each_other() {
    let mut lab = encrypted(ClassChoice::Compatible);
    lab.ublk = true;
    let compatible = lab.xml();
    let volume = lab.files();
    let way = [
        (ClassChoice::Auto, DiskClass::Ublk),
        (ClassChoice::Fast, DiskClass::Fast),
        (ClassChoice::Auto, DiskClass::Ublk),
        (ClassChoice::Compatible, DiskClass::Compatible),
        (ClassChoice::Fast, DiskClass::Fast),
        (ClassChoice::Compatible, DiskClass::Compatible),
    ];
    for (n, (asked, class)) in way.into_iter().enumerate() {
        let report = lab.run_as(TaskId::from_bytes([80 + n as u8; 16]), set(asked));
        let why = if asked.is_auto() { ": every host has ublk" } else { "" };
        let told = format!("disk vda of web01 is {} from its next start on{why}", class.as_str());
        assert_eq!(succeeded(&report), told);
        check_class(&lab, class);
        assert_eq!(chosen(&lab).0, asked);
        if class == DiskClass::Compatible {
            assert_eq!(settled(&lab.xml()), settled(&compatible));
        }
    }
    assert_eq!(lab.files(), volume, "no volume is touched");
}

#[test]
fn block_device_whose_host_lost_ublk_becomes_compatible_again() {
    let mut lab = clear();
    lab.ublk = true;
    succeeded(&lab.run_as(OTHER, encrypt_as(ClassChoice::Auto)));
    lab.ublk = false;
    let report = lab.run_as(TaskId::from_bytes([90; 16]), set(ClassChoice::Auto));
    assert!(succeeded(&report).ends_with("is compatible from its next start on: its host has no ublk"));
    check_class(&lab, DiskClass::Compatible);
}

#[test]
fn copy_of_a_vm_with_a_block_device_is_refused_until_it_is_adopted() {
    const COPY: DomainUuid = DomainUuid::from_bytes([0xc0; 16]);
    let mut lab = clear();
    lab.ublk = true;
    succeeded(&lab.run_as(OTHER, encrypt_as(ClassChoice::Auto)));
    let xml = lab.libvirt.xml(DOMAIN, Definition::Persistent).unwrap();
    let xml = xml.replace(&format!("<uuid>{DOMAIN}"), &format!("<uuid>{COPY}")).replace(">web01<", ">web02<");
    // With its metadata, and without: the device's name says nothing of a domain, this host's store does.
    let (from, to) = (xml.find("<metadata>").unwrap(), xml.find("</metadata>").unwrap());
    let pasted = format!("{}{}", &xml[..from], &xml[to + "</metadata>".len()..]);
    for copy in [&xml, &pasted] {
        let copy = DomainXml::parse(copy).unwrap();
        assert_eq!(plan(&copy, &config(), &lab.store()).unwrap_err().code, Code::UnknownVm);
    }
    lab.libvirt.put_xml(COPY, "web02", &xml);
    let store = lab.store();
    adopt(&*lab.libvirt, &config(), &store, COPY).unwrap_err();
    lab.libvirt.undefine(DOMAIN);
    adopt(&*lab.libvirt, &config(), &store, COPY).unwrap();
    let copy = DomainXml::parse(&lab.libvirt.xml(COPY, Definition::Persistent).unwrap()).unwrap();
    let planned = plan(&copy, &config(), &store).unwrap().unwrap();
    assert_eq!((planned.domain, planned.disks[0].class), (COPY, DiskClass::Ublk));
    let kept = copy.metadata().unwrap().unwrap().disks.remove(0);
    assert_eq!(kept.aside.get("driver.cache").map(String::as_str), Some("writeback"));
    assert_eq!(kept.chosen.unwrap().why, "every host has ublk");
}

#[test]
fn class_changes_back_and_forth_and_nothing_of_the_owners_is_lost() {
    let mut lab = encrypted(ClassChoice::Compatible);
    let compatible = lab.xml();
    let volume = lab.files();
    for n in 0..2 {
        let report = lab.run_as(TaskId::from_bytes([20 + n; 16]), set(ClassChoice::Fast));
        assert!(
            succeeded(&report).contains("disk vda of web01 is fast from its next start on"),
            "{report:?}"
        );
        check_class(&lab, DiskClass::Fast);
        succeeded(&lab.run_as(TaskId::from_bytes([30 + n; 16]), set(ClassChoice::Auto)));
        check_class(&lab, DiskClass::Compatible);
        assert_eq!(settled(&lab.xml()), settled(&compatible));
    }
    assert_eq!(lab.files(), volume, "no volume is touched");
}

/// All of a definition but how its disk's class came about.
fn settled(xml: &DomainXml) -> Vec<String> {
    let mut xml = xml.clone();
    let mut metadata = xml.metadata().unwrap().unwrap();
    metadata.disks.iter_mut().for_each(|disk| disk.chosen = None);
    xml.set_metadata(&metadata);
    sorted(&xml.to_xml())
}

/// Tags and their attributes, in no order.
fn sorted(xml: &str) -> Vec<String> {
    let mut words: Vec<String> = xml.split(['<', '>', ' ', '\n', '/']).map(str::to_owned).collect();
    words.retain(|word| !word.is_empty());
    words.sort();
    words
}

#[test]
fn disk_that_has_the_class_keeps_it_even_while_its_vm_runs() {
    let mut lab = encrypted(ClassChoice::Fast);
    lab.libvirt.change(DOMAIN, |info, _| info.state = VmState::Running);
    let before = lab.xml();
    let report = lab.run(set(ClassChoice::Fast));
    assert!(succeeded(&report).contains("is fast already"), "{report:?}");
    assert_eq!(lab.xml(), before);
}

#[test]
fn change_goes_on_after_a_crash_at_every_place() {
    let places = {
        let mut lab = encrypted(ClassChoice::Compatible);
        let (listener, places) = listen();
        lab.start(Some(listener)).submit(TaskCommand { task: TASK, work: set(ClassChoice::Fast) });
        lab.runner.as_ref().unwrap().wait();
        let places = places.lock().unwrap().clone();
        for step in SetClassStep::ALL {
            let word = serde_json::to_value(step).unwrap();
            let after = format!("set-disk:{}:after", word.as_str().unwrap());
            assert!(places.contains(&after), "{after} in {places:?}");
        }
        places
    };
    for (n, place) in places.iter().enumerate() {
        let mut lab = encrypted(ClassChoice::Compatible);
        lab.start(Some(crash_at(n))).submit(TaskCommand { task: TASK, work: set(ClassChoice::Fast) });
        lab.runner.as_ref().unwrap().wait();
        // A start in between believes the definition, whatever the store says by then.
        let class = match lab.xml().disk("vda").unwrap().source {
            DiskSource::VhostUser { .. } => DiskClass::Fast,
            _ => DiskClass::Compatible,
        };
        assert_eq!(start(&lab).disks[0].class, class, "{place}");
        let end = lab.resume();
        assert_eq!(end.state, TaskState::Succeeded, "{place}: {end:?}");
        check_class(&lab, DiskClass::Fast);
    }
}

#[test]
fn change_whose_define_is_refused_or_lost_ends_as_it_should() {
    for (trouble, state, class) in [
        (Trouble::Refuses, TaskState::Failed, DiskClass::Compatible),
        (Trouble::LostBefore, TaskState::Succeeded, DiskClass::Fast),
        (Trouble::LostAfter, TaskState::Succeeded, DiskClass::Fast),
    ] {
        let mut lab = encrypted(ClassChoice::Compatible);
        lab.libvirt.defines.lock().unwrap().push_back(trouble);
        let report = lab.run(set(ClassChoice::Fast));
        assert_eq!(report.state, state, "{trouble:?}: {report:?}");
        check_class(&lab, class);
    }
}

#[test]
fn empty_disk_is_made_fast() {
    let mut lab = encrypted(ClassChoice::Compatible);
    let create = |target: &str, format, class| Work::CreateDisk {
        domain: DOMAIN,
        target: target.into(),
        path: lab.image("data.vol").to_str().unwrap().into(),
        format,
        bytes: 100_000,
        key: key(),
        class,
        hosts: hosts(),
    };
    let (work, sata) = (
        create("vdb", InnerFormat::Raw, ClassChoice::Fast),
        create("sdb", InnerFormat::Raw, ClassChoice::Fast),
    );
    let qcow2 = create("vdb", InnerFormat::Qcow2, ClassChoice::Fast);
    for (n, (work, word)) in [(sata, "virtio"), (qcow2, "qcow2")].into_iter().enumerate() {
        let report = lab.run_as(TaskId::from_bytes([40 + n as u8; 16]), work);
        assert_eq!(report.code, Some(Code::UnsupportedDisk), "{report:?}");
        assert!(report.message.contains(word), "{report:?}");
    }
    succeeded(&lab.run(work));
    let classes: Vec<_> = start(&lab).disks.iter().map(|disk| (disk.target.clone(), disk.class)).collect();
    assert_eq!(classes, [("vda".into(), DiskClass::Compatible), ("vdb".into(), DiskClass::Fast)]);
    // The memory stays shared until the last fast disk is gone.
    succeeded(&lab.run_as(TaskId::from_bytes([50; 16]), set(ClassChoice::Fast)));
    succeeded(&lab.run_as(TaskId::from_bytes([51; 16]), set(ClassChoice::Compatible)));
    assert!(lab.xml().to_xml().contains("mode='shared'"));
    succeeded(&lab.run_as(TaskId::from_bytes([52; 16]), decrypt(&["vdb"], SourceFate::Wipe)));
    check_class(&lab, DiskClass::Compatible);
}

#[test]
fn vm_is_made_with_fast_disks() {
    let mut lab = Lab::new();
    let path = lab.image("new.img");
    let xml = format!(
        "<domain type='kvm'><name>new</name><uuid>{DOMAIN}</uuid><vcpu>2</vcpu><devices><disk type='file' device='disk'>\
         <source file='{}'/><target dev='vda' bus='virtio'/></disk></devices></domain>",
        path.display()
    );
    let sizes = [("vda".to_owned(), 100_000)].into();
    succeeded(&lab.run(Work::CreateVm { xml, key: key(), class: ClassChoice::Fast, hosts: hosts(), sizes }));
    assert_eq!(start(&lab).disks[0].class, DiskClass::Fast);
    let text = lab.xml().to_xml();
    assert!(text.contains("<driver name='qemu' type='raw' queues='2'/>"), "{text}");
}

#[test]
fn disk_that_cannot_be_fast_is_refused_with_the_reason_and_the_way_out() {
    let cases: [(&str, &str, &str); 7] = [
        ("bus='virtio'", "bus='sata'", "bus is sata"),
        (REST, "<iotune><total_iops_sec>5</total_iops_sec></iotune>", "<iotune>"),
        (REST, "<readonly/>", "<readonly>"),
        (REST, "<blockio logical_block_size='4096'/>", "<blockio>"),
        ("iothread='1'", "iommu='on'", "iommu"),
        ("<locked/>", "<access mode='private'/>", "access='private'"),
        ("<locked/>", "<source type='anonymous'/>", "anonymous"),
    ];
    for (from, to, word) in cases {
        let mut lab = clear();
        lab.libvirt.change(DOMAIN, |_, xml| *xml = xml.replace(from, to));
        let before = (lab.files(), lab.xml());
        let report = lab.run(encrypt_as(ClassChoice::Fast));
        assert_eq!(
            (report.state, report.code),
            (TaskState::Failed, Some(Code::UnsupportedDisk)),
            "{report:?}"
        );
        assert!(report.message.contains(word) && report.hint.contains("virsh edit web01"), "{report:?}");
        assert_eq!((lab.files(), lab.xml()), before);

        // The same of one that is encrypted already; as compatible it can be.
        succeeded(&lab.run_as(OTHER, encrypt_as(ClassChoice::Compatible)));
        let report = lab.run_as(TaskId::from_bytes([8; 16]), set(ClassChoice::Fast));
        assert_eq!(report.code, Some(Code::UnsupportedDisk), "{report:?}");
        assert!(report.message.contains(word), "{report:?}");
    }
    let mut lab = Lab::new();
    let qcow2 = lab.qcow2_image("b.qcow2");
    lab.define(&[("vda", &qcow2, "qcow2")]);
    let report = lab.run(encrypt_as(ClassChoice::Fast));
    assert_eq!(report.code, Some(Code::UnsupportedDisk));
    assert!(report.message.contains("qcow2") && report.hint.contains("convert -O raw"), "{report:?}");
}

#[test]
fn change_is_refused_while_the_vm_runs_or_something_would_bring_the_old_class_back() {
    let refused = |prepare: &dyn Fn(&Lab), code: Code, hint: &str| {
        let mut lab = encrypted(ClassChoice::Compatible);
        prepare(&lab);
        let before = (lab.xml(), lab.store().vms());
        let report = lab.run(set(ClassChoice::Fast));
        assert_eq!((report.state, report.code), (TaskState::Failed, Some(code)), "{report:?}");
        assert!(report.hint.contains(hint), "{report:?}");
        assert_eq!((lab.xml(), lab.store().vms()), before);
        report.message
    };
    let run = |lab: &Lab| lab.libvirt.change(DOMAIN, |info, _| info.state = VmState::Running);
    let message = refused(&run, Code::VmRunning, "virsh shutdown web01; then do this again");
    assert!(message.contains("libvirt fixes a disk's class when its VM starts"), "{message}");
    let saved = |lab: &Lab| lab.libvirt.saved.store(true, std::sync::atomic::Ordering::Release);
    refused(&saved, Code::VmHasSavedImage, "managedsave-remove");
    refused(&|lab: &Lab| *lab.libvirt.snapshots.lock().unwrap() = 2, Code::VmHasSnapshots, "snapshot-delete");
}

#[test]
fn clear_disk_has_no_class_and_a_missing_one_none_either() {
    let mut lab = clear();
    let report = lab.run(set(ClassChoice::Fast));
    assert_eq!(report.code, Some(Code::UnsupportedDisk), "{report:?}");
    assert!(report.hint.contains("vmseal vm encrypt web01 --disk vda --class fast"), "{report:?}");
    let work =
        Work::SetDisk { domain: DOMAIN, target: "vdz".into(), class: ClassChoice::Fast, hosts: hosts() };
    let report = lab.run_as(OTHER, work);
    assert_eq!(report.code, Some(Code::NotFound));
    assert!(report.message.contains("it has: vda"), "{report:?}");
}

#[test]
fn disk_that_has_another_name_by_now_is_changed_and_starts() {
    let mut lab = encrypted(ClassChoice::Compatible);
    lab.libvirt.change(DOMAIN, |_, xml| {
        *xml = xml.replace("dev='vda'", "dev='vdb'").replace("/vda.sock", "/vdb.sock");
    });
    let work =
        Work::SetDisk { domain: DOMAIN, target: "vdb".into(), class: ClassChoice::Fast, hosts: hosts() };
    succeeded(&lab.run(work));
    let metadata = lab.xml().metadata().unwrap().unwrap();
    assert_eq!((metadata.disks.len(), metadata.disks[0].target.as_str()), (1, "vdb"));
    let planned = start(&lab);
    assert_eq!((planned.disks[0].target.as_str(), planned.disks[0].class), ("vdb", DiskClass::Fast));
}

#[test]
fn disk_of_another_vm_and_one_nobody_knows_are_left_alone() {
    const THIEF: DomainUuid = DomainUuid::from_bytes([0xe0; 16]);
    let mut lab = encrypted(ClassChoice::Compatible);
    let original = lab.libvirt.xml(DOMAIN, Definition::Persistent).unwrap();
    let stolen =
        original.replace(&format!("<uuid>{DOMAIN}"), &format!("<uuid>{THIEF}")).replace(">web01<", ">web02<");
    // Without its metadata: only the stanza was pasted.
    let (from, to) = (stolen.find("<metadata>").unwrap(), stolen.find("</metadata>").unwrap());
    let pasted = format!("{}{}", &stolen[..from], &stolen[to + "</metadata>".len()..]);
    let own_socket = pasted.replace(&format!("libvirt-{DOMAIN}"), &format!("libvirt-{THIEF}"));
    let set =
        || Work::SetDisk { domain: THIEF, target: "vda".into(), class: ClassChoice::Fast, hosts: hosts() };
    for (n, (xml, word)) in
        [(pasted, "socket of another"), (own_socket, "belongs to VM")].into_iter().enumerate()
    {
        lab.libvirt.put_xml(THIEF, "web02", &xml);
        let stored = lab.store().vms();
        let before = lab.libvirt.xml(THIEF, Definition::Persistent).unwrap();
        let report = lab.run_as(TaskId::from_bytes([60 + n as u8; 16]), set());
        assert_eq!((report.state, report.code), (TaskState::Failed, Some(Code::Integrity)), "{report:?}");
        assert!(report.message.contains(word) && report.hint.contains("vm adopt web02"), "{report:?}");
        assert_eq!(lab.libvirt.xml(THIEF, Definition::Persistent).unwrap(), before);
        assert_eq!(lab.store().vms(), stored);
    }
    // A fast disk says nowhere which it is but in its metadata.
    let fast = original.replace("type='network'", "type='vhostuser'");
    assert_ne!(fast, original);
    let source = fast.find("<source protocol").unwrap();
    let end = fast[source..].find("</source>").unwrap() + source + "</source>".len();
    let socket = format!("<source type='unix' path='/run/vmseal/libvirt-{THIEF}/vda.sock'/>");
    let fast = format!("{}{socket}{}", &fast[..source], &fast[end..]);
    let (from, to) = (fast.find("<metadata>").unwrap(), fast.find("</metadata>").unwrap());
    let fast = format!("{}{}", &fast[..from], &fast[to + "</metadata>".len()..])
        .replace(&format!("<uuid>{DOMAIN}"), &format!("<uuid>{THIEF}"));
    lab.libvirt.put_xml(THIEF, "web02", &fast);
    let report = lab.run_as(TaskId::from_bytes([70; 16]), set());
    assert_eq!(report.code, Some(Code::UnknownVm), "{report:?}");
    assert!(report.hint.contains("put the vmseal element back"), "{report:?}");
}

#[test]
fn copy_of_a_fast_vm_is_refused_until_it_is_adopted_and_stays_fast() {
    const COPY: DomainUuid = DomainUuid::from_bytes([0xc0; 16]);
    let lab = encrypted(ClassChoice::Fast);
    let xml = lab.libvirt.xml(DOMAIN, Definition::Persistent).unwrap();
    let xml = xml.replace(&format!("<uuid>{DOMAIN}"), &format!("<uuid>{COPY}")).replace(">web01<", ">web02<");
    lab.libvirt.put_xml(COPY, "web02", &xml);
    let copy = || DomainXml::parse(&lab.libvirt.xml(COPY, Definition::Persistent).unwrap()).unwrap();
    assert_eq!(plan(&copy(), &config(), &lab.store()).unwrap_err().code, Code::UnknownVm);
    lab.libvirt.undefine(DOMAIN);
    let store = lab.store();
    adopt(&*lab.libvirt, &config(), &store, COPY).unwrap();
    let planned = plan(&copy(), &config(), &store).unwrap().unwrap();
    assert_eq!((planned.domain, planned.disks[0].class), (COPY, DiskClass::Fast));
    assert_eq!(planned.disks[0].serial, "VS-vda");
    assert!(copy().to_xml().contains("mode='shared'"));
}
