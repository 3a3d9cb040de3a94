//! What can go wrong between the index and a checkpoint store, with the names that metrics give it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A store could not be used at all.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Nobody answers there.
    #[error("{place} cannot be reached ({reason}): check that it runs and that this host may connect")]
    Unreachable {
        /// Which store.
        place: String,
        /// What happened.
        reason: String,
    },
    /// It does not accept who we are or what we want to do.
    #[error("{place} refuses this client ({reason}): check user, password, certificate and permissions")]
    Unauthorized {
        /// Which store.
        place: String,
        /// What it said.
        reason: String,
    },
    /// A file that says who we are or whom to trust cannot be used.
    #[error("cannot use the {what} {path:?}: {reason}; check the path, its permissions and its content")]
    Secret {
        /// What the file is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What happened; never its content.
        reason: String,
    },
    /// It answered that it cannot do what was asked.
    #[error("{place} did not do what was asked ({reason}): check its memory, limits and log")]
    Refused {
        /// Which store.
        place: String,
        /// What it said.
        reason: String,
    },
}

/// A checkpoint could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The store could not be used.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// The file cannot be read.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    /// Parts are missing or belong to another one: it expired, or was being replaced.
    #[error("it is not whole: {reason}")]
    Torn {
        /// What is missing or wrong.
        reason: String,
    },
    /// Larger than an index with these limits writes.
    #[error(
        "it has {bytes} bytes, more than the {max_bytes} that are taken in: raise --max-blocks if that is right"
    )]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The bound.
        max_bytes: u64,
    },
    /// It did not come in time.
    #[error("it was not there after {after:?}")]
    TimedOut {
        /// The bound.
        after: Duration,
    },
}

/// A checkpoint could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The store could not be used.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// It could not be written.
    #[error("it cannot be written: {0}")]
    Write(#[from] io::Error),
    /// The store did not take it in time.
    #[error("it was not saved after {after:?}")]
    TimedOut {
        /// The bound.
        after: Duration,
    },
}

// === impl AccessError ===

impl AccessError {
    /// Name for metric labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Unauthorized { .. } => "unauthorized",
            Self::Secret { .. } => "secret",
            Self::Refused { .. } => "refused",
        }
    }
}

// === impl LoadError ===

impl LoadError {
    /// Name for metric labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Access(error) => error.reason(),
            Self::Read(_) => "unreadable",
            Self::Torn { .. } => "torn",
            Self::TooLarge { .. } => "too_large",
            Self::TimedOut { .. } => "timeout",
        }
    }
}

// === impl SaveError ===

impl SaveError {
    /// Name for metric labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Access(error) => error.reason(),
            Self::Write(_) => "unwritable",
            Self::TimedOut { .. } => "timeout",
        }
    }
}
