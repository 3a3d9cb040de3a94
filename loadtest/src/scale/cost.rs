//! What something cost: time on the processor, and memory.

use std::time::{Duration, Instant};

/// Size of a page of memory, bytes: Linux on all machines this is run on.
const PAGE_BYTES: u64 = 4_096;

/// Time that this thread spends on the processor. Others may share the machine, so the time on the wall says little; where the
/// system does not tell the former, it is the latter.
pub(super) struct Stopwatch {
    cpu: Option<Duration>,
    wall: Instant,
}

// === impl Stopwatch ===

impl Stopwatch {
    /// From now on.
    pub(super) fn start() -> Self {
        Self { cpu: thread_time(), wall: Instant::now() }
    }

    /// Since then, nanoseconds.
    pub(super) fn elapsed_ns(&self) -> u64 {
        let cpu = self.cpu.zip(thread_time()).map(|(before, now)| now.saturating_sub(before));
        cpu.unwrap_or_else(|| self.wall.elapsed()).as_nanos() as u64
    }
}

fn thread_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

/// Memory of this process now, bytes; 0 where the system does not tell.
pub(super) fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * PAGE_BYTES
}
