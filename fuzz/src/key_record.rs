//! A key record's bytes: what is read is written back as it was.

use vmseal_model::record::KeyRecord;

/// Decodes.
///
/// # Panics
///
/// If a record that was read is written otherwise: two spellings of one record would have two MACs.
pub fn run(data: &[u8]) {
    if let Ok(record) = KeyRecord::decode(data) {
        assert_eq!(record.encode(), data);
        assert_eq!(record.head.encode().as_slice(), &data[..vmseal_model::record::HEAD_LEN]);
        let _ = (record.head.role(), record.head.disk(), format!("{record:?}"));
    }
}
