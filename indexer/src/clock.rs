//! The shell's clock: milliseconds since the server started, never going back. The core gets them as arguments.

use tokio::time::Instant;

/// Counts from its creation. Follows tokio's clock, so tests may pause it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self { start: Instant::now() }
    }

    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
