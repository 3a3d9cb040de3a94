//! What the index believes about one source (a data-parallel rank of an instance), and which of its frames it applies.
//! Pure: frames' headers and the time go in, verdicts come out; nothing here knows a block.
//!
//! A source's frames carry (epoch, sequence). Within an epoch the sequence is contiguous from 0, so the receiver sees
//! every loss by itself: the bus may drop, duplicate or restart without a word.
//!
//! ```text
//!              seq 0 of a new epoch              SnapshotEnd
//!   (unseen) ------------------------> Syncing ---------------> Live
//!       |          (or Live at once,      |                       |
//!       |           without a snapshot)   +----------+------------+
//!       | first frame is not seq 0                   | sequence jumps
//!       v                                            v
//!      Lost  <---------------------------------------+
//!       |
//!       +--- seq 0 of a new epoch ---> Syncing or Live
//!
//!   any of them --- silent for LEASE_MS ---> gone --- silent for FORGET_MS ---> dropped
//!   gone --- the next frame in sequence, or a new epoch ---> as before
//! ```
//!
//! Lost and gone differ in what the entries are worth: a lost source is alive and its entries are mostly right, so
//! they count and are marked; a gone source may not exist any more, so they do not count. A gone source whose next
//! frame is out of sequence stays gone: what it held so long ago is not known to be there.

use kvatlas_proto::frame::{FrameHeader, FramePart, SourceHealth};
use kvatlas_proto::{Epoch, FrameSeq};

/// Silence after which a source is gone, milliseconds. Publishers send a heartbeat each second or so, and ten missed
/// ones are no hiccup of a broker.
pub const LEASE_MS: u64 = 10_000;
/// Silence after which a gone source is dropped with its blocks, milliseconds. Until then a network partition that
/// heals costs nothing.
pub const FORGET_MS: u64 = 60_000;
/// Shortest time between two requests to one source for its full state, milliseconds: a snapshot may be megabytes.
pub const RESYNC_MIN_MS: u64 = 1_000;
/// Longest time between two such requests, milliseconds. The wait doubles from [`RESYNC_MIN_MS`] up to here, so that
/// a publisher that cannot help is not asked for ever at full rate.
pub const RESYNC_MAX_MS: u64 = 30_000;

/// How far a source's entries can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SourceState {
    /// Its full state is still arriving.
    Syncing,
    /// Every frame so far was applied in order.
    Live,
    /// Entries may be missing or out of date.
    Degraded(DegradedReason),
    /// Silent for longer than [`LEASE_MS`]: its entries do not count.
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
    /// The index missed frames and waits for a new epoch.
    FramesLost,
}

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The next one: apply it.
    Apply,
    /// The first one of a new epoch: clear everything of the source, then apply it.
    NewEpoch,
    /// Seen before: drop it.
    Duplicate,
    /// Of an epoch that is over: drop it.
    StaleEpoch,
    /// Frames are missing, so this one is dropped. The entries stay, marked as degraded.
    Gap {
        /// The sequence that would have been next.
        expected: FrameSeq,
        /// The frame's.
        got: FrameSeq,
    },
    /// A new epoch whose first frame was missed: clear everything of the source (a new epoch makes what came before
    /// void), and drop the frame.
    NewEpochGap {
        /// The frame's sequence; 0 was expected.
        got: FrameSeq,
    },
}

/// What time alone did to a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// Its lease ended just now.
    Gone,
    /// It was gone for so long that it is to be dropped with everything it held.
    Dropped,
}

/// The state machine of one source.
#[derive(Clone, Debug)]
pub struct SourceTracker {
    /// The newest epoch heard of; `None` before the first frame.
    epoch: Option<Epoch>,
    /// The only sequence that can be applied; what came before it was.
    next: FrameSeq,
    phase: Phase,
    /// Overlays `phase`: set by silence, taken away only by a frame that is applied or starts an epoch.
    gone: bool,
    /// A bound of the index refused something of this epoch.
    over_limit: bool,
    /// As the last applied frame said.
    health: SourceHealth,
    /// When a frame of the current epoch last proved life.
    last_seen_ms: u64,
    resync: ResyncPace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Pieces of the full state arrive in sequence.
    Syncing,
    /// Changes arrive in sequence.
    Live,
    /// Frames are missing: nothing of this epoch can be applied any more.
    Lost,
}

