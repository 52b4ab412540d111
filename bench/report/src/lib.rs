//! What a benchmark says at its end: a table of ratios, `bench/out/NAME.json`, and an exit code.
//!
//! In go rows measured in one run, each with its peer; out comes failure if a row is below its floor. It measures
//! nothing. Rows that this machine cannot have are printed with the reason, and are in no file.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;

/// Ours beside a peer, measured in the same run. Figures of other runs or machines are not compared.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was measured, with its unit.
    pub name: String,
    /// Our figure.
    pub ours: f64,
    /// The peer's, in the same unit.
    pub peer: f64,
    /// Above 1 we are ahead, whichever way the figures count.
    pub ratio: f64,
    /// Below this ratio the benchmark fails; 0 where nothing is demanded.
    pub floor: f64,
}

impl Row {
    /// More is better: bytes or operations a second.
    pub fn more(name: impl Into<String>, ours: f64, peer: f64, floor: f64) -> Self {
        Self { name: name.into(), ours, peer, ratio: ours / peer, floor }
    }

    /// Less is better: time, memory.
    pub fn less(name: impl Into<String>, ours: f64, peer: f64, floor: f64) -> Self {
        Self { name: name.into(), ours, peer, ratio: peer / ours, floor }
    }

    /// Whether nothing was demanded, or that much was reached. A ratio that is no number was not reached.
    pub fn holds(&self) -> bool {
        self.floor <= 0.0 || self.ratio >= self.floor
    }
}

/// The rows of one benchmark, in the order they came.
#[derive(Debug)]
pub struct Report {
    name: &'static str,
    rows: Vec<Row>,
    skipped: Vec<(String, String)>,
}

impl Report {
    /// Of the benchmark whose file is `bench/out/NAME.json`.
    pub fn new(name: &'static str) -> Self {
        Self { name, rows: Vec::new(), skipped: Vec::new() }
    }

    /// One more row.
    pub fn row(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// A row that this machine cannot have, and why.
    pub fn skip(&mut self, name: impl Into<String>, reason: impl Into<String>) {
        self.skipped.push((name.into(), reason.into()));
    }

    /// Prints the table, writes the file; failure if a row is below its floor or the file cannot be written.
    pub fn finish(self) -> ExitCode {
        print!("{}", self.table());
        let mut code = ExitCode::SUCCESS;
        for row in self.rows.iter().filter(|row| !row.holds()) {
            eprintln!("below its floor: {}: {:.2}, floor {:.2}", row.name, row.ratio, row.floor);
            code = ExitCode::FAILURE;
        }
        let folder = out();
        let file = folder.join(self.name).with_extension("json");
        let json = serde_json::to_vec_pretty(&self.rows).map_err(std::io::Error::from);
        if let Err(error) =
            json.and_then(|json| fs::create_dir_all(&folder).and_then(|()| fs::write(&file, json)))
        {
            eprintln!("{}: {error}", file.display());
            code = ExitCode::FAILURE;
        }
        code
    }

    fn table(&self) -> String {
        let names = self.rows.iter().map(|row| &row.name).chain(self.skipped.iter().map(|(name, _)| name));
        let wide = names.map(|name| name.chars().count()).max().unwrap_or(0).max(self.name.len());
        let mut text =
            format!("{:<wide$} {:>11} {:>11} {:>7} {:>7}\n", self.name, "ours", "peer", "ratio", "floor");
        for row in &self.rows {
            let floor = if row.floor > 0.0 { format!("{:.2}", row.floor) } else { "-".to_owned() };
            let mark = if row.holds() { "" } else { "  BELOW" };
            text += &format!(
                "{:<wide$} {:>11.2} {:>11.2} {:>7.2} {floor:>7}{mark}\n",
                row.name, row.ours, row.peer, row.ratio
            );
        }
        for (name, reason) in &self.skipped {
            text += &format!("{name:<wide$} skipped: {reason}\n");
        }
        text
    }
}

/// `bench/out` of the tree this was built in.
fn out() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../out")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_is_above_one_when_we_are_ahead() {
        assert_eq!(Row::more("MB/s", 300.0, 100.0, 2.0).ratio, 3.0);
        assert_eq!(Row::less("us", 5.0, 20.0, 2.0).ratio, 4.0);
    }

    #[test]
    fn row_below_its_floor_or_without_a_number_does_not_hold() {
        assert!(Row::more("at it", 2.0, 1.0, 2.0).holds());
        assert!(Row::more("nothing demanded", 0.1, 1.0, 0.0).holds());
        assert!(!Row::more("below", 1.99, 1.0, 2.0).holds());
        assert!(!Row::more("nothing measured", 0.0, 0.0, 0.5).holds());
    }

    #[test]
    fn table_marks_what_is_below_and_says_why_rows_are_missing() {
        let mut report = Report::new("try");
        report.row(Row::more("below", 1.0, 2.0, 0.8));
        report.row(Row::more("no floor", 1.0, 2.0, 0.0));
        report.skip("vaes", "this processor has no VAES");
        let lines: Vec<String> = report.table().lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[1].ends_with("0.50    0.80  BELOW"), "{}", lines[1]);
        assert!(lines[2].ends_with("0.50       -"), "{}", lines[2]);
        assert_eq!(lines[3], "vaes     skipped: this processor has no VAES");
    }
}
