//! Everything a task is refused for before it does anything: the VM's state, its disks, their images.
//!
//! Definitions and files in; a domain that can be worked on, or a refusal with its code and the way out. Changes
//! nothing.

use vmseal_keys::random_bytes;
use vmseal_model::{
    class::DiskClass,
    id::{DomainUuid, VmId},
    metadata::VmMetadata,
    refusal::Code,
    state::{InnerFormat, VmState},
};

use crate::{
    domain_xml::{DiskDevice, DiskSource, DiskView, DomainXml},
    ours,
    ports::{Definition, DomainInfo},
    rbd::Location,
    tasks::{
        context::World,
        image::{Image, Uses, UsesError, shell},
        plan::Identity,
        qcow2::Qcow2Header,
        refusal::{Refusal, io_refusal},
    },
};

/// Most bytes a volume presents: 2^44 units of 512 bytes under one key (IEEE Std 1619 allows no more blocks).
const MAX_PRESENTED: u64 = 1 << 53;

/// A domain that is off and has nothing that would bring an older disk back.
pub(crate) struct Idle {
    pub(crate) info: DomainInfo,
    pub(crate) xml: DomainXml,
}

/// Looks at the domain.
pub(crate) fn idle_domain(world: &World, domain: DomainUuid) -> Result<Idle, Refusal> {
    let hv = &world.hypervisor;
    let info = hv.domain(domain)?;
    let name = &info.name;
    let shell_name = shell(name);
    if !info.persistent {
        return Err(Refusal::new(
            Code::VmTransient,
            format!("{name} is transient: it has no definition that stays"),
        )
        .hint(format!(
            "virsh dumpxml {shell_name} > vm.xml; virsh define vm.xml; virsh shutdown {shell_name}"
        )));
    }
    check_off(&info)?;
    if info.state == VmState::Saved || hv.has_managed_save(domain)? {
        return Err(Refusal::new(
            Code::VmHasSavedImage,
            format!("{name} has a saved image, which names its old disks"),
        )
        .hint(format!(
            "virsh start {shell_name} and then virsh shutdown {shell_name}, or throw the image away: virsh \
                 managedsave-remove {shell_name}"
        )));
    }
    let xml = DomainXml::parse(&hv.xml(domain, Definition::Persistent)?)?;
    let snapshots = hv.snapshots(domain)?;
    if snapshots > 0 {
        let text = format!(
            "{name} has {snapshots} snapshots or checkpoints; a revert would bring its old disks back"
        );
        let served = xml.disks().iter().any(|disk| disk.source.is_served());
        let first = if served {
            format!(
                "virsh start {shell_name}: libvirt deletes snapshots of an encrypted disk only while the VM runs; "
            )
        } else {
            String::new()
        };
        return Err(Refusal::new(Code::VmHasSnapshots, text).hint(format!(
            "{first}virsh snapshot-list {shell_name}; virsh checkpoint-list {shell_name}; delete each: virsh snapshot-delete \
             {shell_name} NAME, virsh checkpoint-delete {shell_name} NAME"
        )));
    }
    Ok(Idle { info, xml })
}

/// It must be off.
pub(crate) fn check_off(info: &DomainInfo) -> Result<(), Refusal> {
    match info.state {
        VmState::Off | VmState::Saved | VmState::Locked => Ok(()),
        state => Err(Refusal::new(Code::VmRunning, format!("{} is {}", info.name, state.as_str()))
            .hint(format!("virsh shutdown {}", shell(&info.name)))),
    }
}

/// Our id of a VM: as its metadata and the agent's store say, or a new one. The two must agree.
pub(crate) fn vm_id(world: &World, domain: DomainUuid, xml: &DomainXml, name: &str) -> Result<VmId, Refusal> {
    let bound = world.store.vm_of_domain(domain);
    let adopt =
        |why: String| Refusal::new(Code::UnknownVm, why).hint(format!("vmseal vm adopt {}", shell(name)));
    match xml.metadata()? {
        Some(metadata) if metadata.domain != domain => Err(adopt(format!(
            "{name} carries the vmseal metadata of another domain ({}): a copy?",
            metadata.domain
        ))),
        Some(metadata) => match bound {
            Some(bound) if bound != metadata.vm => {
                Err(adopt(format!("{name} says it is VM {}, this host knows it as {bound}", metadata.vm)))
            }
            _ => Ok(metadata.vm),
        },
        None => match bound {
            Some(bound) => Ok(bound),
            None => Ok(VmId::from_random(random_bytes()?)),
        },
    }
}

/// Targets named twice, or not there, are refused.
pub(crate) fn check_targets(xml: &DomainXml, targets: &[String], name: &str) -> Result<(), Refusal> {
    let there: Vec<_> = xml.disks().into_iter().map(|d| d.target).collect();
    for (i, target) in targets.iter().enumerate() {
        if targets[..i].contains(target) {
            return Err(Refusal::new(Code::BadRequest, format!("disk {target} is named twice")));
        }
        if !there.contains(target) {
            let text = format!("{name} has no disk {}; it has: {}", target.escape_debug(), there.join(", "));
            return Err(Refusal::new(Code::NotFound, text));
        }
    }
    Ok(())
}

