//! What the index believes about one source (a data-parallel rank of an instance), and which of its frames it applies.
//! Pure: frames' headers and the time go in, verdicts and questions come out; nothing here knows a block.
//!
//! A source's frames carry (epoch, sequence). Within an epoch the sequence is contiguous from 0, so the receiver sees
//! every loss by itself: the bus may drop, duplicate, delay or restart without a word.
//!
//! ```text
//!                    a digest equals, or the state was transferred
//!          Hidden -------------------------------------------------> Live <-----------------------+
//!            ^                                                      |    |                        |
//!            | a new epoch, from anywhere          sequence jumps   |    | a digest differs       |
//!            | (or the first frame ever,                            v    v                        |
//!            |  or a checkpoint)                                  Gap    Diverged                 |
//!                                                                  |      |  ^                     |
//!                          the missing frames were sent again -----+------+--+------------- ------+
//!                          they are not kept any more -------------+      |
//!                          the state was transferred ---------------------+
//!
//!   any of them --- silent for STALE_MS ---> marked --- LEASE_MS ---> gone --- FORGET_MS ---> dropped
//!   gone --- the next frame in sequence, or a proof of the content ---> as before
//! ```
//!
//! * **Hidden**: what is here (nothing, a checkpoint, an older epoch) is of unknown truth, so it does not count.
//! * **Live**: what is here is the state after the last frame applied.
//! * **Gap**: it was, but frames are missing. The source is alive and its entries are mostly right, so they count and
//!   are marked. Later frames are held until the missing ones were sent again.
//! * **Diverged**: what is here is known to be wrong somewhere. It counts, marked, until the slices that differ were
//!   transferred. Later frames are held meanwhile.
//!
//! In every phase a frame that carries digests is compared with what is here, and equality proves it: so a checkpoint
//! that is still right costs no transfer.

use bytes::Bytes;
use kvatlas_proto::frame::{FrameHeader, FramePart, SourceHealth};
use kvatlas_proto::{Epoch, FrameSeq};

use crate::held::{HeldFrames, RecoveryLimits};
use crate::session::{Piece, Session};
use crate::trust::Trust;
pub use crate::trust::{DegradedReason, SourceState};

/// Silence after which a source is marked, milliseconds: three missed heartbeats.
pub const STALE_MS: u64 = 3_000;
/// Silence after which a source is gone, milliseconds. Publishers send a heartbeat each second, and ten missed ones are
/// no hiccup of a broker.
pub const LEASE_MS: u64 = 10_000;
/// Silence after which a gone source is dropped with its blocks, milliseconds. Until then a network partition that
/// heals costs little.
pub const FORGET_MS: u64 = 60_000;
/// First wait for missing frames before they are asked for again, milliseconds: some round trips of a busy broker.
const FRAMES_WAIT_MS: u64 = 30;
/// Longest such wait, milliseconds; it doubles up to here while nothing comes.
const FRAMES_WAIT_MAX_MS: u64 = 1_000;
/// Most frames that are asked for at once; what follows is asked for when these are there.
const FRAMES_PER_ASK: u64 = 1_024;
/// First wait for a piece of a state before it is asked for again, milliseconds. A publisher of a million blocks needs a
/// tenth of a second to answer.
const STATE_WAIT_MS: u64 = 500;
/// Longest such wait, milliseconds; it doubles up to here while nothing comes, so that a publisher that cannot answer
/// is not asked for ever at full rate.
const STATE_WAIT_MAX_MS: u64 = 8_000;

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The next one: apply it.
    Apply,
    /// The first one of an epoch that starts with nothing: empty the source, then apply it.
    NewEpoch,
    /// Of a new epoch whose state is not known here: what is here is hidden from now on.
    NewEpochHidden,
    /// Kept for later: frames before it are missing, or what is here is not proved.
    Held,
    /// As [`Self::Held`], but there is no room: dropped, to be asked for later.
    HeldOver,
    /// Seen before: drop it.
    Duplicate,
    /// Of an epoch that is over: drop it.
    StaleEpoch,
}

