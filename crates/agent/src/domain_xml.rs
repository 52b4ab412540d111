//! A domain's definition as far as we read and change it; all else in it stays as it was.
//!
//! XML in, XML out. What is changed is the `<disk>` of one target and our element in `<metadata>`. It reads no file and
//! asks no libvirt: whether a change makes sense is for the tasks to know.

use vmseal_model::{
    class::DiskClass,
    id::{DiskId, DomainUuid, VmId},
    metadata::{Aside, DiskMetadata, NAMESPACE, SharedMemory, VmMetadata},
    state::InnerFormat,
};

pub use crate::metadata::metadata_element;
pub use crate::xml::XmlError;
use crate::{
    config::AgentConfig,
    fast_disk::{self, replace_source},
    metadata::{from_element, qualified_element},
    rbd::Location,
    rbd_disk, shared_memory, ublk_disk,
    xml::{Document, Element, Node},
};

/// Seconds QEMU waits for a worker that comes back, before the guest would see an error.
pub const RECONNECT_SECONDS: u32 = 600;

/// A definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainXml(Document);

/// One `<disk>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskView {
    /// Name in the guest: `vda`.
    pub target: String,
    /// What kind of device.
    pub device: DiskDevice,
    /// Where its bytes are.
    pub source: DiskSource,
    /// libvirt's word for what lies in the source; none is `raw`.
    pub format: Option<String>,
    /// The guest may not write.
    pub read_only: bool,
    /// Other domains may write too.
    pub shareable: bool,
    /// The XML names a backing chain. An inactive definition usually does not, even where there is one.
    pub backing: bool,
    /// Writes are thrown away at the end.
    pub transient: bool,
    /// libvirt itself encrypts it.
    pub encryption: bool,
    /// Something of the source that our form of a disk cannot express: `slices`, `dataStore`.
    pub special: Option<&'static str>,
}

/// `device=` of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskDevice {
    /// A hard disk.
    Disk,
    /// An optical drive.
    Cdrom,
    /// A floppy drive.
    Floppy,
    /// A passed-through SCSI device.
    Lun,
}

/// Where a disk's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// A file.
    File(String),
    /// A block device.
    Block(String),
    /// An image on Ceph RBD.
    Rbd(Location),
    /// An NBD export on a unix socket, as ours are.
    NbdUnix {
        /// The socket.
        socket: String,
        /// The export's name; with ours the disk id.
        export: String,
    },
    /// A vhost-user-blk back end on a unix socket, as ours are of class `fast`. It has no name for the disk behind it.
    VhostUser {
        /// The socket.
        socket: String,
    },
    /// An empty drive.
    None,
    /// Something else, by libvirt's word for it.
    Other(String),
}

impl DiskSource {
    /// Whether there is nothing to look into while the VM is off: a socket, or a block device of ours.
    pub fn is_served(&self) -> bool {
        match self {
            Self::NbdUnix { .. } | Self::VhostUser { .. } => true,
            Self::Block(device) => ublk_disk::name(device).is_some(),
            Self::File(_) | Self::Rbd(_) | Self::None | Self::Other(_) => false,
        }
    }
}

/// How an encrypted disk is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncryptedSource {
    /// The disk; also the export's name.
    pub disk: DiskId,
    /// What lies inside.
    pub format: InnerFormat,
    /// The socket its worker listens on; of class `ublk` nothing that QEMU is told.
    pub socket: String,
    /// How it is presented there.
    pub class: DiskClass,
}

impl EncryptedSource {
    /// How it is seen in a definition.
    pub fn view(&self) -> DiskSource {
        let socket = self.socket.clone();
        match self.class {
            DiskClass::Compatible => DiskSource::NbdUnix { socket, export: self.disk.to_string() },
            DiskClass::Ublk => DiskSource::Block(AgentConfig::ublk_device(self.disk)),
            DiskClass::Fast => DiskSource::VhostUser { socket },
        }
    }
}

