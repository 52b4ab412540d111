//! Named places at which a crash can be asked for: `VMSEAL_FAILPOINT=encrypt:copied:after`.
//!
//! A name in; with the feature `failpoints` the process ends there as by kill -9, without it nothing is compiled in.
//! Names are `<task>:<step>:begin`, `:before` (the step's work is done, its journal entry is not written) and `:after`.

/// The variable that names the place.
pub const VARIABLE: &str = "VMSEAL_FAILPOINT";

/// Ends the process if this place is named.
#[cfg(feature = "failpoints")]
pub fn reach(name: &str) {
    if std::env::var_os(VARIABLE).is_some_and(|wanted| wanted == name) {
        eprintln!("failpoint {name} reached");
        std::process::abort();
    }
}

/// Does nothing: the feature `failpoints` is off.
#[cfg(not(feature = "failpoints"))]
pub fn reach(_name: &str) {}