/// What is to be asked of a source's publisher now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// These frames again.
    Frames(Vec<(FrameSeq, FrameSeq)>),
    /// Its state, where it differs from ours.
    State,
}

/// What time alone did to a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// It is marked as silent.
    Silent,
    /// Its lease ended just now.
    Gone,
    /// It was gone for so long that it is to be dropped with everything it held.
    Dropped,
}

/// The state machine of one source.
#[derive(Debug)]
pub(crate) struct SourceTracker {
    /// The newest epoch heard of; `None` before the first frame.
    epoch: Option<Epoch>,
    phase: Phase,
    /// The frame after which our content was the source's state; means nothing while hidden.
    applied: Option<FrameSeq>,
    /// The newest frame of this epoch that was heard of; `None` if only a checkpoint speaks of the epoch.
    heard: Option<FrameSeq>,
    held: HeldFrames,
    asking: Asking,
    session: Option<Session>,
    /// When digests were last equal, in this epoch and phase.
    verified_ms: Option<u64>,
    /// Set by silence, taken away by a frame.
    silent: bool,
    /// Overlays `phase`: set by silence, taken away only by a frame that is applied or a proof of the content.
    gone: bool,
    /// A bound of the index refused something of this epoch.
    over_limit: bool,
    /// As the last applied frame said.
    health: SourceHealth,
    /// When a frame of the current epoch last proved life.
    last_seen_ms: u64,
    /// It is in the index's list of sources that may have to ask.
    pub(crate) queued: bool,
    limits: RecoveryLimits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Hidden,
    Live,
    Gap,
    Diverged(DegradedReason),
}

/// When the next question may be asked.
#[derive(Clone, Copy, Debug)]
struct Asking {
    /// Not before, milliseconds; frames that are newly missing do not wait.
    next_ms: u64,
    wait_ms: u64,
    /// Missing frames up to here were asked for.
    through: Option<FrameSeq>,
    /// `applied` at the last question: progress since resets the wait.
    applied: Option<FrameSeq>,
}

// === impl Asking ===

impl Asking {
    const NOW: Self = Self { next_ms: 0, wait_ms: 0, through: None, applied: None };

    /// A question was asked just now; the wait for the next one doubles from `first` to `most`.
    fn asked(&mut self, now_ms: u64, first: u64, most: u64) {
        self.wait_ms = (self.wait_ms * 2).clamp(first, most);
        self.next_ms = now_ms + self.wait_ms;
    }
}

// === impl SourceTracker ===

impl SourceTracker {
    /// A source of which nothing is known yet.
    pub(crate) fn new(now_ms: u64) -> Self {
        Self {
            epoch: None,
            phase: Phase::Hidden,
            applied: None,
            heard: None,
            held: HeldFrames::default(),
            asking: Asking::NOW,
            session: None,
            verified_ms: None,
            silent: false,
            gone: false,
            over_limit: false,
            health: SourceHealth::Exact,
            last_seen_ms: now_ms,
            queued: false,
            limits: RecoveryLimits::default(),
        }
    }

    /// With other bounds.
    pub(crate) fn bounded_by(self, limits: RecoveryLimits) -> Self {
        Self { limits, ..self }
    }

    /// A source that a checkpoint tells of: nothing of it counts before it was proved.
    pub(crate) fn restored(epoch: Epoch, now_ms: u64) -> Self {
        Self { epoch: Some(epoch), ..Self::new(now_ms) }
    }

