//! A VM in words: its line in the list, and its page.

use vmseal_api::{
    disk::Disk,
    vm::{Locked, Vm},
};
use vmseal_model::{
    class::{ClassChoice, DiskClass},
    state::VmState,
};

use crate::{output, size::Size, text::printable, when};

/// The list.
pub(super) fn table(vms: &[Vm]) -> String {
    output::table(
        ["NAME", "COVERAGE", "STATE", "HOST", "DISKS", "NOTE"],
        vms.iter().map(|vm| {
            let encrypted = vm.disks.iter().filter(|d| d.encrypted).count();
            [
                vm.name.clone(),
                vm.coverage.as_str().to_owned(),
                state(vm).to_owned(),
                vm.host.clone(),
                format!("{encrypted}/{}", vm.disks.len()),
                note(vm),
            ]
        }),
    )
}

/// The page.
pub(super) fn render(vm: &Vm, now_ms: i64) -> String {
    let mut lines = vec![output::fields([
        ("VM", vm.name.clone()),
        ("coverage", vm.coverage.as_str().to_owned()),
        ("state", format!("{}{}", state(vm), if vm.transient { ", transient" } else { "" })),
        ("host", format!("{}, seen {}", vm.host, when::ago(vm.seen_ms, now_ms))),
        ("id", vm.id.clone().unwrap_or_default()),
        ("libvirt UUID", vm.domain_uuid.clone()),
        ("task at work", vm.task.clone().unwrap_or_default()),
    ])];
    if let Some(locked) = &vm.locked {
        lines.push(locked_line(locked, now_ms));
    }
    if vm.unknown_ids {
        lines.push(format!(
            "unknown: its ids do not belong together; it will not start before: vmseal vm adopt {}",
            printable(&vm.name)
        ));
    }
    if !vm.disks.is_empty() {
        lines.push(format!("\n{}\n", disks(&vm.disks)));
    }
    for disk in vm.disks.iter().filter(|d| d.class == DiskClass::Fast.as_str()) {
        lines.push(format!(
            "fast: libvirt takes no snapshot or backup of {}: vmseal disk show {} {0}",
            printable(&disk.target),
            printable(&vm.name)
        ));
    }
    for disk in vm.disks.iter().filter(|d| d.epoch_unverified) {
        lines.push(format!(
            "unverified: nobody could confirm the epoch of {}'s record",
            printable(&disk.target)
        ));
    }
    lines.extend(vm.unprotected.iter().map(|what| format!("not yet protected: {}", printable(what))));
    lines.join("\n").trim_end().to_owned()
}

/// `locked: <key> of <provider> missing since …`.
fn locked_line(locked: &Locked, now_ms: i64) -> String {
    let since = match locked.since_ms {
        Some(ms) => format!("since {} ({})", when::utc(ms), when::ago(ms, now_ms)),
        None => "since nobody knows when".to_owned(),
    };
    let reason = if locked.reason.is_empty() { String::new() } else { format!(": {}", locked.reason) };
    let wanted = if locked.wanted { "\nwanted: its host starts it when the key comes" } else { "" };
    let line = format!("locked: {} of {} missing {since}{reason}", locked.key, locked.provider);
    format!("{}{wanted}", printable(&line))
}

fn disks(disks: &[Disk]) -> String {
    output::table(
        ["DISK", "ENCRYPTED", "FORMAT", "CLASS", "STORED", "SHOWN", "KEY", "SOURCE"],
        disks.iter().map(|d| {
            [
                d.target.clone(),
                if d.encrypted { "yes" } else { "no" }.to_owned(),
                d.format.clone(),
                d.class.clone(),
                size(d.stored_bytes),
                size(d.presented_bytes),
                keys(d),
                d.source.clone(),
            ]
        }),
    )
}

/// The page of one disk.
pub(super) fn disk(vm: &Vm, disk: &Disk) -> String {
    let class = DiskClass::from_word(&disk.class);
    let of_class = |text: fn(DiskClass) -> &'static str| class.map_or(String::new(), |c| text(c).to_owned());
    let page = output::fields([
        ("disk", format!("{} of {}", disk.target, vm.name)),
        ("encrypted", if disk.encrypted { "yes" } else { "no" }.to_owned()),
        ("id", disk.id.clone().unwrap_or_default()),
        ("source", disk.source.clone()),
        ("header", disk.header.clone().unwrap_or_default()),
        ("format", disk.format.clone()),
        ("stored", size(disk.stored_bytes)),
        ("shown", size(disk.presented_bytes)),
        ("keys", keys(disk)),
        ("epoch", disk.epoch.map_or(String::new(), |epoch| epoch.to_string())),
        ("class", class.map_or(disk.class.clone(), |c| format!("{}: {}", c.as_str(), c.is()))),
        ("asked for", disk.asked.clone()),
        ("because", disk.why.clone()),
        ("can", of_class(DiskClass::can)),
        ("cannot", of_class(DiskClass::cannot)),
        ("needs", of_class(DiskClass::needs)),
    ]);
    match class {
        Some(class) => {
            let (name, target) = (printable(&vm.name), printable(&disk.target));
            let other = match class {
                DiskClass::Compatible => ClassChoice::Fast,
                DiskClass::Ublk | DiskClass::Fast => ClassChoice::Compatible,
            };
            format!(
                "{page}\n\nchange it while the VM is off: vmseal disk set --class {} {name} {target}",
                other.as_str()
            )
        }
        None => page,
    }
}

fn keys(disk: &Disk) -> String {
    let keys: Vec<String> = disk.keys.iter().map(|k| format!("{} of {}", k.key, k.provider)).collect();
    keys.join(", ")
}

