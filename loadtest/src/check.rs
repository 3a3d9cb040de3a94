//! Plays a recording through the real path and compares what the index answers with what the engine held.
//!
//! The path is the product's: ZMQ sockets, shim, bus (in-process or NATS), index, gRPC. The engine's ground truth lies
//! beside the recording. At each checkpoint everything sent so far is waited for, by count and sequence, never by time
//! alone; then the sets of blocks per medium and cache group (`Dump`) and the answers to probe prompts (`Score`) are
//! compared.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kvatlas_bus::{Bus, ConnectError, InProcessBus, InProcessConfig, NatsBus, NatsConfig};
use kvatlas_client::{CallError, Client, ClientConfig, EndpointError};
use kvatlas_index::{IndexServer, IndexServerConfig, RunningIndexServer, StartError};
use kvatlas_proto::grpc;
use kvatlas_proto::ids::InvalidInstanceError;
use kvatlas_proto::subject::Subjects;
use kvatlas_proto::{DpRank, InstanceId, KeyHasher, Partition};
use kvatlas_shim::mirror::MirrorLimits;
use kvatlas_shim::shim::{EndpointConfig, Progress, Shim, ShimConfig, StartShimError};
use kvatlas_shim::zmq::Attach;
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::expectations::{Expectation, expectation_of};
use crate::kvrec::{Marker, ReadRecordingError, Recording};
use crate::oracle::Oracle;
use crate::player::{NoStreamError, OpenStreamError, PlayError, Played, Player, WaitError};
use crate::sockets::BindError;
use crate::truth::{
    Checkpoint, ExpectedMessages, NoTruthError, Probe, ProbeAnswer, ReadTruthError, Truth, find_truth,
};

/// Longest wait for the path to settle at a checkpoint. A replay takes up to 6 s, a reconnect up to 2 s.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause between looks at the index.
const SETTLE_POLL: Duration = Duration::from_millis(2);
/// Model name under which recordings are played.
const MODEL: &str = "recorded";
/// Differences that a report spells out; the rest is only counted.
const MAX_NOTES: usize = 12;

/// How recordings are played.
#[derive(Clone, Debug, Default)]
pub struct CheckConfig {
    /// Broker to use; `None`: the in-process bus.
    pub nats: Option<String>,
}

/// What came of one file.
#[derive(Clone, Debug, Serialize)]
pub struct FileReport {
    /// File as given.
    pub file: String,
    /// Checkpoints in the truth file.
    pub checkpoints: usize,
    /// Those at which every medium and cache group held exactly the engine's blocks.
    pub checkpoints_exact: usize,
    /// Answers compared.
    pub probes: usize,
    /// Equal to the engine's.
    pub equal: usize,
    /// More than the engine had.
    pub over: usize,
    /// Less than the engine had.
    pub under: usize,
    /// Whether every difference is one that cannot be avoided.
    pub ok: bool,
    /// Why differences are unavoidable here, if there are any such.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unavoidable: Option<&'static str>,
    /// What differed, for a person.
    #[serde(skip)]
    pub notes: Vec<String>,
}