/// Whether a disk is one of ours.
pub(crate) fn is_encrypted(
    world: &World,
    domain: DomainUuid,
    disk: &DiskView,
    metadata: Option<&VmMetadata>,
) -> bool {
    let behind = ours::behind(&world.config, &world.store, domain, metadata, disk);
    metadata.is_some_and(|m| m.disks.iter().any(|d| d.target == disk.target && Some(d.disk) == behind))
}

/// Whether a disk of a definition can be of a class.
pub(crate) fn check_class(
    xml: &DomainXml,
    target: &str,
    format: InnerFormat,
    class: DiskClass,
) -> Result<(), Refusal> {
    let unsupported = |why: String| {
        Err(Refusal::new(Code::UnsupportedDisk, format!("{target} cannot be {}: {why}", class.as_str())))
    };
    match (class, format) {
        (DiskClass::Compatible | DiskClass::Ublk, _) => Ok(()),
        (DiskClass::Fast, InnerFormat::Qcow2) => unsupported("qcow2 lies inside, which QEMU cannot read through it".to_owned())
            .map_err(|refusal| refusal.hint("leave it compatible; to have it raw: vmseal vm decrypt, qemu-img convert -O raw, vmseal vm encrypt --class fast")),
        (DiskClass::Fast, InnerFormat::Raw) => match xml.fast_obstacle(target) {
            None => Ok(()),
            Some(why) => {
                let name = shell(xml.name().unwrap_or_default());
                unsupported(why).map_err(|refusal| refusal.hint(format!("leave it compatible, or change that: virsh edit {name}")))
            }
        },
    }
}

/// Everything about a disk's definition that keeps it from being encrypted; gives the image's path and format.
pub(crate) fn clear_image(disk: &DiskView) -> Result<(String, InnerFormat), Refusal> {
    let unsupported = |what: &str| Refusal::new(Code::UnsupportedDisk, what.to_owned());
    match disk.device {
        DiskDevice::Disk => {}
        DiskDevice::Cdrom | DiskDevice::Floppy => return Err(unsupported("it is a removable medium")),
        DiskDevice::Lun => return Err(unsupported("it is a passed-through SCSI device")),
    }
    if disk.shareable {
        return Err(unsupported("it is shareable: other VMs may write it too")
            .hint("take <shareable/> out of its definition if it is not shared any more"));
    }
    if disk.transient {
        return Err(unsupported("it is transient: what is written to it is thrown away"));
    }
    if disk.encryption {
        return Err(unsupported("libvirt encrypts it already (<encryption>)")
            .hint("convert it to a clear image first: qemu-img convert"));
    }
    if let Some(special) = disk.special {
        return Err(unsupported(&format!("its source has <{special}>, which a network disk cannot have")));
    }
    if disk.backing {
        return Err(backing_chain(None, ""));
    }
    let path = match &disk.source {
        DiskSource::File(path) => path.clone(),
        DiskSource::Rbd(location) => location.to_string(),
        DiskSource::Block(device) => {
            return Err(unsupported(&format!(
                "it is the block device {device}; this version encrypts image files only"
            )));
        }
        DiskSource::NbdUnix { socket, .. } | DiskSource::VhostUser { socket } => {
            return Err(unsupported(&format!("it is served on {socket}, and not by vmseal")));
        }
        DiskSource::None => return Err(unsupported("it has no source")),
        DiskSource::Other(kind) => return Err(unsupported(&format!("its source is '{kind}'"))),
    };
    // Without a type libvirt takes an image as raw: it never probes.
    let format = disk.format.as_deref().unwrap_or("raw");
    let format = InnerFormat::from_libvirt(format).ok_or_else(|| {
        unsupported(&format!("its format is {format}; raw and qcow2 are supported"))
            .hint(format!("qemu-img convert -O qcow2 {} NEW.qcow2", shell(&path)))
    })?;
    check_format(&path, format)?;
    Ok((path, format))
}

/// An image on RBD has its full length from the start, so what lies in it cannot grow.
pub(crate) fn check_format(path: &str, format: InnerFormat) -> Result<(), Refusal> {
    if format == InnerFormat::Raw || !Location::is_meant_by(path) {
        return Ok(());
    }
    let text = format!("{path} is an RBD image with {} in it: only raw is supported there", format.as_str());
    Err(Refusal::new(Code::UnsupportedDisk, text)
        .hint("RBD images are thin by themselves; to have it raw: qemu-img convert -O raw"))
}

/// Bytes a volume of this image stores and presents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) stored: u64,
    pub(crate) presented: u64,
}

