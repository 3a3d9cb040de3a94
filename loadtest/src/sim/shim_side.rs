//! A simulated shim process: what the shell around [`Source`] does with sockets, timers and its state file, in virtual
//! time. The source and its file are the real ones.

use std::collections::VecDeque;

use bytes::Bytes;
use kvatlas_proto::frame::{EncodeFrameError, FrameHeader, FramePart, ReplyPart};
use kvatlas_proto::keys::KEY_VERSION;
use kvatlas_proto::request::{Request, RequestId};
use kvatlas_proto::{InstanceId, Scope, ShardId};
use kvatlas_shim::source::{FRAME_OPS_BYTES, Live, PublishLimits, Source, SourceConfig, StateMark};

use super::bus::Kind;
use super::disk::Disk;
use super::engine::Content;
use super::op::{DiskFault, Process};
use super::prompts::BLOCK_TOKENS;
use super::reference::content_of_answer;
use super::rng::Rng;
use super::world::{Event, World};

/// Model of all simulated engines.
pub(super) const MODEL: &str = "simulated";
/// Time after which a replay socket that says nothing is given up, microseconds.
pub(super) const REPLAY_TIMEOUT_US: u64 = 6_000_000;
/// Time after which a replay socket that refuses connections is given up, microseconds.
pub(super) const REPLAY_REFUSED_US: u64 = 200_000;
/// Time between two attempts to have a restored state confirmed, microseconds.
const PROVE_US: u64 = 5_000_000;
/// Buffers of worlds with small ones: a frame has a dozen blocks, and few frames can be sent again.
const SMALL_BUFFERS: PublishLimits =
    PublishLimits { frame_ops_bytes: 128, sent_frames: 12, sent_bytes: 4_096 };
/// Requests that wait to be answered, as in the shell; more are dropped.
const MAX_ASKED: usize = 8;
/// Wall clock at the start of a simulation, nanoseconds since the Unix epoch.
const START_NS: u64 = 1_700_000_000_000_000_000;
/// How long changes wait for company, microseconds.
const LINGER_US: u64 = 2_000;
/// Time between two heartbeats, microseconds.
const HEARTBEAT_US: u64 = 1_000_000;
/// Longest wait before a greeting is answered, and the shortest time between two heartbeats that were asked for,
/// microseconds.
const GREETED_US: u64 = 50_000;
const GREETED_SPACING_US: u64 = 200_000;
/// Time between two writes of the state file, microseconds. Shorter than the shell's, so that simulations have some.
const SAVE_US: u64 = 1_500_000;

/// One shim process, alive or dead.
#[derive(Default)]
pub(super) struct ShimProcess {
    source: Option<Source>,
    pub(super) life: u32,
    pub(super) stalled_until_us: u64,
    disk: Disk,
    /// Where the source was when its state was saved.
    saved: Option<StateMark>,
    clock_back_ns: u64,
    inbox: VecDeque<Inbound>,
    replaying: Replaying,
    /// Requests that came while nothing could be answered.
    asked: VecDeque<(usize, Bytes)>,
    flush_due: bool,
    last_heartbeat_us: u64,
    /// When the next heartbeat is due.
    heartbeat_us: u64,
}

/// What a replay is under way for.
#[derive(Default)]
enum Replaying {
    #[default]
    Nothing,
    Connection,
    /// The message is offered again after it.
    Message(u64, Bytes),
}

/// What arrives from the engine.
enum Inbound {
    Connected,
    Message(u64, Bytes),
}

// === impl ShimProcess ===

impl ShimProcess {
    pub(super) fn lives(&self, life: u32) -> bool {
        self.is_up() && self.life == life
    }

    /// True if it is dead and this life is the next one.
    pub(super) fn awaits(&self, life: u32) -> bool {
        !self.is_up() && self.life == life
    }

    pub(super) fn is_up(&self) -> bool {
        self.source.is_some()
    }

