//! The store below a volume of this process: no kernel in between, for tests of many states.

use std::{io, sync::mpsc};

use vmseal_disk::store::{Run, Store};

use crate::medium::{Answer, Medium, Operation};

/// Does an operation and waits for its answer.
fn call(medium: &Medium, operation: Operation) -> io::Result<Answer> {
    let (tell, told) = mpsc::channel();
    medium.submit(operation, Box::new(move |answer| drop(tell.send(answer))));
    match told.recv() {
        Ok(Answer::Failed(errno)) => Err(io::Error::from_raw_os_error(errno)),
        Ok(answer) => Ok(answer),
        Err(_) => Err(io::Error::other("the store went away")),
    }
}

impl Store for Medium {
    fn len(&self) -> io::Result<u64> {
        Self::len(self)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let Answer::Data(data) = call(self, Operation::Read { offset: at, len: buf.len() })? else {
            return Ok(0);
        };
        buf[..data.len()].copy_from_slice(&data);
        Ok(data.len())
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let operation =
                Operation::Write { offset: at + done as u64, data: buf[done..].to_vec(), thread: 0 };
            match call(self, operation)? {
                Answer::Written(bytes) if bytes > 0 => done += bytes,
                _ => return Err(io::ErrorKind::WriteZero.into()),
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        call(self, Operation::Flush).map(drop)
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        call(self, Operation::Punch { offset: at, len }).map(drop)
    }

    fn run_at(&self, _at: u64, end: u64) -> Run {
        Run { end, hole: false }
    }
}
