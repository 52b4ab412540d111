//! Workers that are killed while a guest's requests are in flight. The guest does nothing about it: every request it
//! made is answered once, by whoever is there, and holds.

use std::{path::PathBuf, sync::atomic::Ordering, time::Duration};

use vmseal_model::control::ControlReply;

use crate::{
    rig::{BINARY, MIB, Rig, Spec, pattern, wait_gone},
    upgrade::{copy, upgrade},
    vhost_driver::*,
    vhost_user::{connect, directory_in_memory, kill_worker, rig},
};

const QUEUES: usize = 2;
/// Each slot of each queue writes here and there within its own part.
const PART: u64 = 512 << 10;
const DISK: u64 = QUEUES as u64 * SLOTS as u64 * PART;

/// What a slot has under way, and what its part of the disk holds by what was answered.
struct Guest {
    driver: Driver,
    model: Vec<u8>,
    under_way: Vec<Option<(u64, Vec<u8>)>>,
    rounds: u64,
    answered: usize,
}

impl Guest {
    fn new(rig: &Rig) -> Self {
        let driver = Driver::new(connect(&rig.disk().socket), QUEUES, ALL);
        let slots = QUEUES * usize::from(SLOTS);
        Self { driver, model: vec![0; DISK as usize], under_way: vec![None; slots], rounds: 0, answered: 0 }
    }

    fn place(queue: usize, slot: u16) -> usize {
        queue * usize::from(SLOTS) + usize::from(slot)
    }

    /// Every slot that has nothing under way writes something.
    fn write(&mut self) {
        for queue in 0..QUEUES {
            for slot in 0..SLOTS {
                let place = Self::place(queue, slot);
                if self.under_way[place].is_some() {
                    continue;
                }
                self.rounds += 1;
                let len = 4096usize << (self.rounds % 6);
                let room = (PART - len as u64) / 4096;
                let at = place as u64 * PART + self.rounds.wrapping_mul(0x9e37_79b9) % (room + 1) * 4096;
                let data = pattern(self.rounds, len);
                let shape = Shape { indirect: slot % 2 == 0, pieces: 2, merged: false };
                let head = self.driver.lay_out(queue, slot, OUT, at / 512, &data, 0, shape);
                self.driver.offer(queue, head);
                self.under_way[place] = Some((at, data));
            }
        }
    }

    /// Takes answers until `least` have come, and all that are there.
    fn take(&mut self, mut least: usize) {
        for queue in 0..QUEUES {
            let limit = if least > 0 { Duration::from_secs(30) } else { Duration::ZERO };
            while let Some((head, _)) =
                self.driver.next_used(queue, if least > 0 { limit } else { Duration::ZERO })
            {
                let slot = head / 8;
                assert_eq!(head % 8, 0, "a head nobody offered");
                let (at, data) =
                    self.under_way[Self::place(queue, slot)].take().expect("answered twice, or not asked");
                assert_eq!(self.driver.status(queue, slot, 0, Shape::default()), 0);
                self.model[at as usize..at as usize + data.len()].copy_from_slice(&data);
                self.answered += 1;
                least = least.saturating_sub(1);
            }
        }
    }

    fn finish(&mut self) {
        for queue in 0..QUEUES {
            let left = (0..SLOTS).filter(|slot| self.under_way[Self::place(queue, *slot)].is_some()).count();
            for _ in 0..left {
                let (head, _) = self.driver.next_used(queue, Duration::from_secs(30)).expect("no answer");
                let (at, data) = self.under_way[Self::place(queue, head / 8)].take().expect("answered twice");
                assert_eq!(self.driver.status(queue, head / 8, 0, Shape::default()), 0);
                self.model[at as usize..at as usize + data.len()].copy_from_slice(&data);
            }
            assert_eq!(self.driver.next_used(queue, Duration::from_millis(1)), None, "an answer too many");
        }
    }
}

fn kills(directory: Option<PathBuf>, kills: usize) {
    let rig = replaced(directory, kills, |rig, _| kill_worker(rig));
    assert_eq!(rig.log().matches("died (signal 9)").count(), kills, "{}", rig.log());
}

/// A guest at work while its worker is replaced so often, in this way.
fn replaced(directory: Option<PathBuf>, times: usize, replace: impl Fn(&Rig, usize)) -> Rig {
    let rig = rig(&[Spec { directory, ..Spec::fixed(DISK) }]);
    let mut guest = Guest::new(&rig);
    for round in 0..times {
        // So much is answered before the worker goes, always with more in flight.
        guest.write();
        guest.take(1 + round % 7);
        guest.write();
        replace(&rig, round);
        guest.driver.reconnect(connect(&rig.disk().socket));
    }
    guest.finish();
    for queue in 0..QUEUES {
        let used = guest.driver.memory.word(guest.driver.used_at(queue) + 2).load(Ordering::SeqCst);
        assert_eq!(used, guest.driver.queues[queue].available);
    }
    assert!(rig.disk().stored_plain() == guest.model, "the file holds something else than was acknowledged");
    let (status, first) = guest.driver.read(0, 200 << 10);
    assert!(status == 0 && first == guest.model[..200 << 10]);
    rig
}

#[test]
fn no_request_is_lost_or_answered_twice_when_workers_are_killed() {
    kills(None, 12);
}

#[test]
fn no_request_is_lost_or_answered_twice_when_the_program_is_replaced() {
    let rig = replaced(None, 6, |rig, round| {
        let worker = rig.status().worker_pid;
        let program = copy(rig, BINARY, &format!("new-{round}"));
        assert_eq!(upgrade(rig, &program), ControlReply::Upgrading);
        wait_gone(worker);
    });
    assert_eq!(rig.log().matches("serves from the new program").count(), 6, "{}", rig.log());
}

#[test]
fn the_same_where_the_disk_lies_in_memory() {
    let memory = directory_in_memory("kills");
    kills(Some(memory.0.clone()), 12);
}

#[test]
fn requests_that_nobody_was_there_to_take_are_taken_up() {
    let rig = rig(&[Spec::fixed(8 * MIB)]);
    let mut driver = Driver::new(connect(&rig.disk().socket), 1, ALL);
    assert_eq!(driver.write(0, &[1; 4096]), 0);
    kill_worker(&rig);
    // The kick goes nowhere.
    for slot in 0..SLOTS {
        let head =
            driver.lay_out(0, slot, OUT, u64::from(slot) * 8, &[slot as u8 + 2; 4096], 0, Shape::default());
        driver.offer(0, head);
    }
    driver.reconnect(connect(&rig.disk().socket));
    for _ in 0..SLOTS {
        driver.next_used(0, Duration::from_secs(20)).expect("no answer");
    }
    let (_, read) = driver.read(0, usize::from(SLOTS) * 4096);
    assert!(
        read.chunks(4096).enumerate().all(|(slot, piece)| piece.iter().all(|byte| *byte == slot as u8 + 2))
    );
}