impl DomainXml {
    /// Reads a definition.
    ///
    /// # Errors
    ///
    /// [`XmlError`] if it is no XML or no `<domain>`.
    pub fn parse(xml: &str) -> Result<Self, XmlError> {
        let document = Document::parse(xml)?;
        if document.root.name != "domain" {
            return Err(XmlError::Root { found: document.root.name, wanted: "domain" });
        }
        Ok(Self(document))
    }

    /// The definition as text.
    pub fn to_xml(&self) -> String {
        self.0.to_xml()
    }

    /// libvirt's UUID, if it stands there.
    pub fn uuid(&self) -> Option<DomainUuid> {
        self.0.root.child("uuid")?.text().trim().parse().ok()
    }

    /// Sets the UUID of a definition that has none.
    pub fn set_uuid(&mut self, uuid: DomainUuid) {
        let mut element = Element::new("uuid");
        element.children.push(Node::Text(uuid.to_string()));
        match self.0.root.child_mut("uuid") {
            Some(old) => *old = element,
            None => self.insert_after(&["name"], element),
        }
    }

    /// Its name.
    pub fn name(&self) -> Option<&str> {
        self.0.root.child("name")?.children.iter().find_map(|node| match node {
            Node::Text(text) | Node::CData(text) => Some(text.trim()),
            _ => None,
        })
    }

    /// Its disks, in order.
    pub fn disks(&self) -> Vec<DiskView> {
        let Some(devices) = self.0.root.child("devices") else { return Vec::new() };
        devices.elements().filter(|e| e.name == "disk").map(view).collect()
    }

    /// The disk of a target.
    pub fn disk(&self, target: &str) -> Option<DiskView> {
        self.disks().into_iter().find(|disk| disk.target == target)
    }

    /// Our metadata; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`XmlError::Metadata`] if the element is there and damaged.
    pub fn metadata(&self) -> Result<Option<VmMetadata>, XmlError> {
        let Some(parent) = self.0.root.child("metadata") else { return Ok(None) };
        let scope = [&self.0.root, parent];
        let mut ours =
            parent.elements().filter(|e| e.local_name() == "vm" && e.namespace(&scope) == Some(NAMESPACE));
        let Some(vm) = ours.next() else { return Ok(None) };
        if ours.next().is_some() {
            return Err(XmlError::Metadata { reason: "it is there twice".to_owned() });
        }
        from_element(vm, &scope).map(Some)
    }

    /// Whether anything of our namespace is in the metadata, readable or not.
    pub fn has_metadata(&self) -> bool {
        self.our_positions().is_some_and(|positions| !positions.is_empty())
    }

    /// Puts our metadata in, in place of what was there of ours.
    pub fn set_metadata(&mut self, metadata: &VmMetadata) {
        let element = qualified_element(metadata);
        if self.0.root.child("metadata").is_none() {
            self.insert_after(&["description", "title", "genid", "uuid", "name"], Element::new("metadata"));
        }
        let positions = self.our_positions().unwrap_or_default();
        let parent = self.0.root.child_mut("metadata").expect("put there above");
        match positions.split_first() {
            Some((first, more)) => {
                parent.children[*first] = Node::Element(element);
                more.iter().rev().for_each(|index| parent.remove_child(*index));
            }
            None => parent.append(element),
        }
    }

    /// Takes our metadata out; what others have there stays.
    pub fn remove_metadata(&mut self) {
        let positions = self.our_positions().unwrap_or_default();
        let Some(parent) = self.0.root.child_mut("metadata") else { return };
        positions.iter().rev().for_each(|index| parent.remove_child(*index));
        if parent.elements().next().is_none()
            && !positions.is_empty()
            && let Some(index) = self.0.root.position("metadata")
        {
            self.0.root.remove_child(index);
        }
    }

