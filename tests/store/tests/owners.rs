//! Two that want one volume: never do two write, whoever is stopped or killed meanwhile and whatever of theirs is still
//! under way. They lock as the agent does. Needs root.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use vmseal_agent::lock::{Claim, LockError, claim, claim_soon};
use vmseal_keys::random_bytes;
use vmseal_luks::{HEADER_BYTES, OwnerBlock, OwnerState};
use vmseal_model::id::{HostId, VmId};
use vmseal_test_store::{
    disk_process::{DiskProcess, Scratch, kill},
    entry::Entry,
    fault::{Action, Fault, Kind},
    mount::{Caching, Mounted},
    nbd_client::Request,
    seed::Random,
    stamp::{BLOCK, Content, explain, stamped},
    volume::{Shape, Volume},
};

struct House {
    scratch: Scratch,
    volume: Volume,
    mounted: Mounted,
}

impl House {
    fn new(caching: Caching) -> Self {
        let vm = VmId::from_random(random_bytes().unwrap());
        let volume = Volume::make(vm, Shape::fixed(512, 64 * BLOCK), &stamped(0, 64, 0xffff));
        let mounted =
            Mounted::new(volume.medium.clone(), caching).expect("the test store needs root and FUSE");
        let scratch = Scratch::new();
        fs::write(scratch.path("record"), volume.record.encode()).unwrap();
        fs::write(scratch.path("key"), volume.payload).unwrap();
        Self { scratch, volume, mounted }
    }

