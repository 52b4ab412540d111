//! The ciphers of one disk, one for each thread that works at the same time.
//!
//! In: the disk's key. Out: a cipher on loan. The first is made with the pool, so that a key that cannot be used is
//! found before the first byte; further ones when threads need them, while there is secret memory.

use std::{
    ops::Deref,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use vmseal_keys::Dek;
use vmseal_xts::{Cipher, XtsError};

/// Ciphers of one disk.
pub struct CipherPool {
    dek: Dek,
    unit: usize,
    idle: Mutex<Vec<Cipher>>,
    returned: Condvar,
}

impl CipherPool {
    /// A pool with one cipher.
    ///
    /// # Errors
    ///
    /// The key's halves are equal, the unit is neither 512 nor 4096, or there is no secret memory.
    pub fn new(dek: Dek, unit: usize) -> Result<Self, XtsError> {
        let first = Cipher::new(dek.data_key(), unit)?;
        Ok(Self { dek, unit, idle: Mutex::new(vec![first]), returned: Condvar::new() })
    }

    /// A cipher until the loan is dropped.
    ///
    /// Makes one if all are out, and waits for one where none can be made: there is always at least one.
    pub fn lend(&self) -> Loan<'_> {
        if let Some(cipher) = self.idle().pop() {
            return Loan { pool: self, cipher: Some(cipher) };
        }
        if let Ok(cipher) = Cipher::new(self.dek.data_key(), self.unit) {
            return Loan { pool: self, cipher: Some(cipher) };
        }
        let mut idle = self.idle();
        loop {
            if let Some(cipher) = idle.pop() {
                return Loan { pool: self, cipher: Some(cipher) };
            }
            idle = self.returned.wait(idle).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Cipher>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A cipher that goes back to its pool.
pub struct Loan<'a> {
    pool: &'a CipherPool,
    cipher: Option<Cipher>,
}

impl Deref for Loan<'_> {
    type Target = Cipher;
    fn deref(&self) -> &Cipher {
        self.cipher.as_ref().expect("a loan holds its cipher until it is dropped")
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        if let Some(cipher) = self.cipher.take() {
            self.pool.idle().push(cipher);
            self.pool.returned.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ciphers_come_back_and_all_of_them_agree() {
        let pool = CipherPool::new(Dek::generate().unwrap(), 512).unwrap();
        let (mut one, mut two) = ([7u8; 1024], [7u8; 1024]);
        {
            let (a, b) = (pool.lend(), pool.lend());
            a.encrypt(8, &mut one).unwrap();
            b.encrypt(8, &mut two).unwrap();
        }
        assert_eq!(one, two);
        assert_ne!(one, [7u8; 1024]);
        assert_eq!(pool.idle().len(), 2);
        drop(pool.lend());
        assert_eq!(pool.idle().len(), 2);
    }

    #[test]
    fn key_with_equal_halves_is_refused() {
        let dek = Dek::from_payload_slice(&[5; 96]).unwrap();
        assert!(CipherPool::new(dek, 512).is_err());
    }
}
