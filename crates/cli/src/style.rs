//! Colour, where a terminal shows it and NO_COLOR (no-color.org) does not forbid it. Meaning never hangs on colour.

use std::{
    env,
    io::{self, IsTerminal},
};

/// Whether stderr gets colour.
pub(crate) fn on_stderr() -> bool {
    allowed() && io::stderr().is_terminal()
}

/// Whether stdout gets colour.
pub(crate) fn on_stdout() -> bool {
    allowed() && io::stdout().is_terminal()
}

fn allowed() -> bool {
    let forbidden = env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    !forbidden && env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Bold red.
pub(crate) fn error(text: &str, color: bool) -> String {
    paint("1;31", text, color)
}

/// Yellow.
pub(crate) fn warning(text: &str, color: bool) -> String {
    paint("33", text, color)
}

/// Cyan.
pub(crate) fn hint(text: &str, color: bool) -> String {
    paint("36", text, color)
}

fn paint(sgr: &str, text: &str, color: bool) -> String {
    if color { format!("\x1b[{sgr}m{text}\x1b[0m") } else { text.to_owned() }
}
