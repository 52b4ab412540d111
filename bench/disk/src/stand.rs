//! All exports on one medium: volumes made, servers started, clients connected.

use std::{collections::BTreeSet, path::PathBuf, process::Command};

use vmseal_model::control::ExportKind;

use crate::{
    error::BenchError,
    export::{Export, Way},
    image,
    nbd::NbdClient,
    ours::{self, Keeper, Plan},
    peers,
    place::{Medium, Scratch},
    process::Process,
    sample::Client,
    verify::Stored,
    vhost::Device,
};

/// One export and a client of it.
pub(crate) struct Stall {
    pub(crate) export: Export,
    pub(crate) client: Box<dyn Client>,
    /// The processes that serve it. QEMU comes last where it stands between.
    pub(crate) pids: Vec<i32>,
    /// What must lie in the file under it.
    pub(crate) stored: Stored,
}

/// Exports on one medium. Clients go before servers, and these before their files.
pub(crate) struct Stand {
    pub(crate) stalls: Vec<Stall>,
    processes: Vec<Process>,
    keeper: Option<Keeper>,
    volumes: Scratch,
    sockets: Scratch,
}

impl Stand {
    /// Builds it for these exports.
    pub(crate) fn new(medium: Medium, wanted: &BTreeSet<Export>) -> Result<Self, BenchError> {
        let files = wanted.len() as u64;
        let volumes = Scratch::on(medium, files * (image::DISK_BYTES + image::PAYLOAD_OFFSET) + (64 << 20))?;
        let sockets = Scratch::short()?;
        let mut stand = Self { stalls: Vec::new(), processes: Vec::new(), keeper: None, volumes, sockets };
        stand.add_ours(medium, wanted)?;
        stand.add_plain(medium, wanted)?;
        stand.add_peers(medium, wanted)?;
        stand.stalls.sort_by_key(|stall| Export::ALL.iter().position(|export| *export == stall.export));
        Ok(stand)
    }

    fn add_ours(&mut self, medium: Medium, wanted: &BTreeSet<Export>) -> Result<(), BenchError> {
        let kinds: Vec<(Export, ExportKind)> = [
            (Export::Ours(Way::Nbd), ExportKind::Nbd),
            (Export::Ours(Way::Vhost), ExportKind::VhostUser),
            (Export::OursInQemu, ExportKind::Nbd),
        ]
        .into_iter()
        .filter(|(export, _)| wanted.contains(export))
        .collect();
        if kinds.is_empty() {
            return Ok(());
        }
        let plain: Vec<ExportKind> = kinds.iter().map(|(_, kind)| *kind).collect();
        let plan = Plan::new(&format!("ours-{medium}"), &plain, self.volumes.path(), &self.sockets)?;
        let mut keeper = Keeper::start(plan)?;
        for (at, (export, _)) in kinds.into_iter().enumerate() {
            let name = keeper.disks()[at].name();
            let mut pids = keeper.pids();
            let client: Box<dyn Client> = match export {
                Export::OursInQemu => {
                    let server = keeper.disks()[at].socket();
                    let mut daemon = peers::storage_daemon_on_nbd(server, &name, medium, &self.sockets)?;
                    let stream = daemon.connect(&peers::vhost_socket(&self.sockets, medium, "nbd"))?;
                    pids.push(daemon.pid());
                    self.processes.push(daemon);
                    Box::new(Device::new(stream, &export.to_string(), 1)?)
                }
                Export::Ours(Way::Vhost) => {
                    Box::new(Device::new(keeper.connect(at)?, &export.to_string(), 1)?)
                }
                _ => Box::new(NbdClient::new(keeper.connect(at)?, &export.to_string(), &name)?),
            };
            let disk = &keeper.disks()[at];
            if medium == Medium::Disk && !disk.is_direct() {
                let what = "it goes through the page cache".to_owned();
                return Err(BenchError::Cheats { export: export.to_string(), what });
            }
            let stored = Stored::Encrypted { file: disk.file().to_owned(), key: Box::new(*disk.key()) };
            self.stalls.push(Stall { export, client, pids, stored });
        }
        self.keeper = Some(keeper);
        Ok(())
    }