    pub(super) fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }

    /// True while a replay is waited for, during which nothing is published.
    pub(super) fn is_replaying(&self) -> bool {
        !matches!(self.replaying, Replaying::Nothing)
    }

    /// Kills the process. Returns the number of its next life, or `None` if it was dead.
    pub(super) fn kill(&mut self, fault: DiskFault, rng: &mut Rng) -> Option<u32> {
        self.source.take()?;
        let (mut disk, life) = (std::mem::take(&mut self.disk), self.life + 1);
        disk.fail(fault, rng);
        *self = Self { disk, life, clock_back_ns: self.clock_back_ns, ..Self::default() };
        Some(life)
    }

    /// The host's clock is set back. A running process follows a clock that does not go back.
    pub(super) fn set_clock_back(&mut self, by_ms: u64) {
        // Odd, so that no life begins at the very nanosecond of another one.
        self.clock_back_ns += by_ms * 1_000_000 + 1;
    }

    fn now_ns(&self, now_us: u64) -> u64 {
        START_NS + now_us * 1_000 - self.clock_back_ns
    }

    /// What the mirror holds now, published or not.
    pub(super) fn mirror(&self) -> Result<Content, String> {
        let Some(source) = &self.source else { return Err("the process is dead".to_owned()) };
        content_of_mirror(source).map_err(|error| error.to_string())
    }
}

/// Reads the mirror by what it would tell somebody who has nothing.
fn content_of_mirror(source: &Source) -> Result<Content, EncodeFrameError> {
    let (epoch, seq) = source.position(ShardId::WHOLE);
    let owners = source.mirror().owners();
    let nothing = vec![None; owners.len()];
    let header = FrameHeader {
        scope: Scope::new(MODEL, "", BLOCK_TOKENS, KEY_VERSION).expect("a plain scope"),
        source: source.id(),
        shard: ShardId::WHOLE,
        variant: source.mirror().variant(),
        epoch,
        seq,
        part: FramePart::Repair,
        health: source.health(),
        engine_time_ns: 0,
        owners,
        digests: Vec::new(),
        reply: Some(ReplyPart { request: RequestId(0), piece: 0, pieces: 1 }),
    };
    let mut told = source.mirror().differences(ShardId::WHOLE, &nothing, FRAME_OPS_BYTES);
    let frames: Result<Vec<_>, _> = told.iter_mut().map(|ops| header.encode(ops).map(Bytes::from)).collect();
    Ok(content_of_answer(&frames?))
}

// === impl World: shims ===

impl World {
    pub(super) fn start_shim(&mut self, number: usize) {
        let now_us = self.now_us;
        let has_replay = self.engines[number].engine.has_replay();
        let shim = &mut self.shims[number];
        let now_ns = shim.now_ns(now_us);
        let config = SourceConfig {
            has_replay,
            endpoint: format!("engine-{number}"),
            publish: if self.small_buffers { SMALL_BUFFERS } else { PublishLimits::default() },
            ..SourceConfig::new(MODEL, InstanceId::new(super::name(number)).expect("a plain name"))
        };
        let restored = shim.disk.read().map(|bytes| Source::restore(config.clone(), bytes, now_ns));
        let line = match &restored {
            None => "cold".to_owned(),
            Some(Ok(source)) => format!("with {} blocks", source.mirror().visible_blocks()),
            Some(Err(error)) => format!("cold, its state is refused: {error}"),
        };
        self.counts.files_loaded += u64::from(matches!(restored, Some(Ok(_))));
        self.counts.files_refused += u64::from(matches!(restored, Some(Err(_))));
        let restored = restored.and_then(Result::ok);
        shim.source =
            Some(restored.unwrap_or_else(|| Source::new(config, now_ns).expect("a plain model name")));
        shim.saved = None;
        if let Ok(content) = shim.mirror() {
            self.reference.restored(number, content);
        }
        let life = self.shims[number].life;
        self.log.line(now_us, format_args!("shim {number} starts {line}"));
        // Heartbeats of different shims are not in step.
        let first_us = self.between((1_000, HEARTBEAT_US));
        self.heartbeat_at(number, now_us + first_us);
        if self.files {
            let first_us = self.between((1_000, SAVE_US));
            self.after(first_us, Event::Save { process: Process::Shim(number), life });
        }
        self.after(PROVE_US, Event::Prove { shim: number, life });
        self.reconnect(number);
    }