    /// Has the metadata name these disks and no others, and the guest's memory shared exactly while one of them is fast.
    /// Without disks it goes.
    ///
    /// # Errors
    ///
    /// [`XmlError::Metadata`] if what was there cannot be read.
    pub fn set_disks(
        &mut self,
        vm: VmId,
        domain: DomainUuid,
        disks: Vec<DiskMetadata>,
    ) -> Result<(), XmlError> {
        let old = self.metadata()?.map(|metadata| metadata.memory).unwrap_or_default();
        let memory = if disks.iter().any(|disk| disk.class == DiskClass::Fast) {
            let new = shared_memory::share(&mut self.0.root);
            SharedMemory { source: old.source || new.source, access: old.access || new.access }
        } else {
            shared_memory::unshare(&mut self.0.root, old);
            SharedMemory::default()
        };
        if disks.is_empty() {
            self.remove_metadata();
        } else {
            self.set_metadata(&VmMetadata { vm, domain, memory, disks });
        }
        Ok(())
    }

    /// What keeps a disk from being fast; of one that is not there yet, only what the VM has against it.
    pub fn fast_obstacle(&self, target: &str) -> Option<String> {
        let disk = self.disk_element(target);
        disk.and_then(fast_disk::obstacle).or_else(|| shared_memory::obstacle(&self.0.root))
    }

    /// Makes a disk a disk of ours, or one of ours one of another class; what was set aside of it for that, for its
    /// metadata. Target, address, boot order, alias and the driver's tuning stay, and serial, wwn and throttling where the
    /// class can have them; what only holds for files goes.
    ///
    /// # Errors
    ///
    /// [`XmlError::NoDisk`].
    pub fn encrypt_disk(&mut self, target: &str, source: &EncryptedSource) -> Result<Aside, XmlError> {
        let (mut aside, cpus) = (self.aside(source.disk), self.cpus());
        let disk = self.disk_mut(target)?;
        let image = rbd_disk::enter(disk, &aside);
        let stays = match source.class {
            DiskClass::Compatible => false,
            DiskClass::Ublk => ublk_disk::is_ublk(disk),
            DiskClass::Fast => fast_disk::is_fast(disk),
        };
        if !stays {
            leave(disk, &aside);
            aside.clear();
        }
        let mut aside = match source.class {
            DiskClass::Fast => fast_disk::enter(disk, &source.socket, cpus, aside),
            DiskClass::Ublk => {
                let device = AgentConfig::ublk_device(source.disk);
                ublk_disk::enter(disk, &device, source.format, aside)
            }
            DiskClass::Compatible => {
                disk.set("type", "network");
                set_driver(disk, source.format, true);
                replace_source(disk, source_element(source));
                Aside::new()
            }
        };
        aside.extend(image);
        Ok(aside)
    }

    /// Makes a disk of ours, with this id, a disk in a file, or an RBD image, again.
    ///
    /// # Errors
    ///
    /// [`XmlError::NoDisk`].
    pub fn clear_disk(
        &mut self,
        target: &str,
        id: DiskId,
        path: &str,
        format: InnerFormat,
    ) -> Result<(), XmlError> {
        let aside = self.aside(id);
        let disk = self.disk_mut(target)?;
        leave(disk, &aside);
        set_driver(disk, format, false);
        match Location::is_meant_by(path).then(|| Location::parse(path)) {
            Some(Ok(location)) => rbd_disk::leave(disk, &location, &aside),
            _ => {
                disk.set("type", "file");
                replace_source(disk, Element::new("source").with("file", path));
            }
        }
        Ok(())
    }

