//! A checkpoint on its way into a store: pieces in a bounded queue, written by a thread that blocks and taken by a task that
//! waits.
//!
//! An index seals a checkpoint at the end by going back to its first bytes (`kvatlas_proto::sealed`). A stream cannot go
//! back, so those bytes are held and travel last: what a store holds is body, then preamble. [`in_order`] turns that around. It
//! has a use of its own: a stream that was cut off has no seal at all.

use std::io::{self, Seek, SeekFrom, Write};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kvatlas_index::CheckpointSize;
use kvatlas_index::store::{SaveError, WriteCheckpoint};
use kvatlas_proto::sealed::PREAMBLE_BYTES;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Bytes of a piece. Large enough that a round trip for each does not matter, small enough that a server which handles one
/// command at a time is not held up: a millisecond or two.
pub const PIECE_BYTES: usize = 4 << 20;
/// Longest time that saving may take: a gigabyte at 4 MB/s. What is slower than that is not there when it is needed.
pub const SAVE_TIMEOUT: Duration = Duration::from_secs(300);
/// Finished pieces that wait for the store. With the ones being written and sent, 16 MiB.
const QUEUE_PIECES: usize = 2;

/// The pieces of one checkpoint, in the order in which they are stored.
pub(crate) struct Pieces {
    queue: mpsc::Receiver<Piece>,
    is_complete: bool,
}

enum Piece {
    Body(Bytes),
    /// The preamble: everything before it was written, and nothing comes after.
    Last(Bytes),
}

/// Cuts what is written into pieces.
struct PieceWriter {
    queue: mpsc::Sender<Piece>,
    preamble: [u8; PREAMBLE_BYTES],
    body: BytesMut,
    /// Where the next byte goes.
    position: usize,
    /// How many bytes there are.
    end: usize,
}

/// Lets `write` write and `store` take the pieces, both at once, within [`SAVE_TIMEOUT`]. When this returns, nothing of it runs
/// any more.
pub(crate) async fn save<F>(
    write: WriteCheckpoint,
    store: impl FnOnce(Pieces) -> F,
) -> Result<CheckpointSize, SaveError>
where
    F: Future<Output = Result<(), SaveError>> + Send,
{
    let (queue_in, queue) = mpsc::channel(QUEUE_PIECES);
    let writing = tokio::task::spawn_blocking(move || {
        let mut writer = PieceWriter::new(queue_in);
        let size = write(&mut writer)?;
        writer.finish()?;
        Ok(size)
    });
    let stored = timeout(SAVE_TIMEOUT, store(Pieces { queue, is_complete: false })).await;
    // The queue is closed by now, which ends a writer that is not done.
    let written = writing.await.unwrap_or_else(|panic| Err(io::Error::other(panic)));
    match (stored, written) {
        // A broken pipe is what the other side's failure looks like from here.
        (_, Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        (Err(_), _) => Err(SaveError::TimedOut { after: SAVE_TIMEOUT }),
        (Ok(Err(error)), _) => Err(error),
        (Ok(Ok(())), written) => Ok(written?),
    }
}

/// What a store holds, in the order in which it was written.
pub(crate) fn in_order(mut stored: Vec<u8>) -> Vec<u8> {
    let preamble = PREAMBLE_BYTES.min(stored.len());
    stored.rotate_right(preamble);
    stored
}

// === impl Pieces ===

impl Pieces {
    /// The next piece; `None` after the last. An error means that the checkpoint will never be complete.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        match self.queue.recv().await {
            Some(Piece::Body(bytes)) => Ok(Some(bytes)),
            Some(Piece::Last(bytes)) => {
                self.is_complete = true;
                Ok(Some(bytes))
            }
            None if self.is_complete => Ok(None),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the index did not finish it")),
        }
    }
}

// === impl PieceWriter ===

impl PieceWriter {
    fn new(queue: mpsc::Sender<Piece>) -> Self {
        Self { queue, preamble: [0; PREAMBLE_BYTES], body: BytesMut::new(), position: 0, end: 0 }
    }

