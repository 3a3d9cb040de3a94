//! Which messages were applied: enough to tell a replay's overlap from another life of the engine.

use xxhash_rust::xxh3::xxh3_64;

use crate::state::wire;

/// Applied messages whose fingerprints are remembered. Covers vLLM's default replay buffer of 10,000.
pub(super) const HISTORY_MESSAGES: usize = 16_384;
/// A slot that holds nothing.
const UNUSED: (u64, u64) = (u64::MAX, 0);

/// Fingerprints of the messages applied last, by sequence.
#[derive(Default)]
pub(super) struct History(Vec<(u64, u64)>);

// === impl History ===

impl History {
    fn slot(seq: u64) -> usize {
        (seq % HISTORY_MESSAGES as u64) as usize
    }

    pub(super) fn record(&mut self, seq: u64, payload: &[u8]) {
        self.remember(seq, xxh3_64(payload));
    }

    /// The same, by fingerprint.
    pub(super) fn remember(&mut self, seq: u64, fingerprint: u64) {
        if self.0.is_empty() {
            self.0 = vec![UNUSED; HISTORY_MESSAGES];
        }
        self.0[Self::slot(seq)] = (seq, fingerprint);
    }

    /// Up to `count` of the newest messages up to `last`, newest first.
    pub(super) fn newest(&self, last: u64, count: usize) -> Vec<wire::Applied> {
        let seqs = (0..HISTORY_MESSAGES as u64).map_while(|back| last.checked_sub(back));
        let known = seqs.filter_map(|seq| self.0.get(Self::slot(seq)).filter(|(at, _)| *at == seq));
        known.take(count).map(|&(seq, fingerprint)| wire::Applied { seq, fingerprint }).collect()
    }

    /// `None` if nothing is remembered at this sequence.
    pub(super) fn is_same(&self, seq: u64, payload: &[u8]) -> Option<bool> {
        let (at, fingerprint) = *self.0.get(Self::slot(seq))?;
        (at == seq).then(|| fingerprint == xxh3_64(payload))
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