    /// Adds a disk of ours as the last one; what was set aside of it, as by [`DomainXml::encrypt_disk`].
    ///
    /// # Errors
    ///
    /// [`XmlError::DiskExists`].
    pub fn add_encrypted_disk(&mut self, target: &str, source: &EncryptedSource) -> Result<Aside, XmlError> {
        if self.disk(target).is_some() {
            return Err(XmlError::DiskExists { target: target.to_owned() });
        }
        let bus = self.bus_for(target);
        let mut disk = Element::new("disk").with("type", "network").with("device", "disk");
        disk.children.push(Node::Element(Element::new("target").with("dev", target).with("bus", bus)));
        if self.0.root.child("devices").is_none() {
            self.0.root.append(Element::new("devices"));
        }
        let devices = self.0.root.child_mut("devices").expect("put there above");
        match devices.children.iter().rposition(|node| matches!(node, Node::Element(e) if e.name == "disk")) {
            Some(last) => devices.children.insert(last + 1, Node::Element(disk)),
            None => devices.append(disk),
        }
        self.encrypt_disk(target, source)
    }

    /// What is set aside of a disk, as far as that can be read. By its id: its target is whoever edits the definition's.
    fn aside(&self, disk: DiskId) -> Aside {
        let disks = self.metadata().ok().flatten().map(|metadata| metadata.disks).unwrap_or_default();
        disks.into_iter().find(|known| known.disk == disk).map(|known| known.aside).unwrap_or_default()
    }

    /// CPUs the guest may have.
    pub(crate) fn cpus(&self) -> u32 {
        self.0.root.child("vcpu").and_then(|vcpu| vcpu.text().trim().parse().ok()).unwrap_or(1)
    }

    /// Whether it has a TPM.
    pub fn has_tpm(&self) -> bool {
        self.0.root.child("devices").is_some_and(|devices| devices.child("tpm").is_some())
    }

    /// Whether it has an NVRAM file: said so, or implied by automatic firmware selection.
    pub fn has_nvram(&self) -> bool {
        let Some(os) = self.0.root.child("os") else { return false };
        os.child("nvram").is_some() || os.get("firmware") == Some("efi")
    }

    fn disk_mut(&mut self, target: &str) -> Result<&mut Element, XmlError> {
        let missing = || XmlError::NoDisk { target: target.to_owned() };
        let devices = self.0.root.child_mut("devices").ok_or_else(missing)?;
        devices.elements_mut().find(|e| e.name == "disk" && target_of(e) == target).ok_or_else(missing)
    }

    fn disk_element(&self, target: &str) -> Option<&Element> {
        let devices = self.0.root.child("devices")?;
        devices.elements().find(|e| e.name == "disk" && target_of(e) == target)
    }

    /// The bus libvirt would guess from the name, but for `sd`, where it guesses SCSI although there may be none.
    pub(crate) fn bus_for(&self, target: &str) -> &'static str {
        let has_scsi = self.0.root.child("devices").is_some_and(|devices| {
            devices.elements().any(|e| e.name == "controller" && e.get("type") == Some("scsi"))
        });
        match target.get(..2) {
            Some("sd") if has_scsi => "scsi",
            Some("sd") => "sata",
            Some("hd") => "ide",
            _ => "virtio",
        }
    }

    fn our_positions(&self) -> Option<Vec<usize>> {
        let parent = self.0.root.child("metadata")?;
        let scope = [&self.0.root, parent];
        let ours = |node: &Node| matches!(node, Node::Element(e) if e.namespace(&scope) == Some(NAMESPACE));
        Some(parent.children.iter().enumerate().filter(|(_, node)| ours(node)).map(|(i, _)| i).collect())
    }

    fn insert_after(&mut self, names: &[&str], element: Element) {
        let root = &mut self.0.root;
        let at = names.iter().find_map(|name| root.position(name)).map_or(0, |index| index + 1);
        root.children.insert(at, Node::Element(element));
        root.children.insert(at, Node::Text("\n  ".to_owned()));
    }
}

fn target_of(disk: &Element) -> &str {
    disk.child("target").and_then(|target| target.get("dev")).unwrap_or("")
}

