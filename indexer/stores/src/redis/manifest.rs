//! The manifest: one small value that says which generation of pieces is the checkpoint.
//!
//! ```text
//! kvatlas-checkpoint 1 GENERATION PIECES BYTES CHECKSUM
//! ```
//!
//! Plain text, so that whoever looks into the server sees what it is. It is written last, in one command, and names a
//! generation that is complete then. `CHECKSUM` is XXH3-64, in hexadecimal digits, over the pieces in their order.

use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

/// First word of every manifest.
const MAGIC: &str = "kvatlas-checkpoint";
/// Version of the manifest and of how pieces are named and cut.
const VERSION: &str = "1";
/// Most pieces that are believed: 256 GiB. More is no manifest of ours, and a loop over them would not end.
const MAX_PIECES: u64 = 65_536;

/// A name that no two saves share, so that pieces of one are never taken for those of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Generation(String);

/// What a manifest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    pub(super) generation: Generation,
    pub(super) pieces: u64,
    pub(super) bytes: u64,
    pub(super) checksum: u64,
}

/// A value that is no manifest of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its manifest is not one of version {VERSION}")]
pub(super) struct NoManifestError;

// === impl Generation ===

impl Generation {
    pub(super) fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        // Seeded anew each time, which tells apart servers that save at the same moment.
        let salt = RandomState::new().hash_one(std::process::id());
        Self(format!("{now:x}-{salt:016x}"))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl Manifest ===

impl fmt::Display for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { generation, pieces, bytes, checksum } = self;
        write!(f, "{MAGIC} {VERSION} {generation} {pieces} {bytes} {checksum:016x}")
    }
}

impl FromStr for Manifest {
    type Err = NoManifestError;

    fn from_str(text: &str) -> Result<Self, NoManifestError> {
        let words: Vec<&str> = text.split(' ').collect();
        let [MAGIC, VERSION, generation, pieces, bytes, checksum] = words[..] else {
            return Err(NoManifestError);
        };
        let is_name = |c: char| c.is_ascii_hexdigit() || c == '-';
        if generation.is_empty() || !generation.chars().all(is_name) {
            return Err(NoManifestError);
        }
        let pieces = pieces.parse().ok().filter(|pieces| (1..=MAX_PIECES).contains(pieces));
        Ok(Self {
            generation: Generation(generation.to_owned()),
            pieces: pieces.ok_or(NoManifestError)?,
            bytes: bytes.parse().map_err(|_| NoManifestError)?,
            checksum: u64::from_str_radix(checksum, 16).map_err(|_| NoManifestError)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_nothing_else_is() {
        let generation = Generation::new();
        let manifest = Manifest { generation, pieces: 3, bytes: 9 << 20, checksum: 0xab };
        let text = manifest.to_string();
        assert_eq!(text.parse(), Ok(manifest));
        for bad in [
            String::new(),
            text.replace(" 1 ", " 2 "),
            text.replace(" 3 ", " 0 "),
            text.replace(" 3 ", " 65537 "),
            text.replace("00ab", "00xy"),
            text.replace('-', ":"),
            format!("{text} more"),
            text[..text.len() - 17].to_owned(),
        ] {
            assert_eq!(bad.parse::<Manifest>(), Err(NoManifestError), "{bad}");
        }
    }

    #[test]
    fn no_two_generations_are_the_same() {
        assert_ne!(Generation::new(), Generation::new());
    }
}