    fn add_plain(&mut self, medium: Medium, wanted: &BTreeSet<Export>) -> Result<(), BenchError> {
        let ways = [Way::Nbd, Way::Vhost].into_iter().filter(|way| wanted.contains(&Export::OursPlain(*way)));
        let mut shown: Vec<(Way, PathBuf, PathBuf)> = Vec::new();
        let mut command = Command::new(ours::beside("bench-plain-server")?);
        for way in ways {
            let file = self.volumes.join(&format!("plain-{way}.img"));
            let socket = self.sockets.join(&format!("plain-{medium}-{way}.sock"));
            image::create(&file, image::PAYLOAD_OFFSET)?;
            command.arg(way.to_string()).arg(&socket).arg(&file);
            shown.push((way, socket, file));
        }
        if shown.is_empty() {
            return Ok(());
        }
        let mut process = Process::start(command, self.sockets.join(&format!("plain-{medium}.log")))?;
        for (way, socket, file) in shown {
            let export = Export::OursPlain(way);
            let client = connect(&mut process, export, way, socket, "")?;
            let stored = Stored::Clear { file, at: image::PAYLOAD_OFFSET };
            self.stalls.push(Stall { export, client, pids: vec![process.pid()], stored });
        }
        self.processes.push(process);
        Ok(())
    }

    fn add_peers(&mut self, medium: Medium, wanted: &BTreeSet<Export>) -> Result<(), BenchError> {
        let passphrase = peers::passphrase(&self.sockets)?;
        let (raw, luks) =
            ([Way::Nbd, Way::Vhost].map(Export::QemuRaw), [Way::Nbd, Way::Vhost].map(Export::QemuLuks));
        let any = |exports: &[Export]| exports.iter().any(|export| wanted.contains(export));
        let raw_file = any(&raw).then(|| self.volumes.join("raw.img"));
        if let Some(file) = &raw_file {
            image::create(file, 0)?;
        }
        let luks_file = match any(&luks) {
            true => Some(peers::luks(&self.volumes, "luks.img", &passphrase)?),
            false => None,
        };
        if raw_file.is_some() || luks_file.is_some() {
            let (raw_path, luks_path) = (raw_file.as_deref(), luks_file.as_deref());
            let mut daemon = peers::storage_daemon(raw_path, luks_path, &passphrase, medium, &self.sockets)?;
            for (exports, name, file) in [(raw, "raw", &raw_file), (luks, "luks", &luks_file)] {
                let Some(file) = file else { continue };
                for export in exports.into_iter().filter(|export| wanted.contains(export)) {
                    let (way, socket) = match export {
                        Export::QemuRaw(Way::Nbd) | Export::QemuLuks(Way::Nbd) => {
                            (Way::Nbd, peers::nbd_socket(&self.sockets, medium))
                        }
                        _ => (Way::Vhost, peers::vhost_socket(&self.sockets, medium, name)),
                    };
                    let client = connect(&mut daemon, export, way, socket, name)?;
                    let stored = match name {
                        "raw" => Stored::Clear { file: file.clone(), at: 0 },
                        _ => Stored::Luks { file: file.clone(), at: image::luks_payload_offset(file)? },
                    };
                    self.stalls.push(Stall { export, client, pids: vec![daemon.pid()], stored });
                }
            }
            self.processes.push(daemon);
        }
        if wanted.contains(&Export::Nbdkit) {
            let file = peers::luks(&self.volumes, "nbdkit.img", &passphrase)?;
            let (mut process, socket) = peers::nbdkit(&file, &passphrase, medium, &self.sockets)?;
            let client = connect(&mut process, Export::Nbdkit, Way::Nbd, socket, "")?;
            let stored = Stored::Luks { at: image::luks_payload_offset(&file)?, file };
            self.stalls.push(Stall { export: Export::Nbdkit, client, pids: vec![process.pid()], stored });
            self.processes.push(process);
        }
        Ok(())
    }
}

fn connect(
    process: &mut Process,
    export: Export,
    way: Way,
    socket: PathBuf,
    name: &str,
) -> Result<Box<dyn Client>, BenchError> {
    let stream = process.connect(&socket)?;
    Ok(match way {
        Way::Nbd => Box::new(NbdClient::new(stream, &export.to_string(), name)?),
        Way::Vhost => Box::new(Device::new(stream, &export.to_string(), 1)?),
    })
}
