//! The native provider: KDK generations, and the KEKs derived from them.
//!
//! In go key ids and verified backups; out come KEKs. It holds its KDKs in secret memory for as long as it lives and
//! stores nothing: after every change the caller keeps what [`crate::stored`] makes of it, before it acts on the
//! change.
//!
//! No key is given out for wrapping under a generation without a verified backup: what nobody can bring back must not
//! hold the only copy of anything. After [`NativeProvider::rotate`] the old generation goes on giving new keys until
//! the new one is backed up.

use vmseal_keys::{Kdk, Kek, SecretError, native, random_bytes};
use vmseal_model::id::{KekId, KeyUuid, ProviderId, ProviderUuid};

use crate::{
    backup::VerifiedBackup,
    provider::{Health, KeyProvider, ProviderError, ProviderKind, ProviderStatus},
};

/// Most generations of one provider; with one rotation a month more than twenty years.
pub const MAX_GENERATIONS: usize = crate::p12::MAX_BAGS;

/// One KDK with what is known of it.
#[derive(Debug)]
pub struct Generation {
    number: u32,
    kdk: Kdk,
    created_ms: i64,
    backed_up_at_ms: Option<i64>,
}

impl Generation {
    pub(crate) fn new(number: u32, kdk: Kdk, created_ms: i64, backed_up_at_ms: Option<i64>) -> Self {
        Self { number, kdk, created_ms, backed_up_at_ms }
    }

    /// From 1 on.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// When it was made; for an imported one, when the backup was.
    pub fn created_ms(&self) -> i64 {
        self.created_ms
    }

    /// When a backup of it was first verified, if one was.
    pub fn backed_up_at_ms(&self) -> Option<i64> {
        self.backed_up_at_ms
    }

    pub(crate) fn kdk(&self) -> &Kdk {
        &self.kdk
    }
}

/// What a generation is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationState {
    /// It has no verified backup; nothing is wrapped under it.
    AwaitingBackup,
    /// New keys come from it.
    Current,
    /// A later one is current; its keys only unwrap.
    Superseded,
}

impl GenerationState {
    /// The word for people and programs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AwaitingBackup => "awaiting-backup",
            Self::Current => "current",
            Self::Superseded => "superseded",
        }
    }
}

/// A native key provider with its keys. Neither cloned nor serialised; `Debug` shows no key.
#[derive(Debug)]
pub struct NativeProvider {
    id: ProviderId,
    uuid: ProviderUuid,
    /// By number, ascending, at least one.
    generations: Vec<Generation>,
}

impl NativeProvider {
    /// A new provider with generation 1, random, not backed up and so not usable yet.
    ///
    /// # Errors
    ///
    /// [`NativeError::Memory`].
    pub fn create(id: ProviderId, now_ms: i64) -> Result<Self, NativeError> {
        let uuid = ProviderUuid::from_random(random_bytes()?);
        Ok(Self { id, uuid, generations: vec![Generation::new(1, Kdk::generate()?, now_ms, None)] })
    }

    /// The provider with these generations; `None` if there is none, one comes twice or has number 0.
    pub(crate) fn from_generations(
        id: ProviderId,
        uuid: ProviderUuid,
        mut all: Vec<Generation>,
    ) -> Option<Self> {
        all.sort_by_key(|generation| generation.number);
        let ascending = all.windows(2).all(|pair| pair[0].number < pair[1].number);
        let good = ascending && all.first()?.number > 0 && all.len() <= MAX_GENERATIONS;
        good.then_some(Self { id, uuid, generations: all })
    }

    /// Its name.
    pub fn id(&self) -> &ProviderId {
        &self.id
    }

    /// What enters the derivation of every KEK.
    pub fn uuid(&self) -> ProviderUuid {
        self.uuid
    }

    /// All generations, oldest first.
    pub fn generations(&self) -> &[Generation] {
        &self.generations
    }

    /// What a generation is used for.
    pub fn state_of(&self, generation: &Generation) -> GenerationState {
        match (self.current(), generation.backed_up_at_ms) {
            (_, None) => GenerationState::AwaitingBackup,
            (Some(current), Some(_)) if current.number == generation.number => GenerationState::Current,
            _ => GenerationState::Superseded,
        }
    }

    /// The latest generation with a verified backup.
    pub fn current(&self) -> Option<&Generation> {
        self.generations.iter().rev().find(|generation| generation.backed_up_at_ms.is_some())
    }

