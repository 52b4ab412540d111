//! `vmseal doctor`: findings, each with what to do about it.

use vmseal_api::{
    paths,
    status::{Doctor, Finding},
};

use crate::{
    context::Context,
    error::{self, CliError},
    output::{self, Format},
    style,
    text::printable,
};

pub(super) fn run(context: &Context) -> Result<u8, CliError> {
    let answer = context.client()?.get(paths::DOCTOR)?;
    let doctor: Doctor = answer.read()?;
    match context.output {
        Format::Json => output::json(&answer.json()?)?,
        Format::Table if doctor.findings.is_empty() => output::data("nothing found")?,
        Format::Table => {
            let color = style::on_stdout();
            let blocks: Vec<String> = doctor.findings.iter().map(|f| render(f, color)).collect();
            output::data(&blocks.join("\n"))?;
        }
    }
    Ok(if doctor.findings.is_empty() { 0 } else { error::FAILED })
}

fn render(finding: &Finding, color: bool) -> String {
    let place = finding.host.as_deref().unwrap_or("server");
    let mut text = format!(
        "{} {} [{}]",
        style::warning(&format!("{}:", printable(place)), color),
        printable(&finding.message),
        printable(&finding.code)
    );
    if !finding.hint.is_empty() {
        text.push_str(&format!("\n  {} {}", style::hint("hint:", color), printable(&finding.hint)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finding_names_its_place_and_the_way_out() {
        let mut finding = Finding {
            code: "clear-swap".into(),
            message: "guest memory may be written to /dev/sda3 in the clear".into(),
            hint: "encrypt swap or turn it off".into(),
            host: Some("hv1".into()),
        };
        assert_eq!(
            render(&finding, false),
            "hv1: guest memory may be written to /dev/sda3 in the clear [clear-swap]\n  hint: encrypt swap or turn it off"
        );
        finding.host = None;
        finding.hint = String::new();
        assert!(render(&finding, false).starts_with("server: "));
    }
}
