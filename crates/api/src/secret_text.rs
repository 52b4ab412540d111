//! Text that must not be printed: passwords and tokens on their way over the API.
//!
//! It is zeroed when dropped. It serialises, since a client has to send it; nothing else of it can be seen.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// A password or token.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, format = Password)]
pub struct SecretText(Zeroizing<String>);

impl SecretText {
    /// Takes the text over.
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The text.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_nothing_and_json_is_the_bare_text() {
        let secret = SecretText::new("VMSEAL-TEST-SECRET".into());
        assert_eq!(format!("{secret:?}"), "SecretText(…)");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"VMSEAL-TEST-SECRET\"");
    }
}
