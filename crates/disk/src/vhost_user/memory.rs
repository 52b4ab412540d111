//! The guest's memory as this process sees it: regions, and where an address of the guest or of the front end lies.
//!
//! A table never changes; a new one is made of the old one's regions and takes its place while no queue runs. Every
//! address a guest names is looked up when it is used.

use std::{os::fd::BorrowedFd, sync::Arc};

use super::mapping::{Mapping, MappingError};

/// Most regions of one device.
pub const MAX_REGIONS: usize = 256;

/// A region as the front end describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// The guest's address of its first byte.
    pub guest: u64,
    /// Its bytes.
    pub len: u64,
    /// The front end's address of its first byte; addresses of rings are such ones.
    pub user: u64,
    /// Where it begins in its file.
    pub offset: u64,
}

/// Why a region is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Empty, or past the end of all addresses.
    #[error("a memory region has an impossible address or size")]
    Impossible,
    /// Two regions share addresses.
    #[error("memory regions overlap")]
    Overlap,
    /// More than [`MAX_REGIONS`].
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// To be taken away, but not there.
    #[error("a memory region is to be removed that is not there")]
    Unknown,
    /// Its file is no good.
    #[error("a memory region cannot be used: {0}")]
    Mapping(#[from] MappingError),
}

/// A region that is mapped.
#[derive(Debug, Clone)]
struct Region {
    spec: RegionSpec,
    mapping: Arc<Mapping>,
}

impl Region {
    fn host(&self, within: u64) -> *mut u8 {
        self.mapping.start().wrapping_add(within as usize)
    }
}

/// A piece of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where this process sees it.
    pub base: *mut u8,
    /// Its bytes.
    pub len: usize,
    /// Where the guest sees it.
    pub guest: u64,
}