fn too_big(path: &str) -> Refusal {
    Refusal::new(Code::UnsupportedDisk, format!("{path} is larger than one key may encrypt"))
}

/// The same of a raw image of which only the length and the beginning are known.
pub(crate) fn check_raw(
    path: &str,
    bytes: u64,
    beginning: &[u8],
    declared: bool,
    unit: u64,
) -> Result<Sizes, Refusal> {
    if bytes == 0 {
        return Err(Refusal::new(Code::UnsupportedDisk, format!("{path} is empty")));
    }
    if !declared && beginning.starts_with(b"QFI\xfb") {
        let text = format!("{path} is a qcow2 image, and its definition does not say so");
        return Err(Refusal::new(Code::UnsupportedDisk, text).hint("to have it raw: qemu-img convert -O raw"));
    }
    let stored = bytes.checked_next_multiple_of(unit).filter(|stored| *stored <= MAX_PRESENTED);
    let stored = stored.ok_or_else(|| too_big(path))?;
    Ok(Sizes { stored, presented: stored })
}

/// Everything within an image that keeps it from being encrypted.
pub(crate) fn check_image(
    image: &Image,
    path: &str,
    format: InnerFormat,
    declared: bool,
    unit: u64,
) -> Result<Sizes, Refusal> {
    let too_big = || too_big(path);
    let stored = image.identity.bytes.checked_next_multiple_of(unit).ok_or_else(too_big)?;
    let header =
        Qcow2Header::read(&image.file).map_err(|e| io_refusal("read", std::path::Path::new(path), &e))?;
    if image.identity.bytes == 0 {
        return Err(Refusal::new(Code::UnsupportedDisk, format!("{path} is empty")));
    }
    let sizes = match (format, header) {
        (InnerFormat::Raw, Some(_)) if !declared => {
            let text = format!("{path} is a qcow2 image, and its definition does not say so");
            return Err(Refusal::new(Code::UnsupportedDisk, text)
                .hint("put <driver name='qemu' type='qcow2'/> into its definition"));
        }
        (InnerFormat::Raw, _) => Sizes { stored, presented: stored },
        (InnerFormat::Qcow2, None) => {
            return Err(Refusal::new(
                Code::UnsupportedDisk,
                format!("{path} is no qcow2 image, as its definition says"),
            ));
        }
        (InnerFormat::Qcow2, Some(header)) => {
            check_qcow2(&header, path)?;
            Sizes { stored, presented: header.presented(stored).ok_or_else(too_big)? }
        }
    };
    if sizes.presented > MAX_PRESENTED { Err(too_big()) } else { Ok(sizes) }
}

fn check_qcow2(header: &Qcow2Header, path: &str) -> Result<(), Refusal> {
    let unsupported = |what: &str| Refusal::new(Code::UnsupportedDisk, format!("{path} {what}"));
    let quoted = shell(path);
    if let Some(backing) = &header.backing {
        return Err(backing_chain(Some(backing), path));
    }
    if header.external_data {
        return Err(unsupported("keeps its data in another file")
            .hint(format!("qemu-img convert -O qcow2 {quoted} NEW.qcow2")));
    }
    if header.crypt_method != 0 {
        return Err(unsupported("is encrypted by QEMU already")
            .hint("convert it to a clear image first: qemu-img convert"));
    }
    if header.corrupt || header.dirty {
        return Err(
            unsupported("is marked as damaged or not closed").hint(format!("qemu-img check -r all {quoted}"))
        );
    }
    if header.unknown_bits != 0 {
        return Err(unsupported("uses qcow2 features this version does not know"));
    }
    Ok(())
}

fn backing_chain(backing: Option<&str>, path: &str) -> Refusal {
    let on = backing.map_or(String::new(), |b| format!(" ({})", b.escape_debug()));
    let refusal = Refusal::new(
        Code::BackingChain,
        format!("it is an overlay on another image{on}, which would stay clear"),
    );
    if path.is_empty() {
        refusal.hint("make it one image: virsh blockpull, or qemu-img rebase -b '' IMAGE")
    } else {
        refusal.hint(format!("make it one image: qemu-img rebase -b '' {}", shell(path)))
    }
}

/// Nobody but this disk uses the image.
pub(crate) fn check_unshared(
    uses: &Uses,
    path: &str,
    identity: &Identity,
    own: (DomainUuid, &str),
) -> Result<(), Refusal> {
    match uses.other(path, Some(identity), Some(own)) {
        None => Ok(()),
        Some(other) => Err(Refusal::new(Code::ImageShared, format!("{path} is used by {other} too"))
            .hint("give each disk an image of its own: cp --sparse=always, rbd deep cp, or virt-clone")),
    }
}

/// All uses of files, or why they are not known.
pub(crate) fn uses(world: &World) -> Result<Uses, UsesError> {
    Uses::collect(&*world.hypervisor, &world.store)
}
