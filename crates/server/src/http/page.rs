//! Pages of long lists: `?limit=&cursor=`. A cursor is opaque: where to go on, as base64url of JSON.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use utoipa::IntoParams;
use vmseal_api::page::Page;

use crate::refusal::Refusal;

const DEFAULT: u32 = 100;
const MOST: u32 = 1000;

/// Which part of a list.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Part {
    /// At most so many items; 100 if absent, 1000 at most.
    pub(crate) limit: Option<u32>,
    /// `next` of the page before.
    pub(crate) cursor: Option<String>,
}

impl Part {
    /// At most so many items.
    pub(crate) fn limit(&self) -> usize {
        self.limit.unwrap_or(DEFAULT).clamp(1, MOST) as usize
    }

    /// One more than the page holds: whether it comes tells whether there is a next page.
    pub(crate) fn fetch(&self) -> i64 {
        i64::try_from(self.limit()).unwrap_or(i64::MAX - 1) + 1
    }

    /// Where to go on; `start` for the first page.
    pub(crate) fn after<T: DeserializeOwned>(&self, start: T) -> Result<T, Refusal> {
        let Some(cursor) = &self.cursor else { return Ok(start) };
        let bytes = URL_SAFE_NO_PAD.decode(cursor).unwrap_or_default();
        serde_json::from_slice(&bytes)
            .map_err(|_| Refusal::bad_request("'cursor' is not one that this list gave"))
    }

    /// The page of these rows; `place` says where the next one goes on.
    pub(crate) fn page<R, T: utoipa::ToSchema, P: Serialize>(
        &self,
        mut rows: Vec<R>,
        place: impl Fn(&R) -> P,
        show: impl Fn(R) -> T,
    ) -> Page<T> {
        let more = rows.len() > self.limit();
        rows.truncate(self.limit());
        let next = rows
            .last()
            .filter(|_| more)
            .map(|last| URL_SAFE_NO_PAD.encode(serde_json::to_vec(&place(last)).unwrap_or_default()));
        Page { items: rows.into_iter().map(show).collect(), next }
    }
}
