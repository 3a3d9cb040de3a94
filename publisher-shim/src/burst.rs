//! One log line per burst: the first of its kind at once, then a count at most every [`QUIET`].

use std::time::Duration;

use tokio::time::Instant;

/// Shortest time between two lines of one kind.
pub(crate) const QUIET: Duration = Duration::from_secs(10);

/// Decides when something that keeps happening is worth a line.
#[derive(Debug, Default)]
pub(crate) struct Burst {
    last_line: Option<Instant>,
    seen: u64,
    said: u64,
}

// === impl Burst ===

impl Burst {
    /// Takes the running total of occurrences. Returns how many are new if it is time for a line.
    pub(crate) fn note(&mut self, total: u64, now: Instant) -> Option<u64> {
        self.seen = total;
        let quiet = self.last_line.is_none_or(|last| now.duration_since(last) >= QUIET);
        if self.seen > self.said && quiet {
            self.last_line = Some(now);
            return Some(self.seen - std::mem::replace(&mut self.said, self.seen));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_one_line_and_its_rest_is_counted_later() {
        let (mut burst, start) = (Burst::default(), Instant::now());
        assert_eq!(burst.note(0, start), None);
        assert_eq!(burst.note(1, start), Some(1));
        assert_eq!(burst.note(500, start), None);
        assert_eq!(burst.note(500, start + QUIET), Some(499));
        assert_eq!(burst.note(500, start + 2 * QUIET), None);
    }
}