    /// Judges a frame of this source and moves on. `now_ms` must not go back between calls.
    pub(crate) fn on_frame(&mut self, header: &FrameHeader, frame: &Bytes, now_ms: u64) -> Verdict {
        match self.epoch {
            None => self.start_epoch(header, frame, now_ms),
            // ## any => Hidden or Live, in the new epoch
            Some(epoch) if header.epoch > epoch => self.start_epoch(header, frame, now_ms),
            // A publisher's epoch is its start time, and a pod's clock may have been set back between two lives. So
            // an older epoch wins once the current one has been silent for longer than its lease.
            Some(epoch) if header.epoch < epoch && self.silent_ms(now_ms) > LEASE_MS => {
                self.start_epoch(header, frame, now_ms)
            }
            // Not a sign of life of the current epoch: the time of last sight stays.
            Some(epoch) if header.epoch < epoch => Verdict::StaleEpoch,
            Some(_) => self.on_current_epoch(header, frame, now_ms),
        }
    }

    fn start_epoch(&mut self, header: &FrameHeader, frame: &Bytes, now_ms: u64) -> Verdict {
        let (queued, limits) = (self.queued, self.limits);
        *self =
            Self { epoch: Some(header.epoch), heard: Some(header.seq), queued, limits, ..Self::new(now_ms) };
        self.health = header.health;
        if header.part == FramePart::Live && header.seq == FrameSeq(0) {
            self.phase = Phase::Live;
            self.applied = Some(header.seq);
            return Verdict::NewEpoch;
        }
        // Heartbeats change nothing, and what has digests is compared by the caller; only changes are worth keeping.
        self.held.hold(header.seq, frame, &self.limits);
        Verdict::NewEpochHidden
    }

    fn on_current_epoch(&mut self, header: &FrameHeader, frame: &Bytes, now_ms: u64) -> Verdict {
        let next = self.next();
        let proved = matches!(self.phase, Phase::Live | Phase::Gap);
        // A repeated frame may be an old one from some queue: it proves nothing.
        if proved && header.seq < next {
            return Verdict::Duplicate;
        }
        if self.heard.is_none_or(|heard| header.seq > heard) {
            self.last_seen_ms = now_ms;
            self.silent = false;
            self.heard = Some(header.seq);
        }
        // ## (Live | Gap) => (Live | Gap), gone or not
        if proved && header.seq == next {
            self.advance(header);
            return Verdict::Apply;
        }
        // ## Live => Gap
        //
        // A gone source stays gone: it lives, but its entries are of a time before the silence.
        if self.phase == Phase::Live {
            self.phase = Phase::Gap;
            self.asking = Asking::NOW;
        }
        // ## unchanged
        if self.held.hold(header.seq, frame, &self.limits) { Verdict::Held } else { Verdict::HeldOver }
    }

    /// Takes over what an applied frame says about the source.
    fn advance(&mut self, header: &FrameHeader) {
        self.applied = Some(header.seq);
        self.held.take(header.seq);
        self.health = header.health;
        self.gone = false;
        self.settle();
    }

    /// ## (Live | Gap) => Live if nothing is missing, else Gap
    fn settle(&mut self) {
        let complete = self.heard <= self.applied;
        // A held next frame is applied by the caller right away; then this is asked again.
        self.phase = if complete { Phase::Live } else { Phase::Gap };
    }

    /// The frame that comes next, if it is here already. To be offered to [`Self::on_frame`].
    pub(crate) fn next_held(&mut self) -> Option<Bytes> {
        if matches!(self.phase, Phase::Live | Phase::Gap) { self.held.take(self.next()) } else { None }
    }

    fn next(&self) -> FrameSeq {
        self.applied.map_or(FrameSeq(0), FrameSeq::next)
    }

    /// True if digests of this frame are to be compared with our content: it was just applied, or it may prove a content
    /// of unknown truth.
    pub(crate) fn compares(&self, header: &FrameHeader) -> bool {
        let now = match self.phase {
            Phase::Live | Phase::Gap => self.applied == Some(header.seq),
            Phase::Hidden | Phase::Diverged(_) => true,
        };
        now && !self.over_limit
            && self.epoch == Some(header.epoch)
            && header.digests.len() == header.owners.len()
    }