/// Why a file could not be checked.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant is its source")]
pub enum CheckError {
    #[error(transparent)]
    Recording(#[from] ReadRecordingError),
    #[error(transparent)]
    NoTruth(#[from] NoTruthError),
    #[error(transparent)]
    Truth(#[from] ReadTruthError),
    #[error(transparent)]
    Instance(#[from] InvalidInstanceError),
    #[error(transparent)]
    Broker(#[from] ConnectError),
    #[error(transparent)]
    Server(#[from] StartError),
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error(transparent)]
    Shim(#[from] StartShimError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Play(#[from] PlayError),
    #[error(transparent)]
    Stream(#[from] NoStreamError),
    #[error(transparent)]
    Open(#[from] OpenStreamError),
    #[error(transparent)]
    Subscriber(#[from] WaitError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("{file}: checkpoint {index} is not in its truth file")]
    NoCheckpoint { file: String, index: usize },
    #[error("{file}: what was sent did not arrive within {SETTLE_TIMEOUT:?}: {state}")]
    NotSettled { file: String, state: String },
}

/// Everything one file needs, running.
struct Rig {
    file: String,
    player: Player,
    shims: Vec<Shim>,
    progress: Vec<watch::Receiver<Progress>>,
    /// Live messages that reached a stream's socket.
    sent: Vec<u64>,
    server: RunningIndexServer,
    client: Client,
}

type OwnerKey = (String, u32);
type Held = BTreeMap<OwnerKey, BTreeSet<u64>>;

/// Plays one recording and compares. The truth file must lie beside it; a recording of wire formats has a list of
/// expected messages instead, and then it is the number of messages used and refused that is compared.
pub async fn check(path: &Path, config: &CheckConfig) -> Result<FileReport, CheckError> {
    let recording = Recording::read(path)?;
    if let Some(expected) = ExpectedMessages::beside(path)? {
        return check_messages(path, recording, &expected, config).await;
    }
    let truth = Truth::read(&find_truth(path)?)?;
    let oracle = Oracle::read(&recording, &KeyHasher::default());
    let expectation = expectation_of(path);
    let vllm = recording.header.engine == "vllm";
    let mut rig = Rig::start(path, recording, &expectation, config).await?;
    let mut report = FileReport::of(path, truth.checkpoints.len(), &expectation);
    while let Some((stream, marker)) = rig.play_until_marker().await? {
        if let Marker::Checkpoint { index, .. } = marker {
            let checkpoint = truth.checkpoints.get(index);
            let checkpoint =
                checkpoint.ok_or_else(|| CheckError::NoCheckpoint { file: rig.file.clone(), index })?;
            rig.settle(stream).await?;
            rig.compare_blocks(index, checkpoint, &oracle, &expectation, &mut report).await?;
            for answer in &checkpoint.probes {
                let probe = &truth.probes[answer.probe];
                let compared = Compared { index, checkpoint, probe, answer, vllm };
                rig.compare_probe(&compared, &expectation, &mut report).await?;
            }
        } else {
            rig.follow(stream, &marker).await?;
        }
    }
    rig.finish().await?;
    report.ok &= expectation.admits(&report);
    Ok(report)
}

async fn check_messages(
    path: &Path,
    recording: Recording,
    expected: &ExpectedMessages,
    config: &CheckConfig,
) -> Result<FileReport, CheckError> {
    let expectation = expectation_of(path);
    let mut rig = Rig::start(path, recording, &expectation, config).await?;
    let mut report = FileReport::of(path, 0, &expectation);
    while let Some((stream, marker)) = rig.play_until_marker().await? {
        rig.follow(stream, &marker).await?;
    }
    for stream in 0..rig.sent.len() {
        rig.settle(stream as u8).await?;
        let progress = rig.progress[stream].borrow().clone();
        let refused = progress.bad_frames + progress.counts.undecodable.iter().map(|(_, n)| n).sum::<u64>();
        let found = (progress.counts.messages, refused);
        let wanted = expected.of_stream(stream);
        report.probes += 1;
        if found == wanted {
            report.equal += 1;
            continue;
        }
        report.over += usize::from(found.0 > wanted.0);
        report.under += usize::from(found.0 <= wanted.0);
        report.note(|| format!("stream {stream}: (used, refused) messages {found:?} instead of {wanted:?}"));
    }
    rig.finish().await?;
    report.ok = expectation.admits(&report);
    Ok(report)
}

/// Plays one recording through the path without comparing; returns the number of live messages that arrived.
pub async fn play(path: &Path, config: &CheckConfig) -> Result<u64, CheckError> {
    let recording = Recording::read(path)?;
    let mut rig = Rig::start(path, recording, &expectation_of(path), config).await?;
    while let Some((stream, marker)) = rig.play_until_marker().await? {
        rig.follow(stream, &marker).await?;
    }
    rig.finish().await
}

/// One probe at one checkpoint.
struct Compared<'a> {
    index: usize,
    checkpoint: &'a Checkpoint,
    probe: &'a Probe,
    answer: &'a ProbeAnswer,
    /// The engine limits a hit to the prompt's length less one where it is asked; SGLang does so elsewhere.
    vllm: bool,
}

// === impl Rig ===

impl Rig {
    async fn start(
        path: &Path,
        recording: Recording,
        expectation: &Expectation,
        config: &CheckConfig,
    ) -> Result<Self, CheckError> {
        // Files that share a broker must not hear each other, nor anybody else there.
        static RUN: AtomicU32 = AtomicU32::new(0);
        let run = RUN.fetch_add(1, Ordering::Relaxed);
        let subjects = Subjects::new(format!("kvatlas-replay-{}-{run}", std::process::id()))
            .expect("letters, digits and hyphens");
        let bus: Arc<dyn Bus> = match &config.nats {
            None => Arc::new(InProcessBus::new(InProcessConfig::default())),
            Some(url) => Arc::new(NatsBus::connect(NatsConfig::new([url.clone()])).await?),
        };
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server_config =
            IndexServerConfig { subjects: subjects.clone(), ..IndexServerConfig::new(loopback) };
        let server = IndexServer::start(server_config, Arc::clone(&bus), Registry::default()).await?;
        let client = Client::connect(ClientConfig::new(server.grpc_addr().to_string()))?;
        let streams = recording.header.streams.clone();
        let player = Player::bind(recording).await?;
        let (mut shims, mut progress) = (Vec::new(), Vec::new());
        for (stream, endpoints) in streams.iter().zip(player.endpoints()) {
            // Streams with a rank of their own are ranks of one engine; others are engines of their own.
            let twins = streams.iter().filter(|s| s.dp_rank == stream.dp_rank && s.worker.is_none()).count();
            let name = match &stream.worker {
                Some(worker) => worker.clone(),
                None if twins > 1 => format!("engine-{}", stream.stream),
                None => "engine".to_owned(),
            };
            let shim_config = ShimConfig {
                adapter: None,
                model: MODEL.to_owned(),
                tenant: String::new(),
                instance: InstanceId::new(format!("{name}:8000"))?,
                endpoints: vec![EndpointConfig {
                    events: endpoints.events,
                    attach: Attach::Connect,
                    replay: Some(endpoints.replay),
                    topic: stream.topic.clone(),
                    rank: Some(DpRank(stream.dp_rank)),
                }],
                block_size: None,
                removal: expectation.removal,
                hasher: KeyHasher::default(),
                partition: Partition::WHOLE,
                limits: MirrorLimits::default(),
                subjects: subjects.clone(),
            };
            let shim = Shim::start(&shim_config, &bus)?;
            progress.extend(shim.progress().iter().cloned());
            shims.push(shim);
        }
        for stream in 0..streams.len() {
            player.wait_for_subscribers(stream as u8, 1, SETTLE_TIMEOUT).await?;
        }
        let sent = vec![0; streams.len()];
        Ok(Self { file: path.display().to_string(), player, shims, progress, sent, server, client })
    }

    /// What a remark of the recorder means for the connections.
    async fn follow(&mut self, stream: u8, marker: &Marker) -> Result<(), CheckError> {
        match marker {
            Marker::SubscriberClosed { .. } => {
                self.settle(stream).await?;
                self.player.close_stream(stream).await?;
            }
            Marker::SubscriberOpen { .. } => {
                self.player.open_stream(stream).await?;
                self.player.wait_for_subscribers(stream, 1, SETTLE_TIMEOUT).await?;
            }
            Marker::Checkpoint { .. } | Marker::EngineExit | Marker::Other(_) => {}
        }
        Ok(())
    }

    /// Waits for the rest, stops everything, and says how many messages arrived.
    async fn finish(mut self) -> Result<u64, CheckError> {
        for stream in 0..self.sent.len() {
            self.settle(stream as u8).await?;
        }
        let arrived = self.progress.iter().map(|progress| progress.borrow().arrived()).sum();
        self.stop().await;
        Ok(arrived)
    }

    async fn stop(self) {
        for shim in self.shims {
            shim.shutdown().await;
        }
        self.server.shutdown().await;
        self.player.close().await;
    }

    async fn play_until_marker(&mut self) -> Result<Option<(u8, Marker)>, CheckError> {
        loop {
            match self.player.play_next().await? {
                Some(Played::Live { stream, is_sent, .. }) => {
                    self.sent[usize::from(stream)] += u64::from(is_sent);
                }
                Some(Played::Marker { stream, marker }) => return Ok(Some((stream, marker))),
                None => return Ok(None),
            }
        }
    }

    /// Waits until everything that a stream sent is in the index.
    async fn settle(&mut self, stream: u8) -> Result<(), CheckError> {
        let sent = self.sent[usize::from(stream)];
        let progress = &mut self.progress[usize::from(stream)];
        let settled = timeout(
            SETTLE_TIMEOUT,
            progress.wait_for(|progress| {
                let compared =
                    !progress.connection.up || progress.known_connection == progress.connection.number;
                progress.arrived() == sent && compared && !progress.pending
            }),
        )
        .await;
        let arrived = matches!(settled, Ok(Ok(_)));
        drop(settled);
        let progress = progress.borrow().clone();
        if !arrived {
            let state = format!("{sent} messages were sent, the shim says {progress:?}");
            return Err(CheckError::NotSettled { file: self.file.clone(), state });
        }
        let (epoch, next) = progress.position;
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        // Nothing was published before the block size is known: then there is nothing to wait for.
        if next.0 == 0 {
            return Ok(());
        }
        loop {
            let request = grpc::ListOwnersRequest { model: MODEL.to_owned(), ..Default::default() };
            let sources = self.client.list_owners(request).await?.sources;
            let source = sources.iter().find(|source| {
                source.instance == progress.source.instance.as_str()
                    && source.data_parallel_rank == progress.source.rank.0
            });
            // Heartbeats may have moved on since.
            if source
                .is_some_and(|s| s.epoch == epoch.0 && s.applied_seq.is_some_and(|seq| seq + 1 >= next.0))
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                let state = format!("the shim is at {:?}, the index knows {source:?}", progress.position);
                return Err(CheckError::NotSettled { file: self.file.clone(), state });
            }
            sleep(SETTLE_POLL).await;
        }
    }

    fn source_of(&self, stream: u8) -> (String, u32) {
        let progress = self.progress[usize::from(stream)].borrow();
        (progress.source.instance.to_string(), progress.source.rank.0)
    }

    async fn compare_blocks(
        &self,
        index: usize,
        checkpoint: &Checkpoint,
        oracle: &Oracle,
        expectation: &Expectation,
        report: &mut FileReport,
    ) -> Result<(), CheckError> {
        let (instance, rank) = self.source_of(checkpoint.stream);
        let keys = oracle.stream(checkpoint.stream);
        let (mut truth, mut unmapped) = (Held::new(), 0);
        for (medium, groups) in &checkpoint.tiers {
            for (group, held) in groups {
                let group = group.parse().unwrap_or(u32::MAX);
                let set = truth.entry((medium.to_ascii_uppercase(), group)).or_default();
                for hash in &held.hashes {
                    match keys.and_then(|keys| keys.get(hash)) {
                        Some(defined) => drop(set.insert(defined.key.0)),
                        None => unmapped += 1,
                    }
                }
            }
        }
        let mut held = Held::new();
        let request = grpc::DumpRequest { model: MODEL.to_owned(), instance, ..Default::default() };
        let mut dump = self.client.dump(request).await?;
        while let Some(chunk) = dump.next().await? {
            if chunk.data_parallel_rank == rank {
                held.entry((chunk.medium.to_ascii_uppercase(), chunk.group)).or_default().extend(chunk.keys);
            }
        }
        let nothing = BTreeSet::new();
        let owners: BTreeSet<&OwnerKey> = truth.keys().chain(held.keys()).collect();
        let (mut missing, mut wrong) = (unmapped, 0);
        for owner in owners {
            let (expected, found) =
                (truth.get(owner).unwrap_or(&nothing), held.get(owner).unwrap_or(&nothing));
            missing += expected.difference(found).count();
            wrong += found.difference(expected).count();
        }
        if missing + wrong == 0 {
            report.checkpoints_exact += 1;
        } else {
            report.ok &= expectation.admits_wrong_blocks(wrong);
            report.note(|| {
                format!(
                    "checkpoint {index} ({}): {wrong} blocks too many, {missing} missing",
                    checkpoint.note
                )
            });
        }
        Ok(())
    }

    async fn compare_probe(
        &self,
        compared: &Compared<'_>,
        expectation: &Expectation,
        report: &mut FileReport,
    ) -> Result<(), CheckError> {
        let Compared { index, checkpoint, probe, answer, vllm } = *compared;
        let (instance, rank) = self.source_of(checkpoint.stream);
        let extras = probe.extras();
        let prompt = grpc::Prompt {
            model: MODEL.to_owned(),
            input: Some(grpc::prompt::Input::TokenIds(grpc::TokenIds { ids: probe.token_ids.clone() })),
            lora_name: extras.lora_name.unwrap_or_default(),
            cache_salt: extras.cache_salt.unwrap_or_default(),
            multimodal: extras
                .multimodal
                .into_iter()
                .map(|item| grpc::MultimodalItem {
                    identifier: item.identifier,
                    offset: item.offset,
                    length: item.length,
                })
                .collect(),
            ..Default::default()
        };
        let request =
            grpc::ScoreRequest { prompt: Some(prompt), candidates: vec![instance], ..Default::default() };
        let scored = self.client.score(request).await?;
        let row = scored.instances.into_iter().find(|row| row.data_parallel_rank == rank).unwrap_or_default();
        let tier = |wanted: &[grpc::Tier]| {
            let of = |row: &grpc::InstanceScore| {
                row.tiers.iter().filter(|t| wanted.contains(&t.tier())).map(|t| t.matched_tokens).max()
            };
            of(&row).unwrap_or(0)
        };
        let mut pairs = vec![("GPU prefix", tier(&[grpc::Tier::Gpu]), answer.max_hit_tokens)];
        let only_gpu = checkpoint.tiers.keys().all(|medium| medium == "GPU");
        if vllm && only_gpu {
            pairs.push(("engine hit", row.engine_cached_tokens, answer.engine_hit_tokens));
        }
        if let Some(cpu) = answer.cpu_prefix_tokens {
            pairs.push(("second tier's prefix", tier(&[grpc::Tier::Cpu, grpc::Tier::Ssd]), cpu));
        }
        report.probes += 1;
        let over = pairs.iter().any(|(_, found, expected)| found > expected);
        if pairs.iter().all(|(_, found, expected)| found == expected) {
            report.equal += 1;
            return Ok(());
        }
        report.over += usize::from(over);
        report.under += usize::from(!over);
        report.ok &= expectation.admits_probe(over);
        report.note(|| {
            let pairs: Vec<String> = pairs
                .iter()
                .filter(|(_, found, expected)| found != expected)
                .map(|(name, found, expected)| format!("{name} {found} instead of {expected}"))
                .collect();
            format!("checkpoint {index} ({}), probe {}: {}", checkpoint.note, probe.id, pairs.join(", "))
        });
        Ok(())
    }
}

// === impl FileReport ===

impl FileReport {
    fn of(path: &Path, checkpoints: usize, expectation: &Expectation) -> Self {
        Self {
            file: path.display().to_string(),
            checkpoints,
            checkpoints_exact: 0,
            probes: 0,
            equal: 0,
            over: 0,
            under: 0,
            ok: true,
            unavoidable: expectation.unavoidable,
            notes: Vec::new(),
        }
    }

    fn note(&mut self, note: impl FnOnce() -> String) {
        if self.notes.len() < MAX_NOTES {
            self.notes.push(note());
        }
    }
}

/// Recordings below a folder, or the file itself, in order of name.
pub fn recordings(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?.path();
        let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if entry.is_dir() {
            found.extend(recordings(&entry)?);
        } else if [".kvrec", ".kvrec.gz", ".kvrec.zst"].iter().any(|ending| name.ends_with(ending)) {
            found.push(entry);
        }
    }
    found.sort();
    Ok(found)
}
