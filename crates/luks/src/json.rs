//! JSON as it stands in a header: order kept, duplicate keys refused, nothing after the end but NUL bytes.
//!
//! In goes a JSON area; out comes a [`Json`] tree that can be written back with unknown parts unchanged.

use std::{collections::HashSet, fmt};

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error as _, MapAccess, SeqAccess, Visitor},
    ser::{SerializeMap, SerializeSeq},
};
use serde_json::Number;

use crate::error::{Judged, quoted, reject};

/// One JSON value. Objects keep the order of their keys.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Json>),
    Object(Object),
}

/// An object's members in order, no key twice.
pub(crate) type Object = Vec<(String, Json)>;

impl Json {
    /// A JSON text.
    pub(crate) fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// An object.
    pub(crate) fn object<const N: usize>(members: [(&str, Json); N]) -> Self {
        Self::Object(members.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
    }

    /// A list of texts.
    pub(crate) fn texts<T: Into<String>>(items: impl IntoIterator<Item = T>) -> Self {
        Self::List(items.into_iter().map(|item| Self::Text(item.into())).collect())
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Json> {
        match self {
            Self::Object(members) => members.iter().find(|(k, _)| k == key).map(|(_, value)| value),
            _ => None,
        }
    }

    pub(crate) fn object_mut(&mut self, key: &str) -> Option<&mut Object> {
        match self {
            Self::Object(members) => match members.iter_mut().find(|(k, _)| k == key) {
                Some((_, Self::Object(inner))) => Some(inner),
                _ => None,
            },
            _ => None,
        }
    }

    pub(crate) fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Number(number) => number.as_u64(),
            _ => None,
        }
    }

    pub(crate) fn as_list(&self) -> Option<&[Json]> {
        match self {
            Self::List(items) => Some(items),
            _ => None,
        }
    }

    pub(crate) fn as_object(&self) -> Option<&Object> {
        match self {
            Self::Object(members) => Some(members),
            _ => None,
        }
    }

    /// The value without spaces, as it is written into a header.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("texts, numbers, lists and objects with text keys always serialise")
    }
}

/// What a JSON area holds.
#[derive(Debug, Clone)]
pub(crate) struct Parsed {
    pub(crate) value: Json,
    /// The area held bytes that are no UTF-8; they stand as U+FFFD in `value`, which must not be written back.
    pub(crate) lossy: bool,
}

/// Reads a whole JSON area: an object at its very first byte, then NUL to its last byte, at least one.
pub(crate) fn parse_area(area: &[u8]) -> Judged<Parsed> {
    let Some(len) = area.iter().position(|&b| b == 0) else {
        reject!("the JSON fills its area and no NUL ends it");
    };
    let (text, rest) = area.split_at(len);
    if rest.iter().any(|&b| b != 0) {
        reject!("bytes other than NUL follow the JSON, or a NUL is inside it");
    }
    if text.first() != Some(&b'{') || text.last() != Some(&b'}') {
        reject!("the JSON does not begin with '{{' and end with '}}'");
    }
    // libcryptsetup takes any bytes for text, so a damaged name is no reason to lose a volume.
    let decoded = String::from_utf8_lossy(text);
    let lossy = matches!(decoded, std::borrow::Cow::Owned(_));
    match serde_json::from_str(&decoded) {
        Ok(value) => Ok(Parsed { value, lossy }),
        Err(error) => reject!("the JSON is malformed: {error}"),
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Number(number) => number.serialize(serializer),
            Self::Text(text) => serializer.serialize_str(text),
            Self::List(items) => {
                let mut list = serializer.serialize_seq(Some(items.len()))?;
                items.iter().try_for_each(|item| list.serialize_element(item))?;
                list.end()
            }
            Self::Object(members) => {
                let mut map = serializer.serialize_map(Some(members.len()))?;
                members.iter().try_for_each(|(key, value)| map.serialize_entry(key, value))?;
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Json, E> {
        Number::from_f64(value).map(Json::Number).ok_or_else(|| E::custom("a number is not finite"))
    }

    fn visit_str<E>(self, text: &str) -> Result<Json, E> {
        Ok(Json::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Json::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut members = Object::new();
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format_args!("the key {} stands twice", quoted(&key))));
            }
            members.push((key, map.next_value()?));
        }
        Ok(Json::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(text: &str) -> Vec<u8> {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(text.len() + 8, 0);
        bytes
    }

    #[test]
    fn order_and_values_survive_a_round_trip() {
        let text = r#"{"z":1,"a":[true,null,-3,"x/\"y"],"m":{"2":{},"10":18446744073709551615}}"#;
        let parsed = parse_area(&area(text)).unwrap();
        assert!(!parsed.lossy);
        assert_eq!(parsed.value.to_bytes(), text.as_bytes());
    }

    #[test]
    fn area_is_refused_unless_it_is_one_object_then_nul() {
        for bad in [
            "",
            "[]",
            " {}",
            "{} ",
            "{}x",
            "{\"a\":1,\"a\":2}",
            "{\"a\":{\"b\":1,\"b\":1}}",
            "{'a':1}",
            "{\"a\":1e999}",
            "{\"a\":NaN}",
            "{/**/}",
            "{\"a\"}",
            "{\"a\":1,}",
        ] {
            assert!(parse_area(&area(bad)).is_err(), "{bad:?}");
        }
        assert!(parse_area(b"{}").is_err(), "no NUL");
        assert!(parse_area(b"{}\0\0x\0").is_err(), "bytes after NUL");
        assert!(parse_area(b"").is_err());
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(4000), "]".repeat(4000));
        assert!(parse_area(&area(&deep)).is_err(), "nesting is bounded");
    }

    #[test]
    fn bytes_that_are_no_utf8_are_read_and_marked() {
        let parsed = parse_area(b"{\"a\":\"\xff\"}\0").unwrap();
        assert!(parsed.lossy);
        assert_eq!(parsed.value.get("a").and_then(Json::as_text), Some("\u{fffd}"));
    }
}