    /// Digests of frame `header` were compared with our content.
    pub(crate) fn on_compared(&mut self, header: &FrameHeader, equal: bool, now_ms: u64) {
        match (self.phase, equal) {
            (_, true) => self.prove(header, now_ms),
            // ## (Live | Gap) => Diverged
            (Phase::Live | Phase::Gap, false) => self.diverge(DegradedReason::Diverged),
            (Phase::Hidden | Phase::Diverged(_), false) => {}
        }
    }

    /// ## any => (Live | Gap): our content is the source's state after this frame.
    fn prove(&mut self, header: &FrameHeader, now_ms: u64) {
        self.applied = Some(header.seq);
        self.health = header.health;
        self.verified_ms = Some(now_ms);
        self.gone = false;
        self.held.drop_through(header.seq);
        self.session = None;
        if !matches!(self.phase, Phase::Live | Phase::Gap) {
            self.asking = Asking::NOW;
        }
        self.settle();
    }

    fn diverge(&mut self, reason: DegradedReason) {
        self.phase = Phase::Diverged(reason);
        self.verified_ms = None;
        self.asking = Asking::NOW;
    }

    /// The publisher does not keep the frames that we miss.
    pub(crate) fn on_unavailable(&mut self, header: &FrameHeader) {
        // ## Gap => Diverged
        if self.phase == Phase::Gap && self.epoch == Some(header.epoch) {
            self.diverge(DegradedReason::FramesLost);
        }
    }

    /// A piece of a state arrived.
    pub(crate) fn on_piece(&mut self, header: &FrameHeader, frame: &Bytes, now_ms: u64) -> Piece {
        match &mut self.session {
            Some(session) if self.epoch == Some(header.epoch) => {
                self.last_seen_ms = now_ms;
                self.silent = false;
                session.on_piece(header, frame, self.limits.staged_bytes, now_ms)
            }
            _ => Piece::Ignored,
        }
    }

    /// Every piece was applied, and our content is not what the publisher says: some of it changed hands or a bound
    /// refused it. What still differs is asked for again, when the wait that began with the question is over.
    pub(crate) fn on_transfer_failed(&mut self, header: &FrameHeader, now_ms: u64) {
        self.session = None;
        if self.over_limit {
            // As near as the bound allows. Asking again would bring the same.
            self.prove(header, now_ms);
            self.verified_ms = None;
        }
    }

    /// The transfer that is under way.
    pub(crate) fn session(&mut self) -> Option<&mut Session> {
        self.session.as_mut()
    }

    /// The transfer is given up.
    pub(crate) fn end_session(&mut self) {
        self.session = None;
    }

    /// The state was asked for.
    pub(crate) fn on_asked_for_state(&mut self, session: Session, now_ms: u64) {
        self.session = Some(session);
        self.asking.asked(now_ms, STATE_WAIT_MS, STATE_WAIT_MAX_MS);
    }

    /// True while something may have to be asked.
    pub(crate) fn needs_help(&self, now_ms: u64) -> bool {
        self.heard.is_some() && self.phase != Phase::Live && self.silent_ms(now_ms) <= LEASE_MS
    }

    /// What is to be asked now, if anything. [`Ask::State`] counts as asked only with [`Self::on_asked_for_state`].
    pub(crate) fn ask(&mut self, now_ms: u64) -> Option<Ask> {
        if !self.needs_help(now_ms) {
            return None;
        }
        if self.phase == Phase::Gap {
            return self.ask_for_frames(now_ms);
        }
        let waits =
            self.session.as_ref().is_some_and(|session| session.idle_ms(now_ms) < self.asking.wait_ms);
        (!waits && (self.session.is_some() || now_ms >= self.asking.next_ms)).then_some(Ask::State)
    }

