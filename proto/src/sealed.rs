//! The outer form of everything binary that leaves a process, on the bus or into a file: enough to refuse what is foreign,
//! damaged or of another version before a byte of it is interpreted.
//!
//! ```text
//! offset  0   4 bytes  magic, one per kind
//!         4   u16 LE   version
//!         6   u16 LE   0, reserved
//!         8   u64 LE   XXH3-64 of the body
//!        16   body
//! ```

/// Bytes before the body.
pub const PREAMBLE_BYTES: usize = 16;

/// A kind of sealed bytes.
#[derive(Clone, Copy, Debug)]
pub struct Seal {
    /// What this is, for messages.
    pub what: &'static str,
    /// Its first four bytes.
    pub magic: [u8; 4],
    /// The version that this build writes and reads.
    pub version: u16,
}

/// Sealed bytes cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Shorter than the preamble.
    #[error("{bytes} bytes are too few for {what}")]
    Size {
        /// What was expected.
        what: &'static str,
        /// How many there are.
        bytes: usize,
    },
    /// Something else.
    #[error("the first bytes are not those of {0}")]
    Magic(&'static str),
    /// Written by another version of this software.
    #[error("{what} of version {found}, this build reads version {known}: upgrade the older side")]
    Version {
        /// What was expected.
        what: &'static str,
        /// Its version.
        found: u16,
        /// The version of this build.
        known: u16,
    },
    /// Damaged, or cut off.
    #[error("the checksum of {0} does not match: it was damaged or cut off")]
    Checksum(&'static str),
}

// === impl Seal ===

impl Seal {
    /// A buffer that starts with an unfinished preamble; append the body, then call [`Self::finish`].
    pub fn start(&self, body_bytes: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(PREAMBLE_BYTES + body_bytes);
        out.extend_from_slice(&self.magic);
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&[0; 10]);
        out
    }

    /// Closes what [`Self::start`] began.
    pub fn finish(out: &mut [u8]) {
        let checksum = xxhash_rust::xxh3::xxh3_64(&out[PREAMBLE_BYTES..]);
        out[8..PREAMBLE_BYTES].copy_from_slice(&checksum.to_le_bytes());
    }

    /// The body, if these are undamaged bytes of this kind and version.
    pub fn open<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], OpenError> {
        let what = self.what;
        let Some((preamble, body)) = bytes.split_at_checked(PREAMBLE_BYTES) else {
            return Err(OpenError::Size { what, bytes: bytes.len() });
        };
        if preamble[..4] != self.magic {
            return Err(OpenError::Magic(what));
        }
        let found = u16::from_le_bytes([preamble[4], preamble[5]]);
        if found != self.version {
            return Err(OpenError::Version { what, found, known: self.version });
        }
        let checksum = u64::from_le_bytes(preamble[8..].try_into().expect("eight bytes are left"));
        if xxhash_rust::xxh3::xxh3_64(body) != checksum {
            return Err(OpenError::Checksum(what));
        }
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEAL: Seal = Seal { what: "a test", magic: *b"TEST", version: 3 };

    fn sealed(body: &[u8]) -> Vec<u8> {
        let mut out = SEAL.start(body.len());
        out.extend_from_slice(body);
        Seal::finish(&mut out);
        out
    }

    #[test]
    fn what_was_sealed_is_opened_and_anything_else_is_refused_by_name() {
        assert_eq!(SEAL.open(&sealed(b"body")), Ok(&b"body"[..]));
        assert_eq!(SEAL.open(&sealed(b"")), Ok(&b""[..]));
        assert_eq!(SEAL.open(b"TEST"), Err(OpenError::Size { what: "a test", bytes: 4 }));
        let foreign = Seal { magic: *b"OTHR", ..SEAL };
        assert_eq!(foreign.open(&sealed(b"x")), Err(OpenError::Magic("a test")));
        let newer = Seal { version: 4, ..SEAL };
        assert_eq!(newer.open(&sealed(b"x")), Err(OpenError::Version { what: "a test", found: 3, known: 4 }));
    }

    #[test]
    fn every_single_damaged_or_missing_byte_is_noticed() {
        let good = sealed(b"some body");
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            // The two reserved bytes mean nothing yet.
            assert_eq!(SEAL.open(&bad).is_ok(), at == 6 || at == 7, "byte {at}");
            assert!(SEAL.open(&good[..at]).is_err(), "cut at {at}");
        }
    }
}
