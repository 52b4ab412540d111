//! Lists of the API, whole: pages are followed to the last one.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use vmseal_api::paths;

use crate::{client::Client, error::CliError};

const PAGE: &str = "200";
/// More pages than any installation has; a server that never ends its list is not followed for ever.
const MAX_PAGES: usize = 10_000;

/// A list as JSON and as the API's type.
pub(crate) struct List<T> {
    /// The items as they came.
    pub(crate) json: Value,
    /// The items.
    pub(crate) items: Vec<T>,
}

impl<T> List<T> {
    /// Those of which `keep` holds.
    pub(crate) fn only(self, keep: impl Fn(&T) -> bool) -> Self {
        let json = match self.json {
            Value::Array(items) => items,
            _ => Vec::new(),
        };
        let (json, items) = json.into_iter().zip(self.items).filter(|(_, item)| keep(item)).unzip();
        Self { json: Value::Array(json), items }
    }
}

/// All items of a list that comes in pages.
pub(crate) fn pages<T: DeserializeOwned>(client: &Client, path: &str) -> Result<List<T>, CliError> {
    follow(client, path, "cursor", None, usize::MAX)
}

/// At most `limit` items of a list that is asked for by the number of the item before.
pub(crate) fn pages_after<T: DeserializeOwned>(
    client: &Client,
    path: &str,
    after: Option<u64>,
    limit: usize,
) -> Result<List<T>, CliError> {
    follow(client, path, "after", after.map(|n| n.to_string()), limit)
}

fn follow<T: DeserializeOwned>(
    client: &Client,
    path: &str,
    parameter: &str,
    mut place: Option<String>,
    limit: usize,
) -> Result<List<T>, CliError> {
    let first = paths::with_query(path, "limit", PAGE);
    let mut items = Vec::new();
    for _ in 0..MAX_PAGES {
        let path = match &place {
            Some(place) => paths::with_query(&first, parameter, place),
            None => first.clone(),
        };
        let (part, next) = split(client.get(&path)?.json()?)?;
        items.extend(part);
        place = next;
        if place.is_none() || items.len() >= limit {
            break;
        }
    }
    items.truncate(limit);
    typed(items)
}

/// A list that comes whole.
pub(crate) fn whole<T: DeserializeOwned>(client: &Client, path: &str) -> Result<List<T>, CliError> {
    let (items, _) = split(client.get(path)?.json()?)?;
    typed(items)
}

fn split(page: Value) -> Result<(Vec<Value>, Option<String>), CliError> {
    match page {
        Value::Array(items) => Ok((items, None)),
        Value::Object(mut page) => {
            let next = page.get("next").and_then(Value::as_str).map(str::to_owned);
            match page.get_mut("items").map(Value::take) {
                Some(Value::Array(items)) => Ok((items, next)),
                _ => Err(unreadable()),
            }
        }
        _ => Err(unreadable()),
    }
}

fn typed<T: DeserializeOwned>(items: Vec<Value>) -> Result<List<T>, CliError> {
    let json = Value::Array(items);
    let items = Vec::<T>::deserialize(&json).map_err(|_| unreadable())?;
    Ok(List { json, items })
}

fn unreadable() -> CliError {
    CliError::failed("the server's list is not what this version expects")
        .hint("use the vmseal command of the server's version: vmseal --version; vmseal status")
}
