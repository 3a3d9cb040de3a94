//! Logging something that may happen a thousand times a second: the first is told at once, the rest of a burst as a
//! number.

/// Shortest time between two lines about the same thing, milliseconds. An operator sees a problem at once and a
/// lasting one six times a minute.
pub(crate) const BURST_MS: u64 = 10_000;

/// Lets one line through per [`BURST_MS`] and counts the others.
#[derive(Debug, Default)]
pub(crate) struct BurstLimiter {
    last_ms: Option<u64>,
    withheld: u64,
}

impl BurstLimiter {
    /// `Some(n)` if this one is to be logged; `n` were not since the last one.
    pub(crate) fn admit(&mut self, now_ms: u64) -> Option<u64> {
        if self.last_ms.is_some_and(|last| now_ms.saturating_sub(last) < BURST_MS) {
            self.withheld += 1;
            return None;
        }
        self.last_ms = Some(now_ms);
        Some(std::mem::take(&mut self.withheld))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_the_rest_as_a_number() {
        let mut limiter = BurstLimiter::default();
        assert_eq!(limiter.admit(5), Some(0));
        assert_eq!(limiter.admit(6), None);
        assert_eq!(limiter.admit(4 + BURST_MS), None);
        assert_eq!(limiter.admit(5 + BURST_MS), Some(2));
        assert_eq!(limiter.admit(5 + 3 * BURST_MS), Some(0));
    }
}
