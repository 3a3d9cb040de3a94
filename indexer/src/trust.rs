//! How far a source can be trusted, as answers, lists and metrics say it.

use kvatlas_proto::frame::SourceHealth;

/// How far a source's entries can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceState {
    /// What it holds is being found out: its entries do not count yet.
    Syncing,
    /// Every frame since the last proof was applied in order, or there was none to compare with yet.
    Live,
    /// Digests were compared at an exact sequence and were equal, and every frame since was applied in order.
    Verified,
    /// Entries may be missing or out of date.
    Degraded(DegradedReason),
    /// Silent for longer than [`crate::sources::LEASE_MS`]: its entries do not count.
    Gone,
}

/// Why a source is degraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DegradedReason {
    /// The publisher joined a running engine.
    JoinedLate,
    /// The publisher lost events of the engine.
    EventsLost,
    /// The publisher could not decode a message of the engine.
    Undecodable,
    /// A bound was reached, at the publisher or here: some blocks are not tracked.
    OverLimit,
    /// Frames are missing and were asked for.
    FramesLost,
    /// Digests were compared and differ; the difference was asked for.
    Diverged,
    /// Silent for longer than [`crate::sources::STALE_MS`].
    Silent,
}

/// How far a source can be trusted, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trust {
    pub(crate) state: SourceState,
    /// When digests were last equal, on the index's clock; `None` if they have not been since the content was in doubt.
    pub(crate) verified_ms: Option<u64>,
}

// === impl Trust ===

impl Trust {
    /// How far the source can be trusted in both of two shards.
    #[must_use]
    pub(crate) fn and(self, other: Self) -> Self {
        let verified_ms = self.verified_ms.zip(other.verified_ms).map(|(a, b)| a.min(b));
        Self { state: self.state.worse(other.state), verified_ms }
    }
}

// === impl SourceState ===

impl SourceState {
    /// The one of two states that promises less.
    #[must_use]
    pub fn worse(self, other: Self) -> Self {
        // Of two reasons, the one that does not pass by itself.
        let doubt = |state: Self| match state {
            Self::Verified => (0, 0),
            Self::Live => (1, 0),
            Self::Degraded(reason) => (2, DegradedReason::Silent as u8 - reason as u8),
            Self::Syncing => (3, 0),
            Self::Gone => (4, 0),
        };
        if doubt(other) > doubt(self) { other } else { self }
    }

    /// Every state, for metrics.
    pub const ALL: [Self; 11] = [
        Self::Syncing,
        Self::Live,
        Self::Verified,
        Self::Degraded(DegradedReason::JoinedLate),
        Self::Degraded(DegradedReason::EventsLost),
        Self::Degraded(DegradedReason::Undecodable),
        Self::Degraded(DegradedReason::OverLimit),
        Self::Degraded(DegradedReason::FramesLost),
        Self::Degraded(DegradedReason::Diverged),
        Self::Degraded(DegradedReason::Silent),
        Self::Gone,
    ];

    /// Name for logs and metric labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Syncing => "syncing",
            Self::Live => "live",
            Self::Verified => "verified",
            Self::Degraded(_) => "degraded",
            Self::Gone => "gone",
        }
    }

    /// Why it is degraded, else empty.
    pub fn degraded_reason(self) -> &'static str {
        match self {
            Self::Degraded(reason) => reason.name(),
            _ => "",
        }
    }
}

// === impl DegradedReason ===

impl DegradedReason {
    /// Name as the gRPC contract spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::JoinedLate => SourceHealth::JoinedLate.name(),
            Self::EventsLost => SourceHealth::EventsLost.name(),
            Self::Undecodable => SourceHealth::Undecodable.name(),
            Self::OverLimit => SourceHealth::OverLimit.name(),
            Self::FramesLost => "frames_lost",
            Self::Diverged => "diverged",
            Self::Silent => "silent",
        }
    }

    pub(crate) fn of_health(health: SourceHealth) -> Option<Self> {
        match health {
            SourceHealth::Exact => None,
            SourceHealth::JoinedLate => Some(Self::JoinedLate),
            SourceHealth::EventsLost => Some(Self::EventsLost),
            SourceHealth::Undecodable => Some(Self::Undecodable),
            SourceHealth::OverLimit => Some(Self::OverLimit),
        }
    }
}
