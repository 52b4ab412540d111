//! `disk create`: a new empty disk that was never clear. What is refused, and the plan.

use vmseal_keys::random_bytes;
use vmseal_model::{
    class::{DiskClass, Resolved},
    id::{DiskId, DomainUuid},
    refusal::Code,
    state::InnerFormat,
};

use crate::{
    domain_xml::DomainXml,
    metadata::is_target,
    new_volume::Ownership,
    tasks::{
        command::KeyChoice,
        context::Context,
        encrypt::check_new_disks,
        place,
        plan::{EncryptPlan, NewDisk, Origin, Target, UNIT},
        refusal::Refusal,
        refuse::{check_class, check_format, idle_domain, vm_id},
    },
};

/// Largest disk; QEMU's own limits are near.
const MAX_BYTES: u64 = 64 << 40;
/// Bytes of a cluster of a new qcow2 image: QEMU's default.
const CLUSTER: u64 = 64 << 10;

/// What is asked for.
pub(crate) struct Wanted<'a> {
    pub(crate) target: &'a str,
    pub(crate) path: &'a str,
    pub(crate) format: InnerFormat,
    pub(crate) bytes: u64,
    pub(crate) class: &'a Resolved,
}

/// Looks at everything, changes nothing.
pub(crate) fn plan(
    ctx: &Context,
    domain: DomainUuid,
    wanted: &Wanted<'_>,
    key: &KeyChoice,
) -> Result<EncryptPlan, Refusal> {
    let idle = idle_domain(&ctx.world, domain)?;
    let name = &idle.info.name;
    let vm = vm_id(&ctx.world, domain, &idle.xml, name)?;
    if idle.xml.disk(wanted.target).is_some() {
        let there: Vec<_> = idle.xml.disks().into_iter().map(|d| d.target).collect();
        let text = format!("{name} already has a disk {}; it has: {}", wanted.target, there.join(", "));
        return Err(Refusal::new(Code::Exists, text));
    }
    check_new_bus(&idle.xml, wanted)?;
    check_class(&idle.xml, wanted.target, wanted.format, wanted.class.class)?;
    let disks = vec![new_disk(ctx, wanted)?];
    check_new_disks(&disks)?;
    Ok(EncryptPlan { vm, domain, name: name.clone(), key: key.clone(), disks, definition: Target::Add })
}

/// The bus of a disk that is added follows from its name.
fn check_new_bus(xml: &DomainXml, wanted: &Wanted<'_>) -> Result<(), Refusal> {
    let bus = xml.bus_for(wanted.target);
    if wanted.class.class != DiskClass::Fast || bus == "virtio" {
        return Ok(());
    }
    let text = format!(
        "{} cannot be fast: by its name its bus is {bus}, and a fast disk is a virtio disk",
        wanted.target.escape_debug()
    );
    Err(Refusal::new(Code::UnsupportedDisk, text).hint("name it as virtio disks are: vdb"))
}

/// A disk that is not there yet.
pub(crate) fn new_disk(ctx: &Context, wanted: &Wanted<'_>) -> Result<NewDisk, Refusal> {
    let bad = |text: String| Refusal::new(Code::BadRequest, text);
    if !is_target(wanted.target) {
        let text =
            format!("'{}' is no target name: letters and digits, as in vdb", wanted.target.escape_debug());
        return Err(bad(text));
    }
    if wanted.bytes == 0 || wanted.bytes > MAX_BYTES {
        return Err(bad(format!("a disk has 1 byte to 64 TiB, not {}", wanted.bytes)));
    }
    check_format(wanted.path, wanted.format)?;
    place::check_free(&ctx.world, wanted.path)?;
    let size = wanted.bytes.next_multiple_of(UNIT);
    let (origin, stored, presented) = match wanted.format {
        InnerFormat::Raw => (Origin::Zeros, size, size),
        InnerFormat::Qcow2 => {
            let (stored, presented) = empty_qcow2(size);
            (Origin::EmptyQcow2 { virtual_bytes: size }, stored, presented)
        }
    };
    Ok(NewDisk {
        target: wanted.target.to_owned(),
        disk: DiskId::from_random(random_bytes()?),
        origin,
        volume: wanted.path.to_owned(),
        format: wanted.format,
        class: wanted.class.class,
        chosen: Some(wanted.class.chosen.clone()),
        image_bytes: stored,
        stored_bytes: stored,
        presented_bytes: presented,
        ownership: Ownership::default(),
    })
}

/// Bytes an empty image is given (header, reference counts, L1 table, generously), and bytes its volume presents.
fn empty_qcow2(virtual_bytes: u64) -> (u64, u64) {
    let header = super::qcow2::Qcow2Header {
        virtual_bytes,
        cluster_bytes: CLUSTER,
        refcount_bits: 16,
        backing: None,
        crypt_method: 0,
        dirty: false,
        corrupt: false,
        external_data: false,
        extended_l2: false,
        unknown_bits: 0,
    };
    let l1 = virtual_bytes.div_ceil(CLUSTER * CLUSTER / 8).saturating_mul(8);
    let stored = (1 << 20) + l1.next_multiple_of(1 << 20);
    let presented = header.presented(stored).expect("64 TiB at most: nothing overflows");
    (stored, presented)
}