    /// Generations that wait for a backup, oldest first.
    pub fn awaiting_backup(&self) -> impl Iterator<Item = &Generation> {
        self.generations.iter().filter(|generation| generation.backed_up_at_ms.is_none())
    }

    /// The id of a new KEK of the current generation.
    ///
    /// # Errors
    ///
    /// [`NativeError::NotBackedUp`] before the first verified backup.
    pub fn new_kek_id(&self) -> Result<KekId, NativeError> {
        let current = self.current().ok_or_else(|| NativeError::NotBackedUp { provider: self.id.clone() })?;
        Ok(KekId::native(current.number, KeyUuid::from_random(random_bytes()?)))
    }

    /// The KEK of this id: to wrap if it is of the current generation, otherwise [`Kek::unwrap_only`].
    ///
    /// The same id gives the same key always; that a key was ever used is not known here.
    ///
    /// # Errors
    ///
    /// [`NativeError::NotNative`], [`NativeError::NoSuchGeneration`], [`NativeError::Memory`].
    pub fn derive(&self, kek: &KekId) -> Result<Kek, NativeError> {
        let (number, key) = kek
            .as_native()
            .ok_or_else(|| NativeError::NotNative { provider: self.id.clone(), kek: kek.clone() })?;
        let generation = self.generation(number).ok_or_else(|| NativeError::NoSuchGeneration {
            provider: self.id.clone(),
            kek: kek.clone(),
            generation: number,
        })?;
        let kek = native::try_native_kek(&generation.kdk, self.uuid, number, key)?;
        Ok(match self.state_of(generation) {
            GenerationState::Current => kek,
            GenerationState::AwaitingBackup | GenerationState::Superseded => kek.unwrap_only(),
        })
    }

    /// Adds a new generation, which becomes current with its first verified backup. Its number is the result.
    ///
    /// # Errors
    ///
    /// [`NativeError::BackupDue`] while the last one still waits for its backup.
    pub fn rotate(&mut self, now_ms: i64) -> Result<u32, NativeError> {
        if let Some(waiting) = self.awaiting_backup().next() {
            return Err(NativeError::BackupDue { provider: self.id.clone(), generation: waiting.number });
        }
        let last = self.generations.last().map_or(0, |generation| generation.number);
        let full = || NativeError::TooManyGenerations { provider: self.id.clone() };
        let number =
            last.checked_add(1).filter(|_| self.generations.len() < MAX_GENERATIONS).ok_or_else(full)?;
        self.generations.push(Generation::new(number, Kdk::generate()?, now_ms, None));
        Ok(number)
    }

    /// Notes that the generations of this backup have one. Those that had one before keep their time.
    ///
    /// The numbers that are new to it are the result: to be stored before the caller goes on.
    ///
    /// # Errors
    ///
    /// [`NativeError::OtherProvider`] if the backup was verified against another provider.
    pub fn mark_backed_up(&mut self, backup: &VerifiedBackup, now_ms: i64) -> Result<Vec<u32>, NativeError> {
        if backup.uuid() != self.uuid {
            return Err(self.other(backup.uuid()));
        }
        let mut marked = Vec::new();
        for generation in &mut self.generations {
            if generation.backed_up_at_ms.is_none() && backup.generations().contains(&generation.number) {
                generation.backed_up_at_ms = Some(now_ms);
                marked.push(generation.number);
            }
        }
        Ok(marked)
    }

    /// Takes over those generations of `imported` that are missing here; their numbers are the result.
    ///
    /// Those that are here already and wait for a backup have one now: it was just read.
    ///
    /// # Errors
    ///
    /// [`NativeError::OtherProvider`], and [`NativeError::OtherKey`] if both have a generation of one number with
    /// different keys. Nothing is changed then.
    pub fn adopt_missing(&mut self, imported: NativeProvider) -> Result<Vec<u32>, NativeError> {
        if imported.uuid != self.uuid {
            return Err(self.other(imported.uuid));
        }
        let here = |theirs: &Generation| self.generation(theirs.number).is_some();
        let (common, mut missing): (Vec<_>, Vec<_>) = imported.generations.into_iter().partition(here);
        for theirs in &common {
            if !self.generation(theirs.number).is_some_and(|ours| same_key(&ours.kdk, &theirs.kdk)) {
                return Err(NativeError::OtherKey { provider: self.id.clone(), generation: theirs.number });
            }
        }
        if self.generations.len() + missing.len() > MAX_GENERATIONS {
            return Err(NativeError::TooManyGenerations { provider: self.id.clone() });
        }
        for ours in &mut self.generations {
            let theirs = common.iter().find(|theirs| theirs.number == ours.number);
            ours.backed_up_at_ms = ours.backed_up_at_ms.or(theirs.and_then(|theirs| theirs.backed_up_at_ms));
        }
        let numbers = missing.iter().map(|generation| generation.number).collect();
        self.generations.append(&mut missing);
        self.generations.sort_by_key(|generation| generation.number);
        Ok(numbers)
    }

