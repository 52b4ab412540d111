//! A flush that failed in one worker has failed for the next one too.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::PathBuf,
};

use vmseal_model::control::{ControlReply, ControlRequest};

use crate::{
    nbd_client::*,
    rig::{MIB, Plan, Rig, Spec, kill, wait_gone},
};

const EIO: Option<u32> = Some(5);

/// The keeper's page, as root or its own user can reach it.
fn page_of(keeper: u32) -> PathBuf {
    let page = fs::read_dir(format!("/proc/{keeper}/fd")).unwrap().map(|entry| entry.unwrap().path());
    page.into_iter()
        .find(|path| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("vmseal-latch")))
        .expect("the keeper has a page")
}

fn restart(rig: &Rig) {
    let worker = rig.status().worker_pid;
    kill(worker, libc::SIGKILL);
    wait_gone(worker);
}

#[test]
fn failed_flush_of_one_disk_is_remembered_by_every_later_worker() {
    let mut rig = Plan::new(&[Spec::fixed(MIB), Spec::fixed(MIB)]).start();
    rig.status();
    // What a worker does whose flush failed: its disk's byte. No system here has a medium that fails on demand.
    let page = OpenOptions::new().read(true).write(true).open(page_of(rig.keeper.id())).unwrap();
    page.write_all_at(&[1], 1).unwrap();
    for _ in 0..2 {
        restart(&rig);
        let mut good = Client::connect(&rig.plan.disks[0].socket).unwrap();
        let mut lost = Client::connect(&rig.plan.disks[1].socket).unwrap();
        good.write(0, &[1; 512], FUA).unwrap();
        good.flush().unwrap();
        lost.write(0, &[1; 512], 0).unwrap();
        assert_eq!(lost.flush().unwrap_err().errno(), EIO);
        assert_eq!(lost.write(0, &[1; 512], FUA).unwrap_err().errno(), EIO);
    }
    // The end in good order is refused for it, too.
    loop {
        match rig.ask(&ControlRequest::Stop { force: false }) {
            ControlReply::Refused { message } if message.contains("may be lost") => break,
            ControlReply::Refused { message } => assert!(message.contains("in use"), "{message}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(rig.stop(true), ControlReply::Stopping);
    assert_eq!(rig.wait_for_keeper().code(), Some(0));
}
