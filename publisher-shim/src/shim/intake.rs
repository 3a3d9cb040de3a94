//! Between the task that reads an engine's socket and the one that applies: a queue that never makes the reader wait.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::QUEUE_BYTES;
use crate::zmq;

/// A live message on its way from the reading task.
pub(super) struct Inbound {
    pub(super) connection: u64,
    pub(super) seq: u64,
    pub(super) payload: Bytes,
}

/// Shared between the reading task and the source task.
#[derive(Default)]
pub(super) struct Intake {
    pub(super) queued_bytes: AtomicUsize,
    pub(super) overflow: AtomicU64,
    pub(super) bad_frames: AtomicU64,
}

// === impl Intake ===

impl Intake {
    /// Called by the reading task for each message; never waits.
    pub(super) fn deliver(&self, queue: &mpsc::Sender<Inbound>, connection: u64, frames: &[Bytes]) {
        let Ok((seq, payload)) = zmq::parse_live(frames) else {
            self.bad_frames.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let size = payload.len();
        let room = self.queued_bytes.load(Ordering::Relaxed) + size <= QUEUE_BYTES;
        if !room || queue.try_send(Inbound { connection, seq, payload: payload.clone() }).is_err() {
            self.overflow.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.queued_bytes.fetch_add(size, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(seq: u64, bytes: usize) -> Vec<Bytes> {
        vec![Bytes::new(), Bytes::copy_from_slice(&seq.to_be_bytes()), Bytes::from(vec![0; bytes])]
    }

    #[test]
    fn a_full_queue_never_makes_the_reader_wait_and_what_is_dropped_is_counted() {
        let (queue_in, mut queue) = mpsc::channel(2);
        let intake = Intake::default();
        (0..5).for_each(|seq| intake.deliver(&queue_in, 1, &message(seq, 10)));
        assert_eq!(intake.overflow.load(Ordering::Relaxed), 3);
        // What is in the queue is in order, so the loss shows as a gap at the next message.
        let seqs: Vec<u64> =
            std::iter::from_fn(|| queue.try_recv().ok()).map(|message| message.seq).collect();
        assert_eq!(seqs, [0, 1]);
    }

    #[test]
    fn queued_bytes_are_bounded_too() {
        let (queue_in, _queue) = mpsc::channel(16);
        let intake = Intake::default();
        intake.queued_bytes.store(QUEUE_BYTES - 15, Ordering::Relaxed);
        (0..2).for_each(|seq| intake.deliver(&queue_in, 1, &message(seq, 10)));
        assert_eq!(intake.overflow.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn frames_that_are_no_message_are_counted_and_dropped() {
        let (queue_in, mut queue) = mpsc::channel(16);
        let intake = Intake::default();
        intake.deliver(&queue_in, 1, &[Bytes::new()]);
        intake.deliver(&queue_in, 1, &[Bytes::new(), Bytes::from_static(b"short"), Bytes::new()]);
        assert_eq!(intake.bad_frames.load(Ordering::Relaxed), 2);
        assert!(queue.try_recv().is_err());
    }
}