    /// The generation of this number.
    pub fn generation(&self, number: u32) -> Option<&Generation> {
        self.generations.iter().find(|generation| generation.number == number)
    }

    fn other(&self, found: ProviderUuid) -> NativeError {
        NativeError::OtherProvider { provider: self.id.clone(), expected: self.uuid, found }
    }
}

impl KeyProvider for NativeProvider {
    fn id(&self) -> &ProviderId {
        &self.id
    }

    fn kind(&self) -> ProviderKind {
        ProviderKind::Native
    }

    fn status(&self) -> ProviderStatus {
        let waiting = self.awaiting_backup().next().map(|generation| generation.number);
        let (health, detail) = match (self.current(), waiting) {
            (Some(current), None) => (Health::Usable, format!("usable, generation {}", current.number)),
            (Some(current), Some(waiting)) => (
                Health::UsableBackupDue,
                format!("usable, generation {}; generation {waiting} waits for its backup", current.number),
            ),
            (None, _) => {
                (Health::NotBackedUp, NativeError::NotBackedUp { provider: self.id.clone() }.to_string())
            }
        };
        ProviderStatus { health, detail }
    }

    fn new_kek(&self) -> Result<Kek, ProviderError> {
        Ok(self.derive(&self.new_kek_id()?)?)
    }

    fn get_kek(&self, id: &KekId) -> Result<Kek, ProviderError> {
        Ok(self.derive(id)?)
    }
}

/// Whether both are one key, in constant time.
pub(crate) fn same_key(a: &Kdk, b: &Kdk) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(a.expose(), b.expose()).is_ok()
}

/// Why the native provider did not do something. Holds names and numbers, never a key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NativeError {
    /// Nobody could bring its keys back.
    #[error(
        "provider {provider} gives no keys before its first verified backup: \
         run `vmseal provider export {provider}` and keep the file away from this machine"
    )]
    NotBackedUp {
        /// Which.
        provider: ProviderId,
    },
    /// A rotation waits for its backup.
    #[error(
        "generation {generation} of provider {provider} still waits for its backup: export it before rotating again"
    )]
    BackupDue {
        /// Which.
        provider: ProviderId,
        /// The generation that waits.
        generation: u32,
    },
    /// The id is not one of a native provider.
    #[error("{kek} is no key id of a native provider, so {provider} cannot have it")]
    NotNative {
        /// Which.
        provider: ProviderId,
        /// The id.
        kek: KekId,
    },
    /// A KDK is missing.
    #[error(
        "provider {provider} has no generation {generation}, which key {kek} needs: \
         import a backup that holds it with `vmseal provider import`"
    )]
    NoSuchGeneration {
        /// Which.
        provider: ProviderId,
        /// The key.
        kek: KekId,
        /// Its generation.
        generation: u32,
    },
    /// Two providers were mixed up.
    #[error("provider {provider} is {expected}; this belongs to a provider with the id {found}")]
    OtherProvider {
        /// Which.
        provider: ProviderId,
        /// Its uuid.
        expected: ProviderUuid,
        /// The other one's.
        found: ProviderUuid,
    },
    /// The same number with another key: one of the two was made up or damaged.
    #[error("generation {generation} of provider {provider} is another key than the one imported")]
    OtherKey {
        /// Which.
        provider: ProviderId,
        /// The generation.
        generation: u32,
    },
    /// No room for another.
    #[error(
        "provider {provider} has {MAX_GENERATIONS} generations, which is the most; create a new provider"
    )]
    TooManyGenerations {
        /// Which.
        provider: ProviderId,
    },
    /// Secret memory or randomness could not be had.
    #[error("no key could be made")]
    Memory(#[from] SecretError),
}

#[cfg(test)]
mod tests;
