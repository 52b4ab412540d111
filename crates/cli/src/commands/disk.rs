//! `vmseal disk`.

use clap::{Args, Subcommand, ValueEnum};
use vmseal_api::{disk::CreateDisk, paths};
use vmseal_model::state::InnerFormat;

use super::inspect;
use crate::{
    context::Context,
    error::CliError,
    follow::{self, WaitArgs},
    size::Size,
};

#[derive(Debug, Subcommand)]
pub(super) enum DiskCommand {
    /// Add an empty encrypted disk to a VM
    #[command(
        after_help = "Example:\n  vmseal disk create web01 --target vdb --path /var/lib/libvirt/images/data.img --size 10G"
    )]
    Create(CreateArgs),
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
    wait: WaitArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormatArg {
    Raw,
    Qcow2,
}

pub(super) fn run(context: &Context, command: &DiskCommand) -> Result<u8, CliError> {
    let args = match command {
        DiskCommand::Inspect(args) => return inspect::run(context, args),
        DiskCommand::Create(args) => args,
    };
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
    };
    let client = context.client()?;
    let answer = client.post(&paths::fill(paths::VM_DISKS, &args.vm), &body)?;
    follow::begun(context, &client, &answer, &args.wait)
}
