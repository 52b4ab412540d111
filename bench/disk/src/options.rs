//! The command line.

use crate::error::BenchError;

const USAGE: &str = "\
usage: bench-disk [--only TEXT]... [--rounds N] [--seconds S]

Without arguments everything is measured, in about eight minutes, and written to
bench/out/disk.json. With --only, just what the rows with this text in their name
need; that and other short runs are written to bench/out/disk-part.json.";

/// What is to be done.
pub(crate) struct Options {
    /// Texts of which a row's name must have one; none means every row.
    pub(crate) only: Vec<String>,
    /// Times that each export gets its turn.
    pub(crate) rounds: usize,
    /// Length of a turn.
    pub(crate) seconds: f64,
    /// Whether this is not the whole benchmark.
    pub(crate) partly: bool,
}

impl Options {
    /// From the arguments.
    pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Self, BenchError> {
        let mut options = Self { only: Vec::new(), rounds: 9, seconds: 0.2, partly: false };
        let usage = || BenchError::Usage(USAGE.to_owned());
        let mut arguments = arguments;
        while let Some(name) = arguments.next() {
            let value = arguments.next().ok_or_else(usage)?;
            options.partly = true;
            match name.as_str() {
                "--only" => options.only.push(value.to_lowercase()),
                "--rounds" => options.rounds = value.parse().ok().filter(|n| *n > 0).ok_or_else(usage)?,
                "--seconds" => {
                    options.seconds =
                        value.parse().ok().filter(|s| (0.01..60.0).contains(s)).ok_or_else(usage)?;
                }
                _ => return Err(usage()),
            }
        }
        Ok(options)
    }

    /// Whether a row of this name is wanted.
    pub(crate) fn wants(&self, name: &str) -> bool {
        let name = name.to_lowercase();
        self.only.is_empty() || self.only.iter().any(|text| name.contains(text.as_str()))
    }
}
