//! One clock for a whole rig: milliseconds since it was made.

use tokio::time::Instant;

/// Counts from its creation; copies count together.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

// === impl Clock ===

impl Clock {
    /// Starts at 0.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Milliseconds since the start.
    pub fn now_ms(&self) -> u64 {
        self.0.elapsed().as_millis() as u64
    }
}