fn size(bytes: u64) -> String {
    if bytes == 0 { String::new() } else { Size(bytes).to_string() }
}

/// Locked while it is off, whatever libvirt calls that; a VM that runs on without its key is running.
fn state(vm: &Vm) -> &'static str {
    match (vm.state, &vm.locked) {
        (VmState::Off | VmState::Saved, Some(_)) => VmState::Locked.as_str(),
        (state, _) => state.as_str(),
    }
}

fn note(vm: &Vm) -> String {
    if let Some(locked) = &vm.locked {
        return format!("key of {} missing", locked.provider);
    }
    if vm.unknown_ids {
        return "unknown ids: vm adopt".to_owned();
    }
    match &vm.task {
        Some(_) => "task at work".to_owned(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use vmseal_api::disk::DiskKey;
    use vmseal_model::state::Coverage;

    use super::*;

    fn vm() -> Vm {
        let disk = |target: &str, encrypted: bool| Disk {
            target: target.into(),
            source: format!("/x/{target}.img"),
            format: "raw".into(),
            encrypted,
            id: None,
            epoch: None,
            epoch_unverified: encrypted,
            stored_bytes: 10 << 30,
            presented_bytes: 0,
            class: if encrypted { "compatible".into() } else { String::new() },
            asked: if encrypted { "auto".into() } else { String::new() },
            why: if encrypted { "host hv2 has no ublk".into() } else { String::new() },
            header: None,
            keys: if encrypted {
                vec![DiskKey { provider: "main".into(), key: "6f3c/g1".into() }]
            } else {
                Vec::new()
            },
        };
        Vm {
            id: Some("aa".into()),
            domain_uuid: "bb".into(),
            name: "web01".into(),
            host: "hv1".into(),
            state: VmState::Off,
            coverage: Coverage::PartlyEncrypted,
            locked: Some(Locked {
                provider: "main".into(),
                key: "6f3c/g1".into(),
                since_ms: Some(1_795_510_212_000),
                reason: "provider main was removed".into(),
                wanted: true,
            }),
            disks: vec![disk("vda", true), disk("vdb", false)],
            unprotected: vec!["saved images (virsh save)".into(), "NVRAM".into()],
            transient: false,
            unknown_ids: false,
            task: None,
            seen_ms: 1_795_510_212_000,
        }
    }

    #[test]
    fn locked_vm_names_key_provider_time_and_what_is_open() {
        let expected = "\
VM: web01
coverage: partly encrypted
state: locked
host: hv1, seen 3 min ago
id: aa
libvirt UUID: bb
locked: 6f3c/g1 of main missing since 2026-11-24 08:50:12 UTC (3 min ago): provider main was removed
wanted: its host starts it when the key comes

DISK  ENCRYPTED  FORMAT  CLASS       STORED  SHOWN  KEY              SOURCE
vda   yes        raw     compatible  10 GiB  -      6f3c/g1 of main  /x/vda.img
vdb   no         raw     -           10 GiB  -      -                /x/vdb.img

unverified: nobody could confirm the epoch of vda's record
not yet protected: saved images (virsh save)
not yet protected: NVRAM";
        assert_eq!(render(&vm(), 1_795_510_392_000), expected);
    }

    #[test]
    fn fast_disk_says_what_it_costs() {
        let mut vm = vm();
        vm.disks[0].class = "fast".into();
        let text = render(&vm, 1_795_510_392_000);
        let line = "fast: libvirt takes no snapshot or backup of vda: vmseal disk show web01 vda";
        assert!(text.lines().any(|l| l == line), "{text}");
        let page = disk(&vm, &vm.disks[0]);
        for part in [
            "class: fast: vhost-user-blk",
            "can: save and restore",
            "cannot: snapshots",
            "needs: bus virtio",
            "change it while the VM is off: vmseal disk set --class compatible web01 vda",
        ] {
            assert!(page.contains(part), "{part}\n{page}");
        }
    }

    #[test]
    fn compatible_disk_can_do_everything_and_a_clear_one_has_no_class() {
        let vm = vm();
        let page = disk(&vm, &vm.disks[0]);
        assert!(page.contains("can: snapshots, checkpoints, backup") && !page.contains("cannot"), "{page}");
        assert!(page.contains("\nasked for: auto\nbecause: host hv2 has no ublk\n"), "{page}");
        assert!(page.ends_with("vmseal disk set --class fast web01 vda"), "{page}");
        let page = disk(&vm, &vm.disks[1]);
        assert!(!page.contains("class") && !page.contains("change it"), "{page}");
        assert!(!page.contains("asked for") && !page.contains("because"), "{page}");
    }

    #[test]
    fn block_device_can_do_everything_where_there_is_ublk() {
        let mut vm = vm();
        vm.disks[0].class = "ublk".into();
        vm.disks[0].why = "every host has ublk".into();
        let page = disk(&vm, &vm.disks[0]);
        for part in [
            "class: ublk: a block device",
            "asked for: auto\nbecause: every host has ublk\n",
            "can: snapshots, checkpoints, backup",
            "needs: the kernel's ublk driver",
            "change it while the VM is off: vmseal disk set --class compatible web01 vda",
        ] {
            assert!(page.contains(part), "{part}\n{page}");
        }
        assert!(!page.contains("cannot"), "{page}");
    }

    #[test]
    fn list_shows_the_lock_before_anything_else() {
        let text = table(&[vm()]);
        let row = text.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(row, "web01 partly encrypted locked hv1 1/2 key of main missing");
    }

    #[test]
    fn running_vm_whose_key_is_gone_still_runs() {
        let mut vm = vm();
        vm.state = VmState::Running;
        assert_eq!(state(&vm), "running");
    }
}
