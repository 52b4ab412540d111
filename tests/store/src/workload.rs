//! What a guest might do to a disk: requests at random, several under way at a time.

use std::{collections::HashMap, io};

use crate::{
    history::{History, RequestId},
    medium::Medium,
    nbd_client::{Answer, Client, Request},
    seed::Random,
    stamp::{BLOCK, stamped},
    volume::Shape,
};

/// Makes requests for a disk.
pub struct Workload {
    random: Random,
    unit_blocks: u64,
    units: u64,
    /// Number of the last stamp; each write has its own.
    stamp: u64,
    flushes: bool,
}

impl Workload {
    /// For a disk of this shape.
    pub fn new(shape: Shape, random: Random) -> Self {
        let unit = u64::from(shape.unit);
        Self {
            random,
            unit_blocks: unit / BLOCK,
            units: shape.presented / unit,
            stamp: 1 << 20,
            flushes: true,
        }
    }

    /// Without flushes and without writes that are durable at once.
    #[must_use]
    pub fn without_flushes(self) -> Self {
        Self { flushes: false, ..self }
    }

    /// A number below.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    /// A write of so many units at most, somewhere.
    pub fn write(&mut self, most: u64) -> Request {
        let (first, blocks) = self.range(most);
        self.stamp += 1;
        let fua = self.flushes && self.random.chance(1, 12);
        Request::Write { offset: first * BLOCK, data: stamped(first, blocks, self.stamp), fua }
    }

    /// Any request but a read.
    pub fn change(&mut self) -> Request {
        match self.random.below(20) {
            0 | 1 => {
                let (first, blocks) = self.range(4);
                Request::WriteZeroes { offset: first * BLOCK, len: (blocks * BLOCK) as u32 }
            }
            2 => {
                let (first, blocks) = self.range(4);
                Request::Trim { offset: first * BLOCK, len: (blocks * BLOCK) as u32 }
            }
            3..=5 if self.flushes => Request::Flush,
            _ => self.write(5),
        }
    }

    /// A read of anything.
    pub fn read(&mut self) -> Request {
        let (first, blocks) = self.range(12);
        Request::Read { offset: first * BLOCK, len: (blocks * BLOCK) as u32 }
    }

    fn range(&mut self, most: u64) -> (u64, u64) {
        let units = 1 + self.random.below(most.min(self.units));
        let first = self.random.below(self.units - units + 1);
        (first * self.unit_blocks, units * self.unit_blocks)
    }
}

/// A client whose doings are noted.
pub struct Noted<'a> {
    /// The connection.
    pub client: Client,
    /// What happened.
    pub history: &'a mut History,
    medium: &'a Medium,
    under_way: HashMap<u64, (RequestId, Request)>,
    lost: Vec<Request>,
}

impl<'a> Noted<'a> {
    /// A connection to a disk in this store.
    pub fn new(client: Client, history: &'a mut History, medium: &'a Medium) -> Self {
        Self { client, history, medium, under_way: HashMap::new(), lost: Vec::new() }
    }

    /// Sends a request.
    ///
    /// # Errors
    ///
    /// The connection is lost, and that is noted.
    pub fn send(&mut self, request: &Request) -> io::Result<()> {
        let id = self.history.send(request, self.medium);
        match self.client.send(request) {
            Ok(number) => {
                self.under_way.insert(number, (id, request.clone()));
                Ok(())
            }
            Err(error) => {
                self.lost.push(request.clone());
                Err(self.lose(error))
            }
        }
    }

    /// Takes the next answer; gives whether it was a good one.
    ///
    /// # Errors
    ///
    /// As [`Noted::send`].
    pub fn answer(&mut self) -> io::Result<Answer> {
        match self.client.answer() {
            Ok((number, answer)) => {
                if let Some((id, _)) = self.under_way.remove(&number) {
                    self.history.answered(id, answer.clone(), self.medium);
                }
                Ok(answer)
            }
            Err(error) => Err(self.lose(error)),
        }
    }

    /// Takes all answers that are due.
    ///
    /// # Errors
    ///
    /// As [`Noted::send`].
    pub fn answers(&mut self) -> io::Result<Vec<Answer>> {
        (0..self.under_way.len()).map(|_| self.answer()).collect()
    }

    /// Sends a request and waits for all answers; gives the last.
    ///
    /// # Errors
    ///
    /// As [`Noted::send`].
    pub fn call(&mut self, request: &Request) -> io::Result<Answer> {
        self.send(request)?;
        Ok(self.answers()?.pop().unwrap_or(Err(0)))
    }

    fn lose(&mut self, error: io::Error) -> io::Error {
        self.lost.extend(self.under_way.drain().map(|(_, (_, request))| request));
        self.history.lost(self.medium);
        error
    }

    /// Goes on with another connection; gives what was not answered on the old one and is to be sent again.
    pub fn reconnect(&mut self, client: Client) -> Vec<Request> {
        self.client = client;
        std::mem::take(&mut self.lost)
    }
}
