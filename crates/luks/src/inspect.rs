//! The verdict on a header, for anybody, without a key and without a server.

use std::{
    fmt,
    io::{self, Read, Seek},
};

use crate::{
    copies::{self, Found},
    describe::Description,
    error::Defect,
    policy::{self, Kind},
    source::AtCursor,
};

/// What a header is.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// Sound, and as we accept it.
    Accept(Box<Description>),
    /// Sound, with a reencryption that was begun; whether it is genuine, only the key can tell.
    AcceptReencrypting(Box<Description>),
    /// Not to be used, and why. What can be read of it is described all the same.
    Reject(Defect, Option<Box<Description>>),
}

impl Verdict {
    /// Whether it is accepted.
    pub fn accepted(&self) -> bool {
        !matches!(self, Self::Reject(..))
    }

    /// What the header says, where it could be read.
    pub fn description(&self) -> Option<&Description> {
        match self {
            Self::Accept(d) | Self::AcceptReencrypting(d) => Some(d),
            Self::Reject(_, d) => d.as_deref(),
        }
    }
}

impl fmt::Display for Verdict {
    /// One line: `accept`, `accept (reencryption unfinished, needs the key)` or `reject: <defect>`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept(_) => f.write_str("accept"),
            Self::AcceptReencrypting(_) => f.write_str("accept (reencryption unfinished, needs the key)"),
            Self::Reject(defect, _) => write!(f, "reject: {defect}"),
        }
    }
}

/// Judges the header of whatever reads and seeks. `detached`: a header in a file of its own; `None`: either.
///
/// # Errors
///
/// Only when reading fails; anything that can be read gets a verdict.
pub fn inspect(file: &mut (impl Read + Seek), detached: Option<bool>) -> io::Result<Verdict> {
    Ok(match copies::load(&mut AtCursor(file), detached)? {
        Found::NotLuks(why) => Verdict::Reject(Defect::new(format!("not a LUKS volume: {why}")), None),
        Found::Luks1 => Verdict::Reject(Defect::new("LUKS1, import it"), None),
        Found::Damaged(why) => Verdict::Reject(why, None),
        Found::Whole(loaded) => {
            let description = Box::new(Description::of(&loaded.metadata));
            match policy::check(&loaded.metadata) {
                Ok(Kind::Plain) => Verdict::Accept(description),
                Ok(Kind::Reencrypting) => Verdict::AcceptReencrypting(description),
                Err(why) => Verdict::Reject(why, Some(description)),
            }
        }
    })
}