    fn racer(&self, number: u8) -> Racer {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmseal-store-racer"))
            .arg(self.mounted.path())
            .args([self.scratch.path("record"), self.scratch.path("key")])
            .arg(number.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut racer = Racer { child, orders, answers };
        assert_eq!(racer.says(), "ready");
        racer
    }

    /// Who wrote, in order, each as often as it took turns.
    fn writers(&self) -> Vec<u64> {
        let mut writers: Vec<u64> = Vec::new();
        for entry in self.volume.medium.take_log().0 {
            let Entry::Write { offset, data, .. } = entry else { continue };
            let writer = if offset >= HEADER_BYTES {
                match explain(&data[..BLOCK as usize]) {
                    Content::Stamped { write, .. } => write,
                    other => panic!("{other:?} was written"),
                }
            } else {
                let block = OwnerBlock::decode(data[..].try_into().unwrap()).unwrap();
                u64::from(block.host.to_bytes()[0])
            };
            if writers.last() != Some(&writer) {
                writers.push(writer);
            }
        }
        writers
    }
}

struct Racer {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Racer {
    fn says(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn order(&mut self, word: &str) {
        writeln!(self.orders, "{word}").unwrap();
    }

    fn signal(&self, signal: i32) {
        kill(self.child.id() as i32, signal);
    }

    /// From "held" to the end.
    fn write_and_release(&mut self) {
        for _ in 0..2 {
            self.order("write");
            assert_eq!(self.says(), "wrote");
        }
        assert_eq!(self.says(), "released");
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Racer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What becomes of the one who was first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Writes and goes at once; the other may have it then.
    Goes,
    /// Stays until the other was refused.
    Stays,
    /// Is stopped with a write under way, until the other was refused.
    Stopped,
    /// Is killed with a write under way, which ends only after the other was refused.
    Killed,
}

/// Two at the same time; gives who had it, first and last.
fn race(house: &House, fate: Fate) -> Vec<u64> {
    let medium = &house.volume.medium;
    medium.take_log();
    let mut both = [house.racer(1), house.racer(2)];
    if matches!(fate, Fate::Stopped | Fate::Killed) {
        medium.inject(Fault::on(Kind::Write, Action::Hold).within(HEADER_BYTES..u64::MAX).times(1));
    }
    for racer in &mut both {
        racer.order("go");
    }
    let first = first_to_answer(&mut both);
    let [one, two] = &mut both;
    let (first, second) = if first == 0 { (one, two) } else { (two, one) };
    // One that has it may be slower to say so than the other to give up.
    let (winner, loser, refused) = match first.says().as_str() {
        "held" => (first, second, false),
        "refused" => {
            assert_eq!(second.says(), "held", "one of both has it");
            (second, first, true)
        }
        other => panic!("{other}"),
    };
    match fate {
        Fate::Goes => winner.write_and_release(),
        Fate::Stays => {
            winner.order("write");
            assert_eq!(winner.says(), "wrote");
        }
        Fate::Stopped => {
            winner.order("write");
            medium.wait_held(1);
            winner.signal(libc::SIGSTOP);
        }
        Fate::Killed => {
            winner.order("write");
            medium.wait_held(1);
            winner.signal(libc::SIGKILL);
        }
    }
    let said = if refused { "refused".to_owned() } else { loser.says() };
    match (fate, said.as_str()) {
        (Fate::Goes, "held") => loser.write_and_release(),
        (_, "refused") => {}
        (_, other) => panic!("{fate:?}, and the other says {other:?}"),
    }
    match fate {
        Fate::Goes => return house.writers(),
        Fate::Stays => {
            winner.order("write");
            assert_eq!((winner.says(), winner.says()), ("wrote".into(), "released".into()));
        }
        Fate::Stopped => {
            medium.release();
            winner.signal(libc::SIGCONT);
            assert_eq!(winner.says(), "wrote");
            winner.order("write");
            assert_eq!((winner.says(), winner.says()), ("wrote".into(), "released".into()));
        }
        Fate::Killed => {
            assert!(winner.child.try_wait().unwrap().is_none(), "a write of its is under way");
            medium.release();
            winner.child.wait().unwrap();
        }
    }
    // Now it is free, and the next one's writes come after everything of the first's.
    let mut next = house.racer(3);
    next.order("go");
    assert_eq!(next.says(), "held");
    next.write_and_release();
    house.writers()
}

/// Which of both said something first. A stopped or waiting one says nothing.
fn first_to_answer(both: &mut [Racer; 2]) -> usize {
    use std::os::fd::AsRawFd;
    let mut polls = [0, 1].map(|n: usize| libc::pollfd {
        fd: both[n].answers.get_ref().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    // SAFETY: two pollfds, valid for the call.
    let ready = unsafe { libc::poll(polls.as_mut_ptr(), 2, 20_000) };
    assert!(ready > 0, "nobody has it");
    usize::from(polls[0].revents == 0)
}

#[test]
fn of_two_that_race_for_a_volume_one_at_a_time_writes() {
    let races = if std::env::var_os("VMSEAL_SOAK").is_some() { 1000 } else { 50 };
    let mut random = Random::for_test("owners");
    let mut counts = [0; 4];
    for number in 0..races {
        // A new volume now and then, for both ways to the store.
        let house = House::new(if number % 2 == 0 { Caching::None } else { Caching::Pages });
        let fate = match random.below(8) {
            0 => Fate::Stays,
            1 => Fate::Stopped,
            2 => Fate::Killed,
            _ => Fate::Goes,
        };
        counts[fate as usize] += 1;
        let writers = race(&house, fate);
        let mut each = writers.clone();
        each.sort_unstable();
        each.dedup();
        assert_eq!(each.len(), writers.len(), "race {number}, {fate:?}: they took turns: {writers:?}");
        assert!(fate == Fate::Goes || writers.last() == Some(&3), "{fate:?}: {writers:?}");
    }
    println!("{races} races: first went, stayed, was stopped, was killed: {counts:?}");
    // Whatever the seed, each fate at least once.
    for fate in [Fate::Goes, Fate::Stays, Fate::Stopped, Fate::Killed] {
        let writers = race(&House::new(Caching::None), fate);
        assert!(writers.len() >= 2 || fate == Fate::Goes, "{fate:?}: {writers:?}");
    }
}

#[test]
fn volume_is_not_free_while_a_killed_workers_writes_are_under_way() {
    for caching in [Caching::None, Caching::Pages] {
        let house = House::new(caching);
        let medium = &house.volume.medium;
        let direct = if caching == Caching::None { libc::O_DIRECT } else { 0 };
        let file = house.mounted.open(direct).unwrap();
        claim(&file, Claim::Volume).unwrap();
        let mut process = DiskProcess::start(&[(&house.volume, &file)]);
        // From here on only keeper and worker have it open.
        drop(file);
        let mut client = process.connect_again(0);
        medium.inject(Fault::on(Kind::Write, Action::Hold).times(4));
        for n in 0..8 {
            let request = Request::Write { offset: n * 4096, data: stamped(n * 8, 8, 1), fua: false };
            client.send(&request).unwrap();
        }
        medium.wait_held(if caching == Caching::None { 4 } else { 1 });
        medium.heal();
        let worker = process.kill_keeper();
        let other = house.mounted.open(0).unwrap();
        assert!(matches!(claim_soon(&other, Claim::Volume), Err(LockError::InUse { .. })), "{caching:?}");
        // Whether the process is still there is of no matter: what it gave to the kernel is.
        worker.ends_within(Duration::from_millis(20));
        assert!(matches!(claim(&other, Claim::Volume), Err(LockError::InUse { .. })), "{caching:?}");
        medium.release();
        worker.wait();
        claim_soon(&other, Claim::Volume).unwrap();
        let before = medium.log().len();
        OwnerBlock::NEVER_HELD.taken_by(HostId::from_bytes([2; 16])).write(&other).unwrap();
        let log = medium.log();
        assert!(
            log.iter().skip(before).all(|entry| matches!(entry, Entry::Flush)
                || matches!(entry, Entry::Write { offset, .. } if *offset < HEADER_BYTES)),
            "{caching:?}: something of the old worker's came late"
        );
        assert_eq!(OwnerBlock::read(&other).unwrap().state, OwnerState::Held);
    }
}
