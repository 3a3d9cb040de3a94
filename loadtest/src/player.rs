//! Plays a recording as its engines did: each stream has an event socket and a replay socket of its own, and messages
//! leave them unchanged.
//!
//! The caller drives: [`Player::play_until_marker`] sends live messages up to the recorder's next remark, where a checker
//! can stop and compare. Nothing is timed. Where the recording says that the subscriber went away the caller decides
//! whether to drop the connections ([`Player::close_stream`], [`Player::open_stream`]); a live message of a closed stream
//! is published to nobody, as it was then.
//!
//! Replays are answered with what the engine's buffer held at this point of the recording: the live messages of the
//! present engine life, and the recorded replies, which also have what the recorder's subscriber missed. Only
//! sequences that the engine had published by then are answered, and no more than its buffer kept. A batch that is
//! nowhere in the recording stays missing.

mod lives;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use self::lives::{Life, lives_of};
use crate::kvrec::{Marker, Record, RecordKind, Recording};
use crate::replay::{DEFAULT_BUFFER_STEPS, ReplayBuffer, ReplayFraming};
use crate::sockets::{BindError, NoSubscriberError, SendError, StreamEndpoints, StreamPorts, StreamSockets};

/// Plays one recording, once.
#[derive(Debug)]
pub struct Player {
    recording: Recording,
    /// Next record to play.
    position: usize,
    streams: Vec<PlayedStream>,
    unsent: u64,
}

/// What was played.
#[derive(Clone, Debug, PartialEq)]
pub enum Played {
    /// A live message.
    Live {
        /// Its stream.
        stream: u8,
        /// Its sequence; absent for a malformed message.
        seq: Option<u64>,
        /// False if the stream was closed.
        is_sent: bool,
    },
    /// A remark of the recorder.
    Marker {
        /// Its stream.
        stream: u8,
        /// The remark.
        marker: Marker,
    },
}

/// Why playing stopped.
#[derive(Debug, thiserror::Error)]
#[error("cannot play record {index} of stream {stream}: {source}")]
pub struct PlayError {
    index: usize,
    stream: u8,
    source: SendError,
}

/// A stream is not part of the recording.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the recording has no stream {stream}; it has {streams}, counted from 0")]
pub struct NoStreamError {
    stream: u8,
    streams: usize,
}

