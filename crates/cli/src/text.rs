//! Text from elsewhere (names, messages, paths) made safe for a terminal.

use std::borrow::Cow;

/// The text with every control character escaped, so that a VM's name can neither move the cursor nor fake a line.
/// Characters that turn the direction of writing count as control characters.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(drives_terminal) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if drives_terminal(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    Cow::Owned(out)
}

fn drives_terminal(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_stays_as_it_is() {
        assert_eq!(printable("web01 ü ✓"), "web01 ü ✓");
    }

    #[test]
    fn control_characters_are_shown_and_not_obeyed() {
        assert_eq!(printable("a\u{1b}]0;x\u{7}\r\n\u{202e}b"), "a\\u{1b}]0;x\\u{7}\\r\\n\\u{202e}b");
    }
}