    fn send(&self, piece: Piece) -> io::Result<()> {
        self.queue.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn finish(mut self) -> io::Result<()> {
        if self.end < PREAMBLE_BYTES {
            return Err(io::Error::other("a checkpoint has a preamble"));
        }
        if !self.body.is_empty() {
            let rest = self.body.split().freeze();
            self.send(Piece::Body(rest))?;
        }
        self.send(Piece::Last(Bytes::copy_from_slice(&self.preamble)))
    }
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = if self.position < PREAMBLE_BYTES {
            let taken = bytes.len().min(PREAMBLE_BYTES - self.position);
            self.preamble[self.position..][..taken].copy_from_slice(&bytes[..taken]);
            taken
        } else if self.position == self.end {
            let taken = bytes.len().min(PIECE_BYTES - self.body.len());
            self.body.extend_from_slice(&bytes[..taken]);
            if self.body.len() == PIECE_BYTES {
                let full = std::mem::take(&mut self.body).freeze();
                self.send(Piece::Body(full))?;
            }
            taken
        } else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "what was written is on its way already"));
        };
        self.position += taken;
        self.end = self.end.max(self.position);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for PieceWriter {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => usize::try_from(position).ok(),
            SeekFrom::End(offset) => offset_from(self.end, offset),
            SeekFrom::Current(offset) => offset_from(self.position, offset),
        };
        let position = position.filter(|position| *position <= self.end);
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position as u64)
    }
}

fn offset_from(position: usize, offset: i64) -> Option<usize> {
    position.checked_add_signed(isize::try_from(offset).ok()?)
}

#[cfg(test)]
mod tests {
    use kvatlas_index::store::AccessError;

    use super::*;

    fn writes(bytes: Vec<u8>) -> WriteCheckpoint {
        Box::new(move |out| {
            let (preamble, body) = bytes.split_at(PREAMBLE_BYTES);
            out.write_all(&[0; PREAMBLE_BYTES])?;
            out.write_all(body)?;
            out.seek(SeekFrom::Start(8))?;
            out.write_all(&preamble[8..])?;
            out.seek(SeekFrom::Start(0))?;
            out.write_all(&preamble[..8])?;
            Ok(CheckpointSize { bytes: bytes.len() as u64, ..CheckpointSize::default() })
        })
    }

    async fn collect(mut pieces: Pieces) -> Result<Vec<Bytes>, SaveError> {
        let mut all = Vec::new();
        while let Some(piece) = pieces.next().await? {
            all.push(piece);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn what_is_written_arrives_whole_in_pieces_of_at_most_the_bound() {
        for body in [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 5] {
            let bytes: Vec<u8> = (0..PREAMBLE_BYTES + body).map(|n| (n % 251) as u8).collect();
            let mut stored = Vec::new();
            let all = &mut stored;
            let size = save(writes(bytes.clone()), |pieces| async move {
                *all = collect(pieces).await?;
                Ok(())
            });
            assert_eq!(size.await.unwrap().bytes, bytes.len() as u64);
            assert_eq!(stored.len(), body.div_ceil(PIECE_BYTES) + 1);
            assert!(stored.iter().all(|piece| piece.len() <= PIECE_BYTES));
            assert_eq!(in_order(stored.concat()), bytes, "{body}");
        }
    }

    #[tokio::test]
    async fn a_writer_that_fails_or_panics_never_looks_complete() {
        let failing: [WriteCheckpoint; 2] = [
            Box::new(|out| {
                out.write_all(&[7; 100])?;
                Err(io::Error::other("no more"))
            }),
            Box::new(|_| panic!("on purpose")),
        ];
        for write in failing {
            let mut is_taken = false;
            let taken = &mut is_taken;
            let saved = save(write, |pieces| async move {
                collect(pieces).await?;
                *taken = true;
                Ok(())
            });
            assert_eq!(saved.await.unwrap_err().reason(), "unwritable");
            assert!(!is_taken);
        }
    }

    #[tokio::test]
    async fn a_store_that_fails_ends_the_writer_and_is_the_reason() {
        let endless: WriteCheckpoint = Box::new(|out| {
            loop {
                out.write_all(&[7; 1 << 13])?;
            }
        });
        let saved = save(endless, |mut pieces| async move {
            pieces.next().await?;
            Err(AccessError::Refused { place: "there".to_owned(), reason: "full".to_owned() }.into())
        });
        assert_eq!(saved.await.unwrap_err().reason(), "refused");
    }

    #[tokio::test]
    async fn only_the_preamble_can_be_written_again() {
        let back: WriteCheckpoint = Box::new(|out| {
            out.write_all(&[7; 100])?;
            out.seek(SeekFrom::Start(50))?;
            out.write_all(&[8])?;
            Ok(CheckpointSize::default())
        });
        let saved = save(back, |pieces| async { collect(pieces).await.map(drop) });
        assert_eq!(saved.await.unwrap_err().reason(), "unwritable");
    }
}