    fn ask_for_frames(&mut self, now_ms: u64) -> Option<Ask> {
        if self.asking.applied != self.applied {
            (self.asking.applied, self.asking.wait_ms) = (self.applied, 0);
        }
        let last = self.heard?;
        let new_from = self.asking.through.map(FrameSeq::next).filter(|from| *from > self.next());
        let again = now_ms >= self.asking.next_ms;
        let from = if again { self.next() } else { new_from.unwrap_or_else(|| self.next()) };
        if !again && from > last {
            return None;
        }
        let ranges = self.held.missing(from, last, FRAMES_PER_ASK);
        let through = ranges.last()?.1;
        self.asking.through = self.asking.through.max(Some(through));
        if again {
            self.asking.asked(now_ms, FRAMES_WAIT_MS, FRAMES_WAIT_MAX_MS);
        }
        Some(Ask::Frames(ranges))
    }

    /// What silence did. To be called about once a second.
    pub(crate) fn on_tick(&mut self, now_ms: u64) -> Option<Expiry> {
        let expiry = self.expires(now_ms)?;
        match expiry {
            // ## any => marked
            Expiry::Silent => self.silent = true,
            // ## any => gone
            Expiry::Gone => (self.gone, self.silent) = (true, true),
            // ## gone => dropped, by the caller
            Expiry::Dropped => {}
        }
        Some(expiry)
    }

    /// What [`Self::on_tick`] would say, without doing it.
    pub(crate) fn expires(&self, now_ms: u64) -> Option<Expiry> {
        match self.silent_ms(now_ms) {
            silent if silent > FORGET_MS && self.gone => Some(Expiry::Dropped),
            silent if silent > LEASE_MS && !self.gone => Some(Expiry::Gone),
            silent if silent > STALE_MS && !self.silent && !self.gone => Some(Expiry::Silent),
            _ => None,
        }
    }

    /// The source has started an epoch in another scope, so what it held here is not there any more. If it does
    /// publish in both, its next frame here takes this back.
    pub(crate) fn on_moved_away(&mut self) {
        self.gone = true;
    }

    /// A bound of the index refused something of this source.
    pub(crate) fn on_over_limit(&mut self) {
        self.over_limit = true;
        self.verified_ms = None;
    }

    /// How far the source can be trusted. The worst news wins.
    pub(crate) fn state(&self) -> SourceState {
        if self.gone {
            return SourceState::Gone;
        }
        let degraded = match self.phase {
            Phase::Hidden => return SourceState::Syncing,
            Phase::Gap => Some(DegradedReason::FramesLost),
            Phase::Diverged(reason) => Some(reason),
            Phase::Live if self.over_limit => Some(DegradedReason::OverLimit),
            Phase::Live if self.silent => Some(DegradedReason::Silent),
            Phase::Live => DegradedReason::of_health(self.health),
        };
        match degraded {
            Some(reason) => SourceState::Degraded(reason),
            None if self.verified_ms.is_some() => SourceState::Verified,
            None => SourceState::Live,
        }
    }

    /// True if its entries count in answers.
    pub(crate) fn counts(&self) -> bool {
        !self.gone && self.phase != Phase::Hidden
    }

    /// True if frames are missing and were asked for.
    pub(crate) fn has_gap(&self) -> bool {
        self.phase == Phase::Gap
    }

    /// The newest epoch heard of.
    pub(crate) fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// The frame after which our content was the source's state.
    pub(crate) fn applied_seq(&self) -> Option<FrameSeq> {
        self.applied
    }

    /// When digests were last equal, since the content was last in doubt.
    pub(crate) fn trust(&self) -> Trust {
        Trust { state: self.state(), verified_ms: self.verified_ms() }
    }

    /// When digests were last equal.
    pub(crate) fn verified_ms(&self) -> Option<u64> {
        self.verified_ms
    }

    /// Milliseconds since the last frame that proved life.
    pub(crate) fn silent_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.last_seen_ms)
    }
}

#[cfg(test)]
#[path = "sources_tests.rs"]
mod tests;