/// When the next request for a full state may be sent.
#[derive(Clone, Copy, Debug)]
struct ResyncPace {
    last_ms: Option<u64>,
    /// Wait after the last one; doubles with each request of an epoch.
    wait_ms: u64,
}

// === impl SourceState ===

impl SourceState {
    /// Name for logs and metric labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Syncing => "syncing",
            Self::Live => "live",
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
        }
    }

    fn of_health(health: SourceHealth) -> Option<Self> {
        match health {
            SourceHealth::Exact => None,
            SourceHealth::JoinedLate => Some(Self::JoinedLate),
            SourceHealth::EventsLost => Some(Self::EventsLost),
            SourceHealth::Undecodable => Some(Self::Undecodable),
            SourceHealth::OverLimit => Some(Self::OverLimit),
        }
    }
}

// === impl SourceTracker ===

impl SourceTracker {
    /// A source of which nothing is known yet.
    pub fn new(now_ms: u64) -> Self {
        Self {
            epoch: None,
            next: FrameSeq(0),
            phase: Phase::Lost,
            gone: false,
            over_limit: false,
            health: SourceHealth::Exact,
            last_seen_ms: now_ms,
            resync: ResyncPace { last_ms: None, wait_ms: RESYNC_MIN_MS },
        }
    }

    /// Judges a frame of this source and moves on. `now_ms` must not go back between calls.
    pub fn on_frame(&mut self, header: &FrameHeader, now_ms: u64) -> Verdict {
        match self.epoch {
            // ## unseen => (Syncing | Live | Lost)
            //
            // Whoever is heard for the first time is in a new epoch as far as we know; a gap then voids nothing.
            None => match self.start_epoch(header, now_ms) {
                Verdict::NewEpochGap { got } => Verdict::Gap { expected: FrameSeq(0), got },
                verdict => verdict,
            },
            // ## any => (Syncing | Live | Lost), in the new epoch
            Some(epoch) if header.epoch > epoch => self.start_epoch(header, now_ms),
            // A publisher's epoch is its start time, and a pod's clock may have been set back between two lives. So
            // an older epoch wins once the current one has been silent for longer than its lease.
            Some(epoch) if header.epoch < epoch && self.silent_ms(now_ms) > LEASE_MS => {
                self.start_epoch(header, now_ms)
            }
            // Not a sign of life of the current epoch: the time of last sight stays.
            Some(epoch) if header.epoch < epoch => Verdict::StaleEpoch,
            Some(_) => self.on_current_epoch(header, now_ms),
        }
    }

    fn start_epoch(&mut self, header: &FrameHeader, now_ms: u64) -> Verdict {
        self.epoch = Some(header.epoch);
        self.next = FrameSeq(0);
        self.last_seen_ms = now_ms;
        self.gone = false;
        self.over_limit = false;
        if header.seq != FrameSeq(0) {
            self.phase = Phase::Lost;
            return Verdict::NewEpochGap { got: header.seq };
        }
        // An answered request ends the back-off, but the time of the last one stays: a source whose every epoch has a
        // gap is still asked only once in RESYNC_MIN_MS.
        self.resync.wait_ms = RESYNC_MIN_MS;
        self.phase = Phase::Live;
        self.advance(header);
        Verdict::NewEpoch
    }

