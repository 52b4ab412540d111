//! `vmseal vm`: what administrators come for.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal, Read},
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use vmseal_api::{
    paths,
    task::Task,
    vm::{CreateVm, DecryptVm, EncryptVm, Vm},
};
use vmseal_model::task::SourceFate;

use super::vm_text;
use crate::{
    class::ClassArgs,
    client::Client,
    context::Context,
    error::CliError,
    follow::{self, WaitArgs},
    list, secret_file,
    size::TargetSize,
    when,
};

const MAX_XML_BYTES: u64 = 4 << 20;

#[derive(Debug, Subcommand)]
pub(super) enum VmCommand {
    /// List VMs: how much of each is encrypted, what it does
    #[command(after_help = "Example:\n  vmseal vm list")]
    List,
    /// Show a VM: disks, keys, why it is locked, what of it is not yet protected
    #[command(after_help = "Example:\n  vmseal vm show web01")]
    Show(NameArgs),
    /// Encrypt the disks of a VM that is off
    #[command(after_help = "Example:\n  vmseal vm encrypt web01 --disk vda")]
    Encrypt(EncryptArgs),
    /// Decrypt the disks of a VM that is off
    #[command(after_help = "Example:\n  vmseal vm decrypt web01")]
    Decrypt(DecryptArgs),
    /// Make a VM with encrypted disks from domain XML
    #[command(
        after_help = "Example:\n  vmseal vm create --xml web02.xml --disk-size vda=20G\nwhere virt-install --print-xml wrote web02.xml"
    )]
    Create(CreateArgs),
    /// Start the disk processes of a running VM again, and mend copies of its records
    #[command(after_help = "Example:\n  vmseal vm repair web01")]
    Repair(RepairArgs),
    /// Accept a VM that came under other ids: restored, copied or defined anew
    #[command(after_help = "Example:\n  vmseal vm adopt web01")]
    Adopt(NameArgs),
}

#[derive(Debug, Args)]
pub(super) struct NameArgs {
    /// Name, VM id or libvirt UUID
    name: String,
}

#[derive(Debug, Args)]
pub(super) struct EncryptArgs {
    /// Name, VM id or libvirt UUID
    name: String,
    /// Only this disk; may be given again [default: every clear disk]
    #[arg(long = "disk", value_name = "TARGET")]
    disks: Vec<String>,
    /// Key provider [default: the default provider]
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    #[command(flatten)]
    class: ClassArgs,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(super) struct DecryptArgs {
    /// Name, VM id or libvirt UUID
    name: String,
    /// Only this disk; may be given again [default: every encrypted disk]
    #[arg(long = "disk", value_name = "TARGET")]
    disks: Vec<String>,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(super) struct SourceArgs {
    /// Leave the old file where it is
    #[arg(long, conflicts_with = "wipe_source")]
    keep_source: bool,
    /// Overwrite and delete the old file once the new one is verified (the default)
    #[arg(long)]
    wipe_source: bool,
}

impl SourceArgs {
    fn fate(&self) -> SourceFate {
        if self.keep_source { SourceFate::Keep } else { SourceFate::Wipe }
    }
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// Domain XML; - for standard input
    #[arg(long, value_name = "FILE|-")]
    xml: PathBuf,
    /// Size of a disk whose file does not exist yet; may be given again
    #[arg(long = "disk-size", value_name = "TARGET=SIZE")]
    sizes: Vec<TargetSize>,
    /// On this host [default: the only one]
    #[arg(long, value_name = "NAME")]
    host: Option<String>,
    /// Key provider [default: the default provider]
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    #[command(flatten)]
    class: ClassArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(super) struct RepairArgs {
    /// Name, VM id or libvirt UUID
    name: String,
    #[command(flatten)]
    wait: WaitArgs,
}

pub(super) fn run(context: &Context, command: &VmCommand) -> Result<u8, CliError> {
    let client = context.client()?;
    match command {
        VmCommand::List => {
            let vms = list::pages::<Vm>(&client, paths::VMS)?;
            context.show_list(&vms.json, || vm_text::table(&vms.items))?;
            Ok(0)
        }
        VmCommand::Show(args) => {
            let answer = client.get(&paths::fill(paths::VM, &args.name))?;
            context.show(&answer, || Ok(vm_text::render(&answer.read()?, when::now_ms())))?;
            Ok(0)
        }
        VmCommand::Encrypt(args) => {
            let body = EncryptVm {
                disks: args.disks.clone(),
                provider: args.provider.clone(),
                class: args.class.choice(),
                source: args.source.fate(),
            };
            let answer = client.post(&paths::fill(paths::VM_ENCRYPT, &args.name), &body)?;
            follow::begun(context, &client, &answer, &args.wait)
        }
        VmCommand::Decrypt(args) => {
            let body = DecryptVm { disks: args.disks.clone(), source: args.source.fate() };
            let answer = client.post(&paths::fill(paths::VM_DECRYPT, &args.name), &body)?;
            follow::begun(context, &client, &answer, &args.wait)
        }
        VmCommand::Create(args) => create(context, &client, args),
        VmCommand::Repair(args) => {
            let answer = client.post_empty(&paths::fill(paths::VM_REPAIR, &args.name))?;
            match answer.read::<Task>() {
                Ok(_) => follow::begun(context, &client, &answer, &args.wait),
                Err(_) => context.done(&answer, &format!("{}: repaired", args.name)).map(|()| 0),
            }
        }
        VmCommand::Adopt(args) => {
            let answer = client.post_empty(&paths::fill(paths::VM_ADOPT, &args.name))?;
            context.done(&answer, &format!("{}: its ids are known now", args.name))?;
            Ok(0)
        }
    }
}

fn create(context: &Context, client: &Client, args: &CreateArgs) -> Result<u8, CliError> {
    let mut disk_bytes = BTreeMap::new();
    for TargetSize { target, size } in &args.sizes {
        if disk_bytes.insert(target.clone(), size.0).is_some() {
            return Err(CliError::usage(format!("--disk-size names {target} twice")));
        }
    }
    let xml = read_xml(&args.xml)?;
    let (host, provider, class) = (args.host.clone(), args.provider.clone(), args.class.choice());
    let body = CreateVm { host, xml, disk_bytes, provider, class };
    let answer = client.post(paths::VMS, &body)?;
    follow::begun(context, client, &answer, &args.wait)
}

fn read_xml(path: &Path) -> Result<String, CliError> {
    let bytes = if path == Path::new("-") {
        let stdin = io::stdin();
        if stdin.is_terminal() {
            return Err(CliError::usage("standard input is a terminal, domain XML is expected")
                .hint("virt-install … --print-xml | vmseal vm create --xml -"));
        }
        let mut bytes = Vec::new();
        stdin
            .take(MAX_XML_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| CliError::file("read", Path::new("standard input"), &e))?;
        if bytes.len() as u64 > MAX_XML_BYTES {
            return Err(CliError::usage(format!("domain XML of more than {MAX_XML_BYTES} bytes")));
        }
        bytes
    } else {
        secret_file::read(path, MAX_XML_BYTES)?.to_vec()
    };
    String::from_utf8(bytes).map_err(|_| CliError::usage(format!("{} is not UTF-8 text", path.display())))
}
