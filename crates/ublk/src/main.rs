//! `vmseal-ublk`: makes one disk a block device of the host. Started beside a VM's disk process, not by hand.

use std::{ffi::OsString, io::Write, path::PathBuf, process::ExitCode, time::Duration};

use vmseal_model::ublk::{MAX_DEPTH, MAX_QUEUES};
use vmseal_ublk::{
    line,
    warden::{self, Arguments},
    with_causes,
};

const USAGE: &str = "\
usage: vmseal-ublk --disk DISK-ID --socket PATH [--queues N] [--depth N] [--linger SECONDS]

Makes the disk whose worker listens at PATH the block device /dev/vmseal/DISK-ID. Says `ready /dev/vmseal/DISK-ID` on
standard output once it may be used, or `failed REASON`. Ends the device on SIGTERM, or when the disk process has ended.
Killed, and started again with the same arguments, it goes on with the device that is there. Needs root and ublk_drv.
Queues: 1 to 16, 1 if not said. Depth: 4 to 255 requests in each, 64 if not said. With --linger the device waits so long
for another disk process at PATH after one has ended; what uses it waits meanwhile.
Exit codes: 0 ended in order, 1 failed, 2 wrong usage.
";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let [only] = &arguments[..]
        && (only == "--version" || only == "-V")
    {
        let _ = writeln!(std::io::stdout(), "vmseal-ublk {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let Some(arguments) = parse(arguments) else {
        let _ = std::io::stderr().write_all(USAGE.as_bytes());
        return ExitCode::from(2);
    };
    // SAFETY: setsid has no arguments. It fails only where this process leads a group already, which is as good.
    unsafe { libc::setsid() };
    match warden::run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody hears it once the device was ready, except in the log.
            let error = with_causes(&error);
            let _ = writeln!(std::io::stdout(), "failed {error}");
            line(format_args!("{error}"));
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: Vec<OsString>) -> Option<Arguments> {
    let (mut disk, mut socket, mut queues, mut depth, mut linger) = (None, None, 1, 64, 0);
    let mut arguments = arguments.into_iter();
    while let Some(option) = arguments.next() {
        let value = arguments.next()?;
        match option.to_str()? {
            "--disk" => disk = Some(value.to_str()?.parse().ok()?),
            "--socket" => socket = Some(PathBuf::from(value)),
            "--queues" => queues = value.to_str()?.parse().ok()?,
            "--depth" => depth = value.to_str()?.parse().ok()?,
            "--linger" => linger = value.to_str()?.parse().ok()?,
            _ => return None,
        }
    }
    if !(1..=MAX_QUEUES).contains(&queues) || !(4..MAX_DEPTH).contains(&depth) {
        return None;
    }
    Some(Arguments { disk: disk?, socket: socket?, queues, depth, linger: Duration::from_secs(linger) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<Arguments> {
        parse(text.split_whitespace().map(OsString::from).collect())
    }

    #[test]
    fn arguments_are_all_there_and_possible_or_none_is_taken() {
        let disk = "--disk 04040404-0404-0404-0404-040404040404";
        let good = parsed(&format!("{disk} --socket /run/x --queues 4 --depth 128")).unwrap();
        assert_eq!((good.queues, good.depth), (4, 128));
        assert!(parsed(&format!("{disk} --socket /run/x")).is_some());
        for bad in [
            disk.to_owned(),
            "--socket /run/x".into(),
            "--disk vda --socket /run/x".into(),
            format!("{disk} --socket"),
            format!("{disk} --socket /run/x --queues 0"),
            format!("{disk} --socket /run/x --queues 17"),
            format!("{disk} --socket /run/x --depth 256"),
            format!("{disk} --socket /run/x --depth 3"),
            format!("{disk} --socket /run/x --depth many"),
            format!("{disk} --socket /run/x --linger -1"),
            format!("{disk} --socket /run/x --fast yes"),
        ] {
            assert!(parsed(&bad).is_none(), "{bad}");
        }
    }
}