    fn on_current_epoch(&mut self, header: &FrameHeader, now_ms: u64) -> Verdict {
        // A repeated frame may be an old one from some queue: it proves nothing.
        if header.seq < self.next {
            return Verdict::Duplicate;
        }
        self.last_seen_ms = now_ms;
        match self.phase {
            // ## (Syncing | Live) => (Syncing | Live), gone or not
            Phase::Syncing | Phase::Live if header.seq == self.next => {
                self.gone = false;
                self.advance(header);
                Verdict::Apply
            }
            // ## (Syncing | Live) => Lost
            //
            // A gone source stays gone: it lives, but its entries are of a time before the silence.
            Phase::Syncing | Phase::Live => {
                self.phase = Phase::Lost;
                Verdict::Gap { expected: self.next, got: header.seq }
            }
            // ## Lost => Lost
            //
            // Even the very frame that was missing does not help: those after it were dropped.
            Phase::Lost => Verdict::Gap { expected: self.next, got: header.seq },
        }
    }

    /// Takes over what an applied frame says about the source.
    fn advance(&mut self, header: &FrameHeader) {
        self.next = header.seq.next();
        self.health = header.health;
        self.phase = match (header.part, self.phase) {
            // ## (Syncing | Live) => Syncing: a piece of the full state, more follows.
            (FramePart::Snapshot, _) => Phase::Syncing,
            // ## Syncing => Live
            (FramePart::SnapshotEnd, _) => Phase::Live,
            // ## unchanged: a change or a heartbeat, also between two pieces of a snapshot.
            (FramePart::Live, phase) => phase,
        };
    }

    /// What silence did. To be called about once a second.
    pub fn on_tick(&mut self, now_ms: u64) -> Option<Expiry> {
        let silent = self.silent_ms(now_ms);
        // ## gone => dropped
        if self.gone && silent > FORGET_MS {
            return Some(Expiry::Dropped);
        }
        // ## any => gone
        if !self.gone && silent > LEASE_MS {
            self.gone = true;
            return Some(Expiry::Gone);
        }
        None
    }

    /// What [`Self::on_tick`] would say, without doing it.
    pub fn expires(&self, now_ms: u64) -> bool {
        let silent = self.silent_ms(now_ms);
        if self.gone { silent > FORGET_MS } else { silent > LEASE_MS }
    }

    /// The source has started an epoch in another scope, so what it held here is not there any more. If it does
    /// publish in both, its next frame here takes this back.
    pub fn on_moved_away(&mut self) {
        self.gone = true;
    }

    /// A bound of the index refused something of this source.
    pub fn on_over_limit(&mut self) {
        self.over_limit = true;
    }

    /// True if its full state may be asked for now; that counts as asked. To be called on a gap.
    pub fn resync_due(&mut self, now_ms: u64) -> bool {
        let due = self.resync.last_ms.is_none_or(|last| now_ms.saturating_sub(last) >= self.resync.wait_ms);
        if due {
            if self.resync.last_ms.is_some() {
                self.resync.wait_ms = (self.resync.wait_ms * 2).min(RESYNC_MAX_MS);
            }
            self.resync.last_ms = Some(now_ms);
        }
        due
    }

    /// How far the source can be trusted. The worst news wins.
    pub fn state(&self) -> SourceState {
        if self.gone {
            return SourceState::Gone;
        }
        match self.phase {
            Phase::Lost => SourceState::Degraded(DegradedReason::FramesLost),
            _ if self.over_limit => SourceState::Degraded(DegradedReason::OverLimit),
            Phase::Syncing => SourceState::Syncing,
            Phase::Live => {
                DegradedReason::of_health(self.health).map_or(SourceState::Live, SourceState::Degraded)
            }
        }
    }

    /// True if its entries count in answers.
    pub fn counts(&self) -> bool {
        !self.gone
    }

    /// The newest epoch heard of.
    pub fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// The last frame that was applied in this epoch.
    pub fn applied_seq(&self) -> Option<FrameSeq> {
        self.next.0.checked_sub(1).map(FrameSeq)
    }

    /// Milliseconds since the last frame that proved life.
    pub fn silent_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.last_seen_ms)
    }
}

#[cfg(test)]
#[path = "sources_tests.rs"]
mod tests;
