//! `--class`: how QEMU is given a disk.

use clap::{Args, ValueEnum};
use vmseal_model::class::ClassChoice;

/// The option where a disk is made or encrypted.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ClassArgs {
    /// How QEMU is given it; auto loses nothing, fast gives up libvirt's snapshots and backup
    #[arg(long, value_enum, value_name = "CLASS", default_value = "auto")]
    class: ClassArg,
}

impl ClassArgs {
    /// What was asked for.
    pub(crate) fn choice(&self) -> ClassChoice {
        self.class.into()
    }
}

/// A class, as it is written on the command line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ClassArg {
    #[default]
    Auto,
    Compatible,
    Fast,
}

impl From<ClassArg> for ClassChoice {
    fn from(arg: ClassArg) -> Self {
        match arg {
            ClassArg::Auto => Self::Auto,
            ClassArg::Compatible => Self::Compatible,
            ClassArg::Fast => Self::Fast,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_choice_is_written_by_its_word() {
        let words: Vec<_> = ClassArg::value_variants()
            .iter()
            .map(|arg| arg.to_possible_value().unwrap().get_name().to_owned())
            .collect();
        let choices: Vec<_> = ClassChoice::ALL.iter().map(|choice| choice.as_str().to_owned()).collect();
        assert_eq!(words, choices);
        for arg in ClassArg::value_variants() {
            let word = arg.to_possible_value().unwrap().get_name().to_owned();
            assert_eq!(ClassChoice::from(*arg).as_str(), word);
        }
    }
}