/// Why a stream was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenStreamError {
    /// There is no such stream.
    #[error(transparent)]
    NoStream(#[from] NoStreamError),
    /// Its ports could not be bound again.
    #[error(transparent)]
    Bind(#[from] BindError),
}

/// Why a subscriber was not seen.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// There is no such stream.
    #[error(transparent)]
    NoStream(#[from] NoStreamError),
    /// The stream is closed.
    #[error("stream {0} is closed; open it before waiting for subscribers")]
    StreamClosed(u8),
    /// Too few came.
    #[error(transparent)]
    NoSubscriber(#[from] NoSubscriberError),
}

#[derive(Debug)]
struct PlayedStream {
    /// Absent while closed.
    sockets: Option<StreamSockets>,
    endpoints: StreamEndpoints,
    buffer: Arc<Mutex<ReplayBuffer>>,
    lives: Vec<Life>,
    /// Index of the next life in `lives`.
    next_life: usize,
}

// === impl Player ===

impl Player {
    /// Binds the sockets of every stream on free ports of 127.0.0.1.
    pub async fn bind(recording: Recording) -> Result<Self, BindError> {
        let steps = recording.header.config["buffer_steps"].as_u64();
        let steps = steps.map_or(DEFAULT_BUFFER_STEPS, |steps| steps as usize);
        let mut streams = Vec::new();
        for (stream, header) in (0..=u8::MAX).zip(&recording.header.streams) {
            let framing = ReplayFraming::of_stream(&recording, stream);
            let buffer = ReplayBuffer::new(Bytes::from(header.topic.clone()), framing, steps);
            let buffer = Arc::new(Mutex::new(buffer));
            let sockets = StreamSockets::bind(StreamPorts::default(), Arc::clone(&buffer)).await?;
            streams.push(PlayedStream {
                endpoints: sockets.endpoints().clone(),
                sockets: Some(sockets),
                buffer,
                lives: lives_of(&recording.records, stream),
                next_life: 0,
            });
        }
        Ok(Self { recording, position: 0, streams, unsent: 0 })
    }

    /// The recording.
    pub fn recording(&self) -> &Recording {
        &self.recording
    }

    /// Where the streams are, in the order of the recording's header. They stay there when a stream is opened again.
    pub fn endpoints(&self) -> Vec<StreamEndpoints> {
        self.streams.iter().map(|stream| stream.endpoints.clone()).collect()
    }

    /// Live messages that were played while their stream was closed.
    pub fn unsent(&self) -> u64 {
        self.unsent
    }

    /// Waits until `expected` subscriptions to a stream have arrived since it was last opened.
    pub async fn wait_for_subscribers(
        &self,
        stream: u8,
        expected: usize,
        wait: Duration,
    ) -> Result<(), WaitError> {
        let played = self.streams.get(usize::from(stream)).ok_or_else(|| self.no_stream(stream))?;
        let sockets = played.sockets.as_ref().ok_or(WaitError::StreamClosed(stream))?;
        Ok(sockets.wait_for_subscribers(expected, wait).await?)
    }

    /// Plays the next live message or remark. `None` at the end of the recording.
    pub async fn play_next(&mut self) -> Result<Option<Played>, PlayError> {
        while let Some(record) = self.recording.records.get(self.position) {
            let index = self.position;
            let stream = record.stream;
            let played = &mut self.streams[usize::from(stream)];
            played.enter(index, record);
            self.position += 1;
            match record.kind {
                RecordKind::Live => {
                    let seq = record.message().map(|message| message.seq);
                    let is_sent = played.send(record.frames.clone()).await.map_err(|source| PlayError {
                        index,
                        stream,
                        source,
                    })?;
                    self.unsent += u64::from(!is_sent);
                    return Ok(Some(Played::Live { stream, seq, is_sent }));
                }
                RecordKind::Marker => {
                    if let Some(marker) = record.marker() {
                        return Ok(Some(Played::Marker { stream, marker }));
                    }
                }
                RecordKind::ReplayRequest | RecordKind::ReplayReply => {}
            }
        }
        Ok(None)
    }

    /// Plays live messages up to and including the next remark, and returns it with its stream. `None` at the end.
    pub async fn play_until_marker(&mut self) -> Result<Option<(u8, Marker)>, PlayError> {
        loop {
            match self.play_next().await? {
                Some(Played::Live { .. }) => {}
                Some(Played::Marker { stream, marker }) => return Ok(Some((stream, marker))),
                None => return Ok(None),
            }
        }
    }

    /// Drops every connection of a stream and stops listening. Closing a closed stream does nothing.
    pub async fn close_stream(&mut self, stream: u8) -> Result<(), NoStreamError> {
        let error = self.no_stream(stream);
        let played = self.streams.get_mut(usize::from(stream)).ok_or(error)?;
        if let Some(sockets) = played.sockets.take() {
            sockets.close().await;
        }
        Ok(())
    }

    /// Listens again on the ports of a closed stream. Opening an open stream does nothing.
    pub async fn open_stream(&mut self, stream: u8) -> Result<(), OpenStreamError> {
        let error = self.no_stream(stream);
        let played = self.streams.get_mut(usize::from(stream)).ok_or(error)?;
        if played.sockets.is_none() {
            let buffer = Arc::clone(&played.buffer);
            played.sockets = Some(StreamSockets::bind(played.endpoints.ports, buffer).await?);
        }
        Ok(())
    }

    /// Closes all streams and waits until their ports are free.
    pub async fn close(self) {
        for sockets in self.streams.into_iter().filter_map(|stream| stream.sockets) {
            sockets.close().await;
        }
    }

    fn no_stream(&self, stream: u8) -> NoStreamError {
        NoStreamError { stream, streams: self.streams.len() }
    }
}

// === impl PlayedStream ===

impl PlayedStream {
    /// Brings the replay buffer to the state it had when `record` was received.
    fn enter(&mut self, index: usize, record: &Record) {
        let mut buffer = self.buffer.lock();
        while let Some(life) = self.lives.get(self.next_life).filter(|life| life.first_record <= index) {
            buffer.restart();
            for (seq, payload) in &life.replies {
                buffer.foresee(*seq, payload.clone());
            }
            self.next_life += 1;
        }
        // Live messages and replies alike: the engine had published what arrives.
        if let Some(message) = record.message() {
            buffer.push(message.seq, message.payload.clone());
        }
        if let Some(
            Marker::SubscriberClosed { published: Some(count) }
            | Marker::SubscriberOpen { published: Some(count) },
        ) = record.marker()
        {
            buffer.advance_to(count);
        }
    }

    /// False if the stream is closed.
    async fn send(&self, frames: Vec<Bytes>) -> Result<bool, SendError> {
        match &self.sockets {
            Some(sockets) => sockets.send(frames).await.map(|()| true),
            None => Ok(false),
        }
    }
}

#[cfg(test)]
#[path = "player_tests.rs"]
mod tests;
