//! An error with everything behind it, on one line.

/// The error's text and its sources', each once, separated by colons.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        // Some libraries repeat their source in their own text.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read web01.img")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn sources_follow_once() {
        let inner = || std::io::Error::other("no such disk");
        assert_eq!(causes(&Outer(inner())), "cannot read web01.img: no such disk");
        assert_eq!(causes(&inner()), "no such disk");
    }
}
