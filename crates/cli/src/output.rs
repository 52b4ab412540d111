//! What a command says: data to stdout, as a table for people or as JSON for programs; all else to stderr.

use std::io::{self, ErrorKind, Write};

use clap::ValueEnum;
use comfy_table::{Table, presets};

use crate::{error::CliError, style, text::printable};

/// How data is written to stdout: a table for people, which may change, or the API's object, which is stable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    // No doc comments here: they would turn the help of every command into its long form.
    Table,
    Json,
}

/// Writes data to stdout, with a newline. A reader that has gone (`| head`) is no error.
pub(crate) fn data(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(CliError::failed(format!("cannot write to standard output: {e}")))
        }
        _ => Ok(()),
    }
}

/// Writes JSON to stdout, indented.
pub(crate) fn json(value: &serde_json::Value) -> Result<(), CliError> {
    data(&format!("{value:#}"))
}

/// Tells the person at the terminal something that is no data.
pub(crate) fn note(text: &str) {
    eprintln!("{}", printable(text));
}

/// Warns: the command goes on.
pub(crate) fn warn(text: &str) {
    eprintln!("{} {}", style::warning("warning:", style::on_stderr()), printable(text));
}

/// A list: one row a line, two spaces between columns, no frame, so that `awk` and people both read it.
pub(crate) fn table<const N: usize>(heads: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(heads);
    for row in rows {
        table.add_row(row.iter().map(|cell| match printable(cell) {
            empty if empty.is_empty() => "-".into(),
            text => text,
        }));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// `name: value` lines; rows with an empty value are left out.
pub(crate) fn fields<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let lines: Vec<String> = rows
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{name}: {}", printable(&value)))
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_no_frame_and_no_trailing_blanks() {
        let rows = [["web01".to_owned(), "encrypted".to_owned()], ["a\nb".to_owned(), String::new()]];
        assert_eq!(table(["NAME", "COVERAGE"], rows), "NAME   COVERAGE\nweb01  encrypted\na\\nb   -");
    }

    #[test]
    fn empty_table_still_names_its_columns() {
        assert_eq!(table(["NAME", "STATE"], []), "NAME  STATE");
    }

    #[test]
    fn field_without_value_is_left_out() {
        assert_eq!(
            fields([("name", "a".into()), ("host", String::new()), ("x", "1".into())]),
            "name: a\nx: 1"
        );
    }
}
