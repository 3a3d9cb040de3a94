//! The bucket that slots and division are in: a NATS key-value bucket, read and written by its JetStream requests.
//!
//! The requests themselves and not the client's key-value type, for three things it does not offer: a renewal that carries
//! the entry's own lifetime, all keys in one request, and a deletion that leaves nothing behind which would not be free.
//! `nats kv ls kvatlas-shards` and `nats kv get` show it all the same.

use std::time::Duration;

use async_nats::connection::State;
use async_nats::header::{NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, NATS_MESSAGE_TTL};
use async_nats::jetstream::context::{
    Context, ContextBuilder, CreateStreamErrorKind, GetStreamErrorKind, PublishErrorKind,
};
use async_nats::jetstream::stream::{Config, DiscardPolicy, LastRawMessageErrorKind, StorageType, Stream};
use async_nats::jetstream::{self, ErrorCode};
use async_nats::{Client, HeaderMap};
use futures_util::TryStreamExt as _;

use super::slots::{LEASE_MS, Slot, View};

/// Longest wait for an answer of the broker. A look is a few requests, and a third of a lease must hold all of them.
const REQUEST_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Longest value, bytes: the name of a server.
const MAX_VALUE_BYTES: i32 = 256;
/// Most bytes of the bucket. A slot is about a hundred.
const MAX_BUCKET_BYTES: i64 = 4 << 20;
/// Copies of the bucket in a cluster of brokers, so that one may be lost. Two copies would need both to be there.
const REPLICAS: usize = 3;
/// The key that says among how many servers the shards are divided.
const DIVISION: &str = "division";

/// An open bucket.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    client: Client,
    context: Context,
    name: String,
    brokers: String,
    stream: Stream,
}

/// Who holds what, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotTable {
    /// Among how many servers the shards are to be divided, if anybody has said so.
    pub division: Option<u64>,
    /// Slots with the names of the servers that hold them, in order.
    pub holders: Vec<(Slot, String)>,
}

/// The failures of leases. None means that anything was lost.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum LeaseError {
    /// The broker keeps nothing.
    #[error(
        "the NATS broker at {brokers} keeps no buckets ({reason}): start it with JetStream (nats-server -js), or give each \
         server its --shard-ordinal instead of --shard-lease"
    )]
    NoJetStream {
        /// Which broker.
        brokers: String,
        /// What it said.
        reason: String,
    },
    /// The broker, or somebody who made the bucket, does not end leases.
    #[error(
        "the bucket {bucket} of the NATS broker at {brokers} does not end leases: nats-server 2.11 or newer is needed; if it \
         is, delete the bucket (nats kv del {bucket}) and start again"
    )]
    NoExpiry {
        /// Which bucket.
        bucket: String,
        /// Which broker.
        brokers: String,
    },
    /// There is no bucket.
    #[error(
        "the NATS broker at {brokers} has no bucket {bucket}: start servers with --shard-lease (and the same \
         --subject-prefix) first"
    )]
    Missing {
        /// Which bucket.
        bucket: String,
        /// Which broker.
        brokers: String,
    },
    /// The name of the bucket or the server cannot be used.
    #[error("{name:?} cannot name a {what}: give 1 to {most} of A-Z a-z 0-9 _ -")]
    Name {
        /// What was to be named.
        what: &'static str,
        /// The name.
        name: String,
        /// Longest name, bytes.
        most: usize,
    },
    /// No answer, or a failure that passes. May be tried again.
    #[error(
        "the bucket {bucket} of the NATS broker at {brokers} cannot be reached ({reason}): check the broker, then try again"
    )]
    Unreachable {
        /// Which bucket.
        bucket: String,
        /// Which broker.
        brokers: String,
        /// What happened.
        reason: String,
    },
    /// Every slot of the division is taken.
    #[error(
        "the division has no free slot: {replicas} servers have each part of it; stop some, or divide among more"
    )]
    Full {
        /// Most replicas.
        replicas: u16,
    },
}

// === impl Bucket ===

impl Bucket {
    /// Opens the bucket that is there.
    pub(super) async fn open(client: Client, name: String, brokers: String) -> Result<Self, LeaseError> {
        let context = context(&client);
        let failed = |error| unreachable(&name, &brokers, error);
        let stream = match context.get_stream(stream_name(&name)).await {
            Ok(stream) => stream,
            Err(error) => {
                return Err(match error.kind() {
                    GetStreamErrorKind::JetStream(error)
                        if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                    {
                        LeaseError::Missing { bucket: name, brokers }
                    }
                    GetStreamErrorKind::JetStream(error) if is_without_jetstream(&error) => {
                        LeaseError::NoJetStream { brokers, reason: error.to_string() }
                    }
                    _ => failed(error.to_string()),
                });
            }
        };
        Ok(Self { client, context, name, brokers, stream })
    }