fn view(disk: &Element) -> DiskView {
    let source = disk.child("source");
    let inside = |name: &str| source.is_some_and(|s| s.child(name).is_some());
    DiskView {
        target: target_of(disk).to_owned(),
        device: match disk.get("device") {
            None | Some("disk") => DiskDevice::Disk,
            Some("cdrom") => DiskDevice::Cdrom,
            Some("floppy") => DiskDevice::Floppy,
            // Unknown kinds are as little ours as pass-through.
            Some(_) => DiskDevice::Lun,
        },
        source: source_view(disk, source),
        format: disk.child("driver").and_then(|driver| driver.get("type")).map(str::to_owned),
        read_only: disk.child("readonly").is_some(),
        shareable: disk.child("shareable").is_some(),
        backing: disk
            .child("backingStore")
            .is_some_and(|b| b.get("type").is_some() || b.child("source").is_some()),
        transient: disk.child("transient").is_some(),
        encryption: disk.child("encryption").is_some() || inside("encryption"),
        special: ["slices", "dataStore"].into_iter().find(|name| inside(name)),
    }
}

fn source_view(disk: &Element, source: Option<&Element>) -> DiskSource {
    let Some(source) = source else { return DiskSource::None };
    let kind = disk.get("type").unwrap_or("file");
    let named = |attribute: &str| source.get(attribute).filter(|value| !value.is_empty()).map(str::to_owned);
    match kind {
        "file" => named("file").map_or(DiskSource::None, DiskSource::File),
        "block" => named("dev").map_or(DiskSource::None, DiskSource::Block),
        "network" if source.get("protocol") == Some("nbd") => {
            let unix = source.child("host").filter(|host| host.get("transport") == Some("unix"));
            match unix.and_then(|host| host.get("socket")) {
                Some(socket) => DiskSource::NbdUnix {
                    socket: socket.to_owned(),
                    export: source.get("name").unwrap_or("").to_owned(),
                },
                None => DiskSource::Other("network nbd".to_owned()),
            }
        }
        "network" if source.get("protocol") == Some("rbd") => match rbd_disk::location(disk, source) {
            Ok(location) => DiskSource::Rbd(location),
            Err(why) => DiskSource::Other(format!("network rbd, and {why}")),
        },
        "vhostuser" if source.get("type") == Some("unix") => match named("path") {
            Some(socket) => DiskSource::VhostUser { socket },
            None => DiskSource::Other("vhostuser".to_owned()),
        },
        "network" => DiskSource::Other(format!("network {}", source.get("protocol").unwrap_or(""))),
        other => DiskSource::Other(other.to_owned()),
    }
}

fn source_element(source: &EncryptedSource) -> Element {
    Element::new("source")
        .with("protocol", "nbd")
        .with("name", &source.disk.to_string())
        .with_child(Element::new("host").with("transport", "unix").with("socket", &source.socket))
        .with_child(Element::new("reconnect").with("delay", &RECONNECT_SECONDS.to_string()))
}

/// Undoes the form of a fast disk or of a block device, if it has that.
fn leave(disk: &mut Element, aside: &Aside) {
    if fast_disk::is_fast(disk) || ublk_disk::is_ublk(disk) {
        fast_disk::leave(disk, aside);
    }
}

/// `io='native'` needs a file with O_DIRECT. The error policies keep the guest waiting while a worker is away; a clear
/// disk goes back to libvirt's own.
fn set_driver(disk: &mut Element, format: InnerFormat, ours: bool) {
    let driver = fast_disk::driver(disk);
    driver.set("type", format.as_str());
    if !ours {
        ["error_policy", "rerror_policy"].into_iter().for_each(|name| driver.unset(name));
        return;
    }
    driver.unset("io");
    for (name, value) in [("cache", "none"), ("discard", "unmap")] {
        if driver.get(name).is_none() {
            driver.set(name, value);
        }
    }
    driver.set("error_policy", "stop");
    driver.set("rerror_policy", "stop");
}
