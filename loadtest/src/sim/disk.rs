//! The file of one process: what was written, and what is left of it after a kill.

use super::op::DiskFault;
use super::rng::Rng;

/// One file.
#[derive(Default)]
pub(super) struct Disk {
    current: Option<Vec<u8>>,
    before: Option<Vec<u8>>,
}

// === impl Disk ===

impl Disk {
    /// Replaces the content.
    pub(super) fn write(&mut self, bytes: Vec<u8>) {
        self.before = self.current.replace(bytes);
    }

    /// What is there.
    pub(super) fn read(&self) -> Option<&[u8]> {
        self.current.as_deref()
    }

    /// What a kill does.
    pub(super) fn fail(&mut self, fault: DiskFault, rng: &mut Rng) {
        let Some(bytes) = &mut self.current else { return };
        match fault {
            DiskFault::None => {}
            DiskFault::Old => self.current = self.before.take(),
            DiskFault::Lost => self.current = None,
            DiskFault::Torn => bytes.truncate(rng.below(bytes.len().max(1) as u64) as usize),
            DiskFault::Flipped if bytes.is_empty() => {}
            DiskFault::Flipped => *bytes = super::bus::damage(bytes, rng).to_vec(),
        }
    }
}
