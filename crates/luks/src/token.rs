//! Our token: the key records of a disk, kept in its own header.
//!
//! In go records as opaque bytes; out comes the JSON of a token of type `vmseal`, and back. A record found here is a
//! candidate only: whoever uses it verifies it, so a damaged token is an absent one.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Number;
use vmseal_model::record::MAX_RECORD_LEN;

use crate::json::{Json, Object};

/// The token's `type`.
pub const TOKEN_TYPE: &str = "vmseal";
/// The token's `version`.
const VERSION: u64 = 1;
/// Most records that are read out of a token.
pub const MAX_RECORDS: usize = 32;

/// Key records in a header.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VmsealToken {
    /// Encoded key records, the disk's own first.
    pub records: Vec<Vec<u8>>,
}

impl VmsealToken {
    /// `{"type":"vmseal","keyslots":[],"version":1,"records":["…"]}`.
    pub(crate) fn to_json(&self) -> Json {
        let records = self.records.iter().map(|record| STANDARD.encode(record));
        Json::object([
            ("type", Json::text(TOKEN_TYPE)),
            ("keyslots", Json::List(Vec::new())),
            ("version", Json::Number(Number::from(VERSION))),
            ("records", Json::texts(records)),
        ])
    }

    /// The token, if it is ours and whole.
    pub(crate) fn from_json(token: &Json) -> Option<Self> {
        let ours = is_ours(token) && token.get("version").and_then(Json::as_u64) == Some(VERSION);
        let records = token.get("records").and_then(Json::as_list)?;
        if !ours || records.len() > MAX_RECORDS {
            return None;
        }
        let decode = |item: &Json| {
            let text = item.as_text().filter(|text| text.len() <= MAX_RECORD_LEN.div_ceil(3) * 4)?;
            STANDARD.decode(text).ok()
        };
        records.iter().map(decode).collect::<Option<Vec<_>>>().map(|records| Self { records })
    }

    /// The whole token with the lowest number.
    pub(crate) fn find(tokens: &Json) -> Option<Self> {
        let mut ours: Vec<_> = tokens.as_object()?.iter().filter(|(_, token)| is_ours(token)).collect();
        ours.sort_by_key(|(number, _)| number.parse::<u32>().unwrap_or(u32::MAX));
        ours.iter().find_map(|(_, token)| Self::from_json(token))
    }

    /// Puts this in the place of every token of our type; the others stay. `None` if all numbers are taken.
    pub(crate) fn store(&self, tokens: &mut Object, limit: u32) -> Option<()> {
        let old = tokens.iter().position(|(_, token)| is_ours(token));
        let number = match old {
            Some(at) => tokens[at].0.clone(),
            None => (0..limit).map(|n| n.to_string()).find(|n| tokens.iter().all(|(taken, _)| taken != n))?,
        };
        tokens.retain(|(_, token)| !is_ours(token));
        let at = old.unwrap_or(tokens.len()).min(tokens.len());
        tokens.insert(at, (number, self.to_json()));
        Some(())
    }
}

fn is_ours(token: &Json) -> bool {
    token.get("type").and_then(Json::as_text) == Some(TOKEN_TYPE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_reads_back_and_foreign_tokens_stay() {
        let token = VmsealToken { records: vec![b"first".to_vec(), vec![0; 300]] };
        let foreign = Json::object([("type", Json::text("luks2-keyring")), ("keyslots", Json::texts(["0"]))]);
        let mut tokens: Object = vec![("0".into(), foreign.clone())];
        token.store(&mut tokens, 32).unwrap();
        assert_eq!(tokens[0], ("0".into(), foreign));
        assert_eq!(tokens[1].0, "1");
        assert_eq!(VmsealToken::find(&Json::Object(tokens.clone())), Some(token));
        let next = VmsealToken { records: vec![b"second".to_vec()] };
        next.store(&mut tokens, 32).unwrap();
        assert_eq!(tokens.len(), 2);
        assert_eq!(VmsealToken::find(&Json::Object(tokens)), Some(next));
    }

    #[test]
    fn full_table_takes_no_further_token() {
        let mut tokens: Object =
            (0..32).map(|n| (n.to_string(), Json::object([("type", Json::text("x"))]))).collect();
        assert!(VmsealToken::default().store(&mut tokens, 32).is_none());
        assert_eq!(tokens.len(), 32);
    }

    #[test]
    fn damaged_token_is_no_token() {
        let whole = VmsealToken { records: vec![b"r".to_vec()] }.to_json();
        for (key, value) in [
            ("version", Json::Number(2.into())),
            ("version", Json::text("1")),
            ("records", Json::text("cg==")),
            ("records", Json::texts(["no base64!"])),
            ("records", Json::texts(vec!["cg=="; MAX_RECORDS + 1])),
            ("type", Json::text("other")),
        ] {
            let Json::Object(mut members) = whole.clone() else { panic!("an object") };
            members.iter_mut().find(|(k, _)| k == key).unwrap().1 = value;
            assert_eq!(VmsealToken::from_json(&Json::Object(members)), None, "{key}");
        }
    }
}