    /// Writes the state file, if the state has changed.
    pub(super) fn save_shim(&mut self, number: usize) {
        let shim = &mut self.shims[number];
        let life = shim.life;
        let Some(source) = &shim.source else { return };
        let mark = source.mark();
        if shim.saved != Some(mark) {
            match source.save() {
                Ok(None) => {}
                Ok(Some(bytes)) => {
                    let fingerprint = xxhash_rust::xxh3::xxh3_64(&bytes);
                    self.log.line(self.now_us, format_args!("shim {number} saves {fingerprint:016x}"));
                    shim.disk.write(bytes);
                    shim.saved = Some(mark);
                }
                Err(error) => return self.fail("states can be written", error.to_string()),
            }
        }
        self.after(SAVE_US, Event::Save { process: Process::Shim(number), life });
    }

    /// A restored state that the engine has not confirmed is to be confirmed.
    pub(super) fn on_prove(&mut self, number: usize) {
        let shim = &mut self.shims[number];
        let life = shim.life;
        let Some(source) = &mut shim.source else { return };
        if !source.is_unproved() {
            return;
        }
        let waits = shim.is_replaying();
        self.after(PROVE_US, Event::Prove { shim: number, life });
        if !waits && self.engines[number].is_up() {
            self.on_engine_connected(number);
        }
    }

    pub(super) fn on_engine_connected(&mut self, shim: usize) {
        self.shims[shim].inbox.push_back(Inbound::Connected);
        self.drain(shim);
    }

    pub(super) fn on_engine_message(&mut self, shim: usize, seq: u64, payload: Bytes) {
        self.shims[shim].inbox.push_back(Inbound::Message(seq, payload));
        self.drain(shim);
    }

    /// Deals with what came from the engine, until a replay has to be waited for.
    fn drain(&mut self, number: usize) {
        while !self.shims[number].is_replaying() {
            let shim = &mut self.shims[number];
            let (Some(source), Some(inbound)) = (&mut shim.source, shim.inbox.pop_front()) else { break };
            let asked = match inbound {
                Inbound::Connected => source.connected().map(|from| (from, Replaying::Connection)),
                Inbound::Message(seq, payload) => match source.live(seq, &payload, false) {
                    Live::Done => None,
                    Live::Replay { from } => Some((from, Replaying::Message(seq, payload))),
                },
            };
            if let Some((from, replaying)) = asked {
                shim.replaying = replaying;
                let life = shim.life;
                self.log.line(self.now_us, format_args!("shim {number} replays from {from}"));
                self.after(100, Event::ReplayAsked { shim: number, life, from });
            }
        }
        self.after_changes(number);
    }

    pub(super) fn on_replay_ends(&mut self, number: usize, from: u64, messages: Option<&[(u64, Bytes)]>) {
        let shim = &mut self.shims[number];
        let Some(source) = &mut shim.source else { return };
        let count = messages.map(<[_]>::len);
        if let Some(messages) = messages {
            source.replayed(from, messages);
        }
        if let Replaying::Message(seq, payload) = std::mem::take(&mut shim.replaying) {
            source.live(seq, &payload, true);
        }
        self.log.line(self.now_us, format_args!("shim {number} replayed {count:?}"));
        *self.counts.repairs.entry("engine_replay").or_default() += u64::from(count.is_some());
        self.drain(number);
        for (index, payload) in std::mem::take(&mut self.shims[number].asked) {
            self.answer(number, index, &payload);
        }
    }

    /// Publishes at once or soon, if there is something.
    fn after_changes(&mut self, number: usize) {
        let shim = &mut self.shims[number];
        let Some(source) = &shim.source else { return };
        if shim.is_replaying() || !source.has_frames() {
            return;
        }
        if source.wants_flush() {
            self.publish(number, false);
        } else if !shim.flush_due {
            shim.flush_due = true;
            let life = shim.life;
            self.after(LINGER_US, Event::Flush { shim: number, life });
        }
    }

    pub(super) fn on_flush(&mut self, number: usize) {
        self.shims[number].flush_due = false;
        if !self.shims[number].is_replaying() {
            self.publish(number, false);
        }
    }

    fn heartbeat_at(&mut self, number: usize, at_us: u64) {
        let shim = &mut self.shims[number];
        shim.heartbeat_us = at_us;
        let life = shim.life;
        self.at(at_us, Event::Heartbeat { shim: number, life, at_us });
    }

