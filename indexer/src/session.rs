//! A transfer of a source's state: what was asked with which slices, and the pieces of the answer so far.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use kvatlas_proto::frame::FrameHeader;
use kvatlas_proto::request::RequestId;
use kvatlas_proto::{CacheGroup, FrameSeq, Tier};

/// Pieces that wait to be applied together, in bytes. A larger answer is applied in several steps, each of which only
/// brings the content nearer to the truth.
pub(crate) const STAGED_BYTES: usize = 16 << 20;
/// Most pieces of one answer: at 64 KiB each, 4 GiB.
const MAX_PIECES: u32 = 65_536;

/// Transfers that run at the same time. Few, so that queries keep their latency while a fleet synchronises, and enough
/// that a slow publisher does not hold up the others.
#[derive(Clone, Debug)]
pub(crate) struct Permits {
    running: Arc<AtomicUsize>,
    most: usize,
}

/// The right to run a transfer; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit(Arc<AtomicUsize>);

/// An owner by what names it within its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnerName {
    pub(crate) tier: Tier,
    pub(crate) medium: String,
    pub(crate) group: CacheGroup,
}

/// A transfer that was asked for.
#[derive(Debug)]
pub(crate) struct Session {
    id: RequestId,
    /// In how many slices (as a power of two) each owner was cut; those not listed were said to be empty.
    pub(crate) bits: Vec<(OwnerName, u8)>,
    /// State after which frame is being sent, and in how many pieces; known with the first piece.
    of: Option<(FrameSeq, u32)>,
    got: BTreeSet<u32>,
    staged: Vec<Bytes>,
    staged_bytes: usize,
    /// When it was asked for, or the last piece came.
    progress_ms: u64,
    _permit: Permit,
}

/// What a piece brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// It belongs to another question, or was there already.
    Ignored,
    /// It is kept; more is to come.
    Kept,
    /// What was kept so far is to be applied.
    Apply {
        /// No piece is missing.
        complete: bool,
    },
}

// === impl Permits ===

impl Permits {
    pub(crate) fn new(most: usize) -> Self {
        Self { running: Arc::default(), most }
    }

    /// `None` while as many run as may.
    pub(crate) fn take(&self) -> Option<Permit> {
        let free = |now: usize| (now < self.most).then_some(now + 1);
        self.running.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free).ok()?;
        Some(Permit(Arc::clone(&self.running)))
    }
}

// === impl Permit ===

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

// === impl Session ===

impl Session {
    pub(crate) fn new(id: RequestId, bits: Vec<(OwnerName, u8)>, permit: Permit, now_ms: u64) -> Self {
        Self {
            id,
            bits,
            of: None,
            got: BTreeSet::new(),
            staged: Vec::new(),
            staged_bytes: 0,
            progress_ms: now_ms,
            _permit: permit,
        }
    }

    /// Takes a piece of an answer.
    pub(crate) fn on_piece(
        &mut self,
        header: &FrameHeader,
        frame: &Bytes,
        staged_bytes: usize,
        now_ms: u64,
    ) -> Piece {
        let Some(reply) = header.reply.filter(|reply| reply.request == self.id) else {
            return Piece::Ignored;
        };
        let of = *self.of.get_or_insert((header.seq, reply.pieces));
        if of != (header.seq, reply.pieces) || reply.pieces > MAX_PIECES || !self.got.insert(reply.piece) {
            return Piece::Ignored;
        }
        self.progress_ms = now_ms;
        self.staged_bytes += frame.len();
        self.staged.push(frame.clone());
        let complete = self.got.len() == reply.pieces as usize;
        if complete || self.staged_bytes > staged_bytes { Piece::Apply { complete } } else { Piece::Kept }
    }

    /// The pieces that were not applied yet.
    pub(crate) fn take_staged(&mut self) -> Vec<Bytes> {
        self.staged_bytes = 0;
        std::mem::take(&mut self.staged)
    }

    /// Milliseconds since anything came.
    pub(crate) fn idle_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.progress_ms)
    }
}
