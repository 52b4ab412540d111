//! `vmseal disk`.

use clap::{Args, Subcommand, ValueEnum};
use vmseal_api::{
    disk::{CreateDisk, SetDisk},
    paths,
    vm::Vm,
};
use vmseal_model::{refusal::Code, state::InnerFormat};

use super::{inspect, vm_text};
use crate::{
    class::{ClassArg, ClassArgs},
    context::Context,
    error::CliError,
    follow::{self, WaitArgs},
    output::{self, Format},
    size::Size,
    text::printable,
};

#[derive(Debug, Subcommand)]
pub(super) enum DiskCommand {
    /// Add an empty encrypted disk to a VM
    #[command(
        after_help = "Example:\n  vmseal disk create web01 --target vdb --path /var/lib/libvirt/images/data.img --size 10G"
    )]
    Create(CreateArgs),
    /// Show an encrypted disk: its keys, its class, and what libvirt can and cannot do with it
    #[command(after_help = "Example:\n  vmseal disk show web01 vda")]
    Show(ShowArgs),
    /// Change how QEMU is given a disk, while its VM is off
    #[command(
        after_help = "fast is the quickest way, and libvirt takes no snapshot or backup of such a disk; compatible loses nothing,\n\
                      and runs everywhere; auto is the fastest that loses nothing on all hosts.\n\
                      Example:\n  vmseal disk set --class fast web01 vda"
    )]
    Set(SetArgs),
    /// Print a LUKS header and whether it is accepted; needs no server
    #[command(
        after_help = "The last line is accept, accept (reencryption unfinished, needs the key) or reject: DEFECT.\n\
                      Exit codes: 0 accepted, 3 rejected, 1 cannot be read.\n\
                      Example:\n  vmseal disk inspect /var/lib/libvirt/images/web01.img.vmseal"
    )]
    Inspect(inspect::InspectArgs),
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// VM that gets the disk: name, VM id or libvirt UUID
    vm: String,
    /// Target device name
    #[arg(long, value_name = "NAME")]
    target: String,
    /// Absolute path of the file to make, on the VM's host
    #[arg(long, value_name = "FILE")]
    path: String,
    /// Size the guest sees: 10G is 10 GiB
    #[arg(long)]
    size: Size,
    /// What lies inside the encryption; qcow2 for snapshots and thin disks
    #[arg(long, value_enum, default_value = "raw")]
    format: FormatArg,
    /// Key provider [default: the default provider]
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    #[command(flatten)]
    class: ClassArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// VM that has the disk: name, VM id or libvirt UUID
    vm: String,
    /// Target device name: vda
    disk: String,
}

#[derive(Debug, Args)]
pub(super) struct SetArgs {
    /// VM that has the disk: name, VM id or libvirt UUID
    vm: String,
    /// Target device name: vda
    disk: String,
    /// How QEMU is to be given it
    #[arg(long, value_enum, value_name = "CLASS")]
    class: ClassArg,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormatArg {
    Raw,
    Qcow2,
}

pub(super) fn run(context: &Context, command: &DiskCommand) -> Result<u8, CliError> {
    match command {
        DiskCommand::Inspect(args) => inspect::run(context, args),
        DiskCommand::Create(args) => create(context, args),
        DiskCommand::Show(args) => show(context, args),
        DiskCommand::Set(args) => set(context, args),
    }
}

fn set(context: &Context, args: &SetArgs) -> Result<u8, CliError> {
    let body = SetDisk { target: args.disk.clone(), class: args.class.into() };
    let client = context.client()?;
    let answer = client.post(&paths::fill(paths::VM_DISK_SET, &args.vm), &body)?;
    follow::begun(context, &client, &answer, &args.wait)
}

fn show(context: &Context, args: &ShowArgs) -> Result<u8, CliError> {
    let vm: Vm = context.client()?.get(&paths::fill(paths::VM, &args.vm))?.read()?;
    let Some(disk) = vm.disks.iter().find(|disk| disk.target == args.disk) else {
        let there: Vec<_> = vm.disks.iter().map(|disk| printable(&disk.target)).collect();
        let text = format!("{} has no disk {}", printable(&vm.name), args.disk);
        return Err(CliError::coded(Code::NotFound, text).hint(format!("it has: {}", there.join(", "))));
    };
    match context.output {
        Format::Json => output::json(&serde_json::to_value(disk).expect("a disk is plain data"))?,
        Format::Table => output::data(&vm_text::disk(&vm, disk))?,
    }
    Ok(0)
}

fn create(context: &Context, args: &CreateArgs) -> Result<u8, CliError> {
    let format = match args.format {
        FormatArg::Raw => InnerFormat::Raw,
        FormatArg::Qcow2 => InnerFormat::Qcow2,
    };
    let body = CreateDisk {
        target: args.target.clone(),
        path: args.path.clone(),
        format,
        bytes: args.size.0,
        provider: args.provider.clone(),
        class: args.class.choice(),
    };
    let client = context.client()?;
    let answer = client.post(&paths::fill(paths::VM_DISKS, &args.vm), &body)?;
    follow::begun(context, &client, &answer, &args.wait)
}