/// All regions, by the guest's addresses.
#[derive(Debug, Default, Clone)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// This table and one region more.
    ///
    /// # Errors
    ///
    /// [`MemoryError`].
    pub fn with_file(&self, spec: RegionSpec, file: BorrowedFd<'_>) -> Result<Self, MemoryError> {
        self.check(&spec)?;
        let mapping = Mapping::of_file(file, spec.offset, spec.len)?;
        Ok(self.with(spec, mapping))
    }

    /// This table and a region of memory that is mapped already, as long as `spec` says or longer.
    ///
    /// # Errors
    ///
    /// [`MemoryError`].
    pub fn with_mapping(&self, spec: RegionSpec, mapping: Mapping) -> Result<Self, MemoryError> {
        self.check(&spec)?;
        if (mapping.len() as u64) < spec.len {
            return Err(MappingError::TooShort.into());
        }
        Ok(self.with(spec, mapping))
    }

    fn with(&self, spec: RegionSpec, mapping: Mapping) -> Self {
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|region| region.spec.guest < spec.guest);
        regions.insert(at, Region { spec, mapping: Arc::new(mapping) });
        Self { regions }
    }

    fn check(&self, spec: &RegionSpec) -> Result<(), MemoryError> {
        let end = |start: u64| start.checked_add(spec.len).ok_or(MemoryError::Impossible);
        let (guest_end, user_end) = (end(spec.guest)?, end(spec.user)?);
        if spec.len == 0 || usize::try_from(spec.len).is_err() {
            return Err(MemoryError::Impossible);
        }
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        // Sums of regions in the table were checked when they came in.
        let overlaps = |at: u64, end: u64, other: u64, len: u64| at < other + len && other < end;
        let clash = self.regions.iter().map(|region| region.spec).any(|other| {
            overlaps(spec.guest, guest_end, other.guest, other.len)
                || overlaps(spec.user, user_end, other.user, other.len)
        });
        if clash { Err(MemoryError::Overlap) } else { Ok(()) }
    }

    /// This table without a region.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Unknown`].
    pub fn without(&self, spec: &RegionSpec) -> Result<Self, MemoryError> {
        let same = |region: &Region| {
            (region.spec.guest, region.spec.user, region.spec.len) == (spec.guest, spec.user, spec.len)
        };
        let at = self.regions.iter().position(same).ok_or(MemoryError::Unknown)?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(Self { regions })
    }

    /// The longest piece that begins at `guest` and has at most `len` bytes; `None` if nothing is there.
    #[inline]
    pub fn piece(&self, guest: u64, len: u64) -> Option<Piece> {
        let next = self.regions.partition_point(|region| region.spec.guest <= guest);
        let region = self.regions.get(next.checked_sub(1)?)?;
        let within = guest - region.spec.guest;
        let left = region.spec.len.checked_sub(within).filter(|left| *left > 0)?;
        Some(Piece { base: region.host(within), len: left.min(len) as usize, guest })
    }

    /// Where `len` bytes of the guest lie in one piece.
    #[inline]
    pub fn whole(&self, guest: u64, len: u64) -> Option<*mut u8> {
        self.piece(guest, len).filter(|piece| piece.len as u64 == len).map(|piece| piece.base)
    }

    /// Where `len` bytes at an address of the front end lie in one piece.
    pub fn whole_at_user(&self, user: u64, len: u64) -> Option<Piece> {
        let region = self.regions.iter().find(|region| {
            user.checked_sub(region.spec.user).is_some_and(|within| within < region.spec.len)
        })?;
        let within = user - region.spec.user;
        let base = region.host(within);
        (len <= region.spec.len - within).then_some(Piece {
            base,
            len: len as usize,
            guest: region.spec.guest + within,
        })
    }

    /// Whether the front end took a part away that was touched here.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_lost())
    }

    /// Whether there is no region.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(guest: u64, len: u64, user: u64) -> RegionSpec {
        RegionSpec { guest, len, user, offset: 0 }
    }

    fn table(specs: &[RegionSpec]) -> Result<GuestMemory, MemoryError> {
        specs.iter().try_fold(GuestMemory::default(), |table, spec| {
            table.with_mapping(*spec, Mapping::anonymous((spec.len as usize).min(1 << 20)).unwrap())
        })
    }

    #[test]
    fn addresses_are_found_within_their_region_only() {
        let memory = table(&[spec(0x10_0000, 0x2000, 0x7000), spec(0, 0x1000, 0x20_0000)]).unwrap();
        assert_eq!(memory.piece(0, 0x1000).unwrap().len, 0x1000);
        assert_eq!(memory.piece(0xfff, 0x1000).unwrap().len, 1);
        assert_eq!(memory.piece(0x1000, 1), None);
        assert_eq!(memory.piece(0xf_ffff, 1), None);
        assert_eq!(memory.piece(0x10_1fff, u64::MAX).unwrap().len, 1);
        assert_eq!(memory.piece(0x10_2000, 1), None);
        assert_eq!(memory.piece(u64::MAX, u64::MAX), None);
        assert!(memory.whole(0x10_0000, 0x2000).is_some());
        assert!(memory.whole(0x10_0001, 0x2000).is_none());
        let at = memory.whole_at_user(0x8000, 0x1000).unwrap();
        assert_eq!((at.guest, at.base), (0x10_1000, memory.whole(0x10_1000, 1).unwrap()));
        assert!(memory.whole_at_user(0x8001, 0x1000).is_none());
        assert!(memory.whole_at_user(0x9000, 0).is_none());
        assert!(memory.whole_at_user(0x6fff, 1).is_none());
    }

    #[test]
    fn pieces_end_where_the_region_ends_and_the_next_begins() {
        let memory = table(&[spec(0, 0x1000, 0), spec(0x1000, 0x1000, 0x5000)]).unwrap();
        let first = memory.piece(0xf00, 0x200).unwrap();
        assert_eq!(first.len, 0x100);
        assert_eq!(memory.piece(0x1000, 0x100).unwrap().len, 0x100);
        assert!(memory.whole(0xf00, 0x200).is_none());
    }

    #[test]
    fn regions_that_are_impossible_are_refused() {
        let first = spec(0x1000, 0x1000, 0x1000);
        for (name, second) in [
            ("empty", spec(0x8000, 0, 0x8000)),
            ("past_all_guest_addresses", spec(u64::MAX - 10, 0x1000, 0x8000)),
            ("past_all_user_addresses", spec(0x8000, 0x1000, u64::MAX - 10)),
            ("same", first),
            ("guest_overlaps_front", spec(0x800, 0x801, 0x8000)),
            ("guest_overlaps_back", spec(0x1fff, 0x1000, 0x8000)),
            ("guest_within", spec(0x1800, 1, 0x8000)),
            ("user_overlaps", spec(0x8000, 0x1000, 0x1fff)),
        ] {
            assert!(table(&[first, second]).is_err(), "{name}");
        }
        assert!(table(&[first, spec(0x2000, 0x1000, 0x2000), spec(0, 0x1000, 0)]).is_ok());
        let many: Vec<_> = (0..=MAX_REGIONS as u64).map(|i| spec(i * 16, 16, i * 16)).collect();
        assert!(matches!(table(&many), Err(MemoryError::TooMany)));
        assert!(table(&many[1..]).is_ok());
    }

    #[test]
    fn region_is_removed_by_all_it_is_known_by() {
        let (one, two) = (spec(0, 0x1000, 0), spec(0x1000, 0x1000, 0x5000));
        let memory = table(&[one, two]).unwrap();
        assert!(matches!(memory.without(&spec(0x1000, 0x800, 0x5000)), Err(MemoryError::Unknown)));
        let rest = memory.without(&two).unwrap();
        assert!(rest.piece(0x1000, 1).is_none() && rest.piece(0, 1).is_some());
        assert!(rest.without(&one).unwrap().is_empty());
    }
}