    /// Opens the bucket, and makes it if it is missing. It is kept by as many brokers as the cluster has, up to three, if they
    /// are there at the time.
    ///
    /// What it holds can be lost at any moment without harm: it is not the truth about any block. Servers go on with what they
    /// own, and say it again. It is on disk only so that a division outlives a restart of everything.
    pub(super) async fn open_or_create(
        client: Client,
        name: String,
        brokers: String,
    ) -> Result<Self, LeaseError> {
        let context = context(&client);
        let mut made = None;
        for replicas in [REPLICAS, 1] {
            match context.create_stream(config(&name, replicas)).await {
                Ok(stream) => {
                    made = Some(stream);
                    break;
                }
                Err(error) => match error.kind() {
                    CreateStreamErrorKind::JetStream(error) => match error.error_code() {
                        ErrorCode::STREAM_NAME_EXIST => break,
                        code if replicas > 1 && is_too_many_replicas(code) => {}
                        _ if is_without_jetstream(&error) => {
                            return Err(LeaseError::NoJetStream { brokers, reason: error.to_string() });
                        }
                        _ => return Err(unreachable(&name, &brokers, error.to_string())),
                    },
                    CreateStreamErrorKind::JetStreamUnavailable => {
                        return Err(LeaseError::NoJetStream { brokers, reason: error.to_string() });
                    }
                    _ => return Err(unreachable(&name, &brokers, error.to_string())),
                },
            }
        }
        let bucket = match made {
            Some(stream) => Self { client, context, name, brokers, stream },
            None => Self::open(client, name, brokers).await?,
        };
        let has = &bucket.stream.cached_info().config;
        if !has.allow_message_ttl {
            return Err(LeaseError::NoExpiry { bucket: bucket.name, brokers: bucket.brokers });
        }
        if has.num_replicas < REPLICAS {
            // It was made while a broker was away, or there was one only. That it is still so is no failure.
            let wider = Config { num_replicas: REPLICAS, ..has.clone() };
            let _ = bucket.context.update_stream(wider).await;
        }
        Ok(bucket)
    }

    /// What the bucket holds, as its leader has it: a copy that lags would show an older division again.
    pub(super) async fn read(&self) -> Result<View, LeaseError> {
        self.check_connected()?;
        let mut view = View::default();
        for key in self.keys().await? {
            view.taken.extend(Slot::parse(&key));
        }
        view.division = self.division().await?;
        Ok(view)
    }

    /// The same with the holders' names.
    pub(super) async fn table(&self) -> Result<SlotTable, LeaseError> {
        self.check_connected()?;
        let mut table = SlotTable { division: self.division().await?, holders: Vec::new() };
        let mut slots: Vec<Slot> = self.keys().await?.iter().filter_map(|key| Slot::parse(key)).collect();
        slots.sort_unstable();
        for slot in slots {
            if let Some((holder, _)) = self.get(&slot.to_string()).await? {
                table.holders.push((slot, holder));
            }
        }
        Ok(table)
    }

    /// Says among how many servers the shards are divided, unless somebody has.
    pub(super) async fn found(&self, servers: u16) -> Result<(), LeaseError> {
        self.write(DIVISION, &servers.to_string(), Some(0), None).await.map(|_| ())
    }

    /// Says among how many servers the shards are divided.
    pub(super) async fn divide(&self, servers: u16) -> Result<(), LeaseError> {
        self.check_connected()?;
        self.write(DIVISION, &servers.to_string(), None, None).await.map(|_| ())
    }

    /// Takes the slot (`held_at` 0) or renews it, for one lease; `None` if it is somebody else's, or nobody's any more. Else the
    /// number to renew or leave it with.
    pub(super) async fn hold(
        &self,
        slot: Slot,
        server: &str,
        held_at: u64,
    ) -> Result<Option<u64>, LeaseError> {
        let key = slot.to_string();
        let lease = Duration::from_millis(LEASE_MS);
        if let Some(revision) = self.write(&key, server, Some(held_at), Some(lease)).await? {
            return Ok(Some(revision));
        }
        // Perhaps it is ours by a request whose answer was lost. Names are of one life each, so there is no doubt.
        let there = self.get(&key).await?;
        Ok(there.filter(|(holder, _)| holder == server).map(|(_, revision)| revision))
    }

    /// Gives up a slot at once. What somebody else has written since stays.
    pub(super) async fn leave(&self, slot: Slot, held_at: u64) -> Result<(), LeaseError> {
        self.check_connected()?;
        let purge = self.stream.purge().sequence(held_at + 1).filter(self.subject(&slot.to_string()));
        purge.await.map(|_| ()).map_err(|error| self.failed(error.to_string()))
    }

