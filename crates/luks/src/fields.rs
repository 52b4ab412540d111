//! Reading an object's members by name and type, with the path in every complaint.

use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::{
    error::{Defect, Judged, quoted, reject},
    json::{Json, Object},
};

/// Most names in a list: more keyslots, segments or digests than LUKS2 has room for.
const MAX_REFERENCES: usize = 64;

/// An object and where it stands, such as `segments.0`; the outermost stands nowhere.
pub(crate) struct Fields<'a> {
    at: String,
    object: &'a Object,
}

impl<'a> Fields<'a> {
    /// `value` as an object.
    pub(crate) fn of(at: impl Into<String>, value: &'a Json) -> Judged<Self> {
        let at = at.into();
        match value.as_object() {
            Some(object) => Ok(Self { at, object }),
            None => reject!("{at} is no object"),
        }
    }

    /// The member of this name, whatever it is.
    pub(crate) fn any(&self, name: &str) -> Option<&'a Json> {
        self.object.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// The path of a member, such as `segments.0.type`.
    fn path(&self, name: &str) -> String {
        if self.at.is_empty() { name.to_owned() } else { format!("{}.{name}", self.at) }
    }

    fn wrong(&self, name: &str, wanted: &str) -> Defect {
        let path = self.path(name);
        match self.any(name) {
            Some(_) => Defect::new(format!("{path} is not {wanted}")),
            None => Defect::new(format!("{path} is missing")),
        }
    }

    /// Text.
    pub(crate) fn text(&self, name: &str) -> Judged<&'a str> {
        self.any(name).and_then(Json::as_text).ok_or_else(|| self.wrong(name, "text"))
    }

    /// A whole number, written as a JSON number.
    pub(crate) fn int(&self, name: &str) -> Judged<u64> {
        self.any(name).and_then(Json::as_u64).ok_or_else(|| self.wrong(name, "a whole number"))
    }

    /// A 64-bit number, written as text in decimal, as LUKS2 does for what JSON numbers cannot hold.
    pub(crate) fn decimal(&self, name: &str) -> Judged<u64> {
        let wrong = || self.wrong(name, "a number in decimal text");
        let text = self.any(name).and_then(Json::as_text).ok_or_else(wrong)?;
        // `parse` alone would take a sign.
        if text.len() > 20 || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        text.parse().map_err(|_| wrong())
    }

    /// A list of texts.
    pub(crate) fn texts(&self, name: &str) -> Judged<Vec<String>> {
        let wrong = || self.wrong(name, "a list of texts");
        let items = self.any(name).and_then(Json::as_list).ok_or_else(wrong)?;
        items.iter().map(|item| item.as_text().map(str::to_owned).ok_or_else(wrong)).collect()
    }

    /// A list of names of numbered members, such as `["0","3"]`, each once.
    pub(crate) fn references(&self, name: &str) -> Judged<Vec<u32>> {
        let mut out = Vec::new();
        for item in self.texts(name)? {
            if out.len() >= MAX_REFERENCES {
                reject!("{} lists more than {MAX_REFERENCES}", self.path(name));
            }
            match number_name(&item) {
                Some(number) if !out.contains(&number) => out.push(number),
                Some(_) => reject!("{} lists {} twice", self.path(name), quoted(&item)),
                None => reject!("{} lists {}, which is no number", self.path(name), quoted(&item)),
            }
        }
        Ok(out)
    }

    /// Bytes in base64.
    pub(crate) fn base64(&self, name: &str, len: std::ops::RangeInclusive<usize>) -> Judged<Vec<u8>> {
        let bytes = STANDARD
            .decode(self.text(name)?)
            .map_err(|_| Defect::new(format!("{} is no base64", self.path(name))))?;
        if !len.contains(&bytes.len()) {
            let (path, has) = (self.path(name), bytes.len());
            reject!("{path} has {has} bytes, {} to {} are allowed", len.start(), len.end());
        }
        Ok(bytes)
    }

    /// An object within.
    pub(crate) fn inner(&self, name: &str) -> Judged<Fields<'a>> {
        match self.any(name) {
            Some(value) => Fields::of(self.path(name), value),
            None => Err(self.wrong(name, "an object")),
        }
    }

    /// Numbered objects within, at most `limit`, in numeric order.
    pub(crate) fn numbered(&self, name: &str, limit: u32) -> Judged<Vec<(u32, Fields<'a>)>> {
        let inner = self.inner(name)?;
        if inner.object.len() > limit as usize {
            reject!("{} has {} members, {limit} are allowed", inner.at, inner.object.len());
        }
        let mut out = Vec::new();
        for (key, value) in inner.object {
            match number_name(key) {
                Some(number) if number < limit => {
                    out.push((number, Fields::of(format!("{}.{number}", inner.at), value)?));
                }
                _ => reject!("{} has a member {}, expected are 0 to {}", inner.at, quoted(key), limit - 1),
            }
        }
        out.sort_by_key(|(number, _)| *number);
        Ok(out)
    }
}

/// The number of a member's name in its only spelling: no sign, no leading zero.
fn number_name(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_text_have_digits_only_and_fit_64_bits() {
        for (text, number) in [
            ("0", Some(0)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("-1", None),
            ("+1", None),
            ("0x10", None),
            (" 1", None),
            ("", None),
            ("٣", None),
        ] {
            let value = Json::object([("n", Json::text(text))]);
            assert_eq!(Fields::of("x", &value).unwrap().decimal("n").ok(), number, "{text:?}");
        }
        let value = Json::object([("n", Json::Number(3.into()))]);
        assert!(Fields::of("x", &value).unwrap().decimal("n").is_err());
    }

    #[test]
    fn member_names_have_one_spelling() {
        for bad in ["00", "+1", "-1", "1 ", "", "x", "4294967296"] {
            assert_eq!(number_name(bad), None, "{bad:?}");
        }
        assert_eq!(number_name("31"), Some(31));
    }

    #[test]
    fn complaint_names_the_path() {
        let value = Json::object([("0", Json::object([("type", Json::Number(7.into()))]))]);
        let outer = Json::object([("segments", value)]);
        let fields = Fields::of("", &outer).unwrap();
        let segments = fields.numbered("segments", 32).unwrap();
        assert_eq!(segments[0].1.text("type").unwrap_err().to_string(), "segments.0.type is not text");
    }
}
