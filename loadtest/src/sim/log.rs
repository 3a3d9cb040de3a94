//! Everything that happens in a simulation, in order: hashed always, kept as text if asked.

use std::fmt::{self, Write as _};

use xxhash_rust::xxh3::Xxh3;

/// Lines kept for a failure's report: what happened just before it.
const LAST_LINES: usize = 40;

/// The log of one simulation.
pub(super) struct Log {
    hash: Xxh3,
    line: String,
    lines: u64,
    kept: Vec<String>,
    /// Keep every line, not only the last ones.
    trace: bool,
}

// === impl Log ===

impl Log {
    pub(super) fn new(trace: bool) -> Self {
        Self { hash: Xxh3::new(), line: String::new(), lines: 0, kept: Vec::new(), trace }
    }

    /// Appends a line at a virtual time in microseconds.
    pub(super) fn line(&mut self, now_us: u64, what: fmt::Arguments<'_>) {
        self.line.clear();
        write!(self.line, "{:>10.6} {what}", now_us as f64 / 1e6).expect("writing to a string");
        self.hash.update(self.line.as_bytes());
        self.hash.update(b"\n");
        self.lines += 1;
        if self.trace {
            self.kept.push(self.line.clone());
        } else {
            let slot = (self.lines as usize - 1) % LAST_LINES;
            match self.kept.get_mut(slot) {
                Some(kept) => kept.clone_from(&self.line),
                None => self.kept.push(self.line.clone()),
            }
        }
    }

    /// The hash of all lines so far.
    pub(super) fn hash(&self) -> u64 {
        self.hash.digest()
    }

    /// The kept lines, oldest first.
    pub(super) fn into_lines(mut self) -> Vec<String> {
        if !self.trace && self.kept.len() == LAST_LINES {
            self.kept.rotate_left(self.lines as usize % LAST_LINES);
        }
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_in_order_and_all_of_them_count_in_the_hash() {
        let mut log = Log::new(false);
        (0..100).for_each(|n| log.line(n, format_args!("line {n}")));
        let mut other = Log::new(true);
        (0..100).for_each(|n| other.line(n, format_args!("line {n}")));
        assert_eq!(log.hash(), other.hash());
        other.line(100, format_args!(""));
        assert_ne!(log.hash(), other.hash());
        let (last, all) = (log.into_lines(), other.into_lines());
        assert_eq!((last.len(), all.len()), (LAST_LINES, 101));
        assert_eq!(last[..], all[100 - LAST_LINES..100]);
    }
}