    async fn division(&self) -> Result<Option<u64>, LeaseError> {
        // A text that is no number is a division that cannot be.
        Ok(self.get(DIVISION).await?.map(|(text, _)| text.trim().parse().unwrap_or(0)))
    }

    async fn keys(&self) -> Result<Vec<String>, LeaseError> {
        let prefix = self.subject("");
        let all = async {
            let subjects = self.stream.info_with_subjects(format!("{prefix}>")).await?;
            subjects.map_ok(|(subject, _)| subject).try_collect::<Vec<_>>().await
        };
        let subjects = all.await.map_err(|error| self.lost_or_failed(error.to_string()))?;
        Ok(subjects.iter().filter_map(|subject| Some(subject.strip_prefix(&prefix)?.to_owned())).collect())
    }

    async fn get(&self, key: &str) -> Result<Option<(String, u64)>, LeaseError> {
        match self.stream.get_last_raw_message_by_subject(&self.subject(key)).await {
            Ok(message) => {
                Ok(Some((String::from_utf8_lossy(&message.payload).into_owned(), message.sequence)))
            }
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(None),
                _ => Err(self.lost_or_failed(error.to_string())),
            },
        }
    }

    /// Writes if the key is at `held_at` (0: absent; `None`: whatever it is at). `None` if it is not.
    async fn write(
        &self,
        key: &str,
        value: &str,
        held_at: Option<u64>,
        lifetime: Option<Duration>,
    ) -> Result<Option<u64>, LeaseError> {
        let mut headers = HeaderMap::new();
        if let Some(held_at) = held_at {
            headers.insert(NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, held_at.to_string());
        }
        if let Some(lifetime) = lifetime {
            headers.insert(NATS_MESSAGE_TTL, lifetime.as_secs().to_string());
        }
        let writing = async {
            self.context
                .publish_with_headers(self.subject(key), headers, value.to_owned().into())
                .await?
                .await
        };
        match writing.await {
            Ok(written) => Ok(Some(written.sequence)),
            Err(error) => match error.kind() {
                PublishErrorKind::WrongLastSequence => Ok(None),
                PublishErrorKind::StreamNotFound => Err(self.missing()),
                _ => Err(self.failed(error.to_string())),
            },
        }
    }

    /// What is written while the broker is away would reach it when it is back, and be about the past.
    fn check_connected(&self) -> Result<(), LeaseError> {
        match self.client.connection_state() {
            State::Connected => Ok(()),
            other => Err(self.failed(format!("the connection is {other}"))),
        }
    }

    fn subject(&self, key: &str) -> String {
        format!("$KV.{}.{key}", self.name)
    }

    fn missing(&self) -> LeaseError {
        LeaseError::Missing { bucket: self.name.clone(), brokers: self.brokers.clone() }
    }

    fn failed(&self, reason: String) -> LeaseError {
        unreachable(&self.name, &self.brokers, reason)
    }

    /// The client reports a missing stream as text in these two requests.
    fn lost_or_failed(&self, reason: String) -> LeaseError {
        if reason.contains("stream not found") { self.missing() } else { self.failed(reason) }
    }
}

fn context(client: &Client) -> Context {
    ContextBuilder::new().timeout(REQUEST_TIMEOUT).build(client.clone())
}

fn stream_name(bucket: &str) -> String {
    format!("KV_{bucket}")
}

/// A key-value bucket as NATS lays one out, with entries that may end by themselves.
fn config(bucket: &str, replicas: usize) -> Config {
    Config {
        name: stream_name(bucket),
        description: Some("kvatlas: which server owns which shards".to_owned()),
        subjects: vec![format!("$KV.{bucket}.>")],
        max_messages_per_subject: 1,
        max_bytes: MAX_BUCKET_BYTES,
        max_message_size: MAX_VALUE_BYTES + 256,
        discard: DiscardPolicy::New,
        storage: StorageType::File,
        num_replicas: replicas,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        allow_message_ttl: true,
        ..Config::default()
    }
}

fn is_without_jetstream(error: &jetstream::Error) -> bool {
    [ErrorCode::JETSTREAM_NOT_ENABLED, ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT]
        .contains(&error.error_code())
}

/// One broker alone, or fewer than three of a cluster there.
fn is_too_many_replicas(code: ErrorCode) -> bool {
    [ErrorCode::STREAM_REPLICAS_NOT_SUPPORTED, ErrorCode::CLUSTER_NO_PEERS, ErrorCode::INSUFFICIENT_RESOURCES]
        .contains(&code)
}

fn unreachable(bucket: &str, brokers: &str, reason: String) -> LeaseError {
    LeaseError::Unreachable { bucket: bucket.to_owned(), brokers: brokers.to_owned(), reason }
}