    /// The next heartbeat comes after a while, unless one was sent just now or would come sooner anyway.
    fn hurry_heartbeat(&mut self, number: usize, wait_us: u64) {
        let shim = &self.shims[number];
        let at_us = (self.now_us + wait_us).max(shim.last_heartbeat_us + GREETED_SPACING_US);
        if at_us < shim.heartbeat_us {
            self.heartbeat_at(number, at_us);
        }
    }

    /// Also while a replay is waited for.
    pub(super) fn on_heartbeat(&mut self, number: usize, at_us: u64) {
        if self.shims[number].heartbeat_us == at_us {
            self.shims[number].last_heartbeat_us = self.now_us;
            self.heartbeat_at(number, self.now_us + HEARTBEAT_US);
            self.publish(number, true);
        }
    }

    fn publish(&mut self, number: usize, heartbeat: bool) {
        let now_us = self.now_us;
        let shim = &mut self.shims[number];
        let now_ns = shim.now_ns(now_us);
        let Some(source) = &mut shim.source else { return };
        let frames = match source.take_frames(now_ns, heartbeat) {
            Ok(outgoing) => outgoing.into_iter().map(|outgoing| outgoing.frame).collect::<Vec<_>>(),
            Err(error) => return self.fail("frames can be encoded", error.to_string()),
        };
        if frames.is_empty() {
            return;
        }
        let (epoch, next) = source.position(ShardId::WHOLE);
        self.log.line(
            now_us,
            format_args!("shim {number} publishes {} up to {}.{}", frames.len(), epoch.0, next.0),
        );
        let judged = shim.mirror().and_then(|mirror| self.reference.published(number, &frames, &mirror));
        if let Err(error) = judged {
            return self.fail("frames add up to the mirror", error);
        }
        self.counts.frames += frames.len() as u64;
        for frame in frames {
            for index in 0..self.indexes.len() {
                self.send_to_index(number, index, Kind::Event, &frame);
            }
        }
    }

    pub(super) fn on_shim_message(&mut self, number: usize, index: usize, kind: Kind, payload: &Bytes) {
        match kind {
            Kind::Hello => {
                if let Some(source) = &mut self.shims[number].source {
                    source.owe_heartbeats();
                }
                let wait_us = self.between((0, GREETED_US));
                self.hurry_heartbeat(number, wait_us);
            }
            _ => self.answer(number, index, payload),
        }
    }

    fn answer(&mut self, number: usize, index: usize, payload: &Bytes) {
        let Ok(request) = Request::parse(payload) else {
            self.counts.damaged += 1;
            return;
        };
        let shim = &mut self.shims[number];
        if shim.is_replaying() {
            if shim.asked.len() < MAX_ASKED {
                shim.asked.push_back((index, payload.clone()));
            }
            return;
        }
        self.publish(number, false);
        let Some(source) = &mut self.shims[number].source else { return };
        let other_epoch = source.epoch() != request.epoch;
        let answer = match source.answer(&request) {
            Ok(answer) => answer,
            Err(error) => return self.fail("answers can be encoded", error.to_string()),
        };
        self.log.line(
            self.now_us,
            format_args!("shim {number} answers {:?} of index {index}: {}", request.id, answer.len()),
        );
        if other_epoch {
            source.owe_heartbeat(request.shard);
            self.hurry_heartbeat(number, 0);
        }
        for frame in answer {
            self.send_to_index(number, index, Kind::Reply, &frame);
        }
    }

    /// Sends over the bus, as it is now.
    fn send_to_index(&mut self, shim: usize, index: usize, kind: Kind, frame: &Bytes) {
        let frame = self.sabotage.frame(frame, self.quiet);
        let fingerprint = xxhash_rust::xxh3::xxh3_64(&frame);
        let deliveries = self.bus.send((shim, index), kind, &frame, self.now_us);
        self.log.line(
            self.now_us,
            format_args!(
                "shim {shim} -> index {index} {kind:?} {} bytes {fingerprint:016x} x{}",
                frame.len(),
                deliveries.len()
            ),
        );
        self.counts.bytes += frame.len() as u64;
        if !self.indexes[index].is_up() {
            return;
        }
        let life = self.indexes[index].life;
        for delivery in deliveries {
            let payload = delivery.payload;
            self.at(delivery.at_us, Event::ToIndex { index, life, shim, kind, payload });
        }
    }
}
