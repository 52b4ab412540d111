//! What a bag of a backup says of its key: for people in one line, for programs in 20 bytes.
//!
//! The line is the bag's friendlyName, `<name> generation <n> provider <uuid> exported <time>`; stock openssl prints
//! it. The bytes are its localKeyID, provider uuid ‖ generation (u32, little-endian). Both must say the same.

use std::time::Duration;

use der::DateTime;
use vmseal_model::id::{ProviderId, ProviderUuid};

/// The key in a bag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BagLabel {
    pub(crate) name: ProviderId,
    pub(crate) uuid: ProviderUuid,
    pub(crate) generation: u32,
    pub(crate) exported_ms: i64,
}

impl BagLabel {
    /// The line; `None` if the time is before 1970 or after 9999.
    pub(crate) fn friendly_name(&self) -> Option<String> {
        let time = utc(self.exported_ms)?;
        let Self { name, uuid, generation, .. } = self;
        Some(format!("{name} generation {generation} provider {uuid} exported {time}"))
    }

    pub(crate) fn local_key_id(&self) -> Vec<u8> {
        [self.uuid.to_bytes().as_slice(), &self.generation.to_le_bytes()].concat()
    }

    /// The label, if line and bytes are as they are written here and agree.
    pub(crate) fn parse(friendly_name: &str, local_key_id: &[u8]) -> Option<Self> {
        let words: Vec<&str> = friendly_name.splitn(7, ' ').collect();
        let [name, "generation", generation, "provider", uuid, "exported", time] = words[..] else {
            return None;
        };
        let time: DateTime = time.parse().ok()?;
        let label = Self {
            name: name.parse().ok()?,
            uuid: uuid.parse().ok()?,
            generation: generation.parse().ok()?,
            exported_ms: i64::try_from(time.unix_duration().as_millis()).ok()?,
        };
        let agrees =
            label.local_key_id() == local_key_id && label.friendly_name().as_deref() == Some(friendly_name);
        agrees.then_some(label)
    }
}

/// `2026-11-24T10:00:00Z`.
fn utc(ms: i64) -> Option<DateTime> {
    DateTime::from_unix_duration(Duration::from_secs(u64::try_from(ms).ok()? / 1000)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_is_what_the_runbook_shows_and_reads_back() {
        let label = BagLabel {
            name: "main".parse().unwrap(),
            uuid: "1b4e28ba-2fa1-41d2-883f-0016d3cca427".parse().unwrap(),
            generation: 1,
            exported_ms: 1_795_514_400_000,
        };
        let line = label.friendly_name().unwrap();
        assert_eq!(
            line,
            "main generation 1 provider 1b4e28ba-2fa1-41d2-883f-0016d3cca427 exported 2026-11-24T10:00:00Z"
        );
        assert_eq!(BagLabel::parse(&line, &label.local_key_id()), Some(label));
    }

    #[test]
    fn label_whose_line_and_bytes_disagree_is_refused() {
        let label = BagLabel {
            name: "main".parse().unwrap(),
            uuid: ProviderUuid::from_bytes([3; 16]),
            generation: 2,
            exported_ms: 0,
        };
        let line = label.friendly_name().unwrap();
        let id = label.local_key_id();
        assert!(BagLabel::parse(&line, &id).is_some());
        assert!(BagLabel::parse(&line.replace("generation 2", "generation 3"), &id).is_none());
        assert!(BagLabel::parse(&line.replace("generation 2", "generation +2"), &id).is_none());
        assert!(BagLabel::parse(&format!("{line} "), &id).is_none());
        assert!(BagLabel::parse(&line, &id[..19]).is_none());
        assert!(BagLabel::parse("", &[]).is_none());
        assert_eq!(BagLabel { exported_ms: -1, ..label }.friendly_name(), None);
    }
}
