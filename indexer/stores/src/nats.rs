//! Checkpoints in a bucket of a NATS object store (JetStream).
//!
//! One object; the library cuts it into messages, writes the object's description last, and then purges the messages of the one
//! before. A reader finds the old object or the new one, and a digest that does not fit is reported.
//!
//! The connection is its own, made from the bus's settings: on the bus's connection a gigabyte of checkpoint would travel in
//! front of frames and questions.
//!
//! A save that fails leaves messages behind which no object names, and the library does not say under which subject. So each
//! save first looks for such messages that are older than any save can be, and purges them. What a bucket's own time limit
//! would take away anyway is thus gone after minutes. The bucket should be used for nothing else.

use std::collections::HashSet;
use std::fmt::Display;
use std::io;
use std::time::{Duration, SystemTime};

use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::object_store::{self, GetErrorKind, ObjectInfo, ObjectStore};
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{self, Context, ErrorCode};
use async_trait::async_trait;
use futures_util::{TryStreamExt as _, stream};
use kvatlas_bus::{ConnectError, NatsConfig};
use kvatlas_index::CheckpointSize;
use kvatlas_index::store::{AccessError, CheckpointStore, LoadError, SaveError, WriteCheckpoint};
use tokio::io::AsyncReadExt as _;
use tokio_util::io::StreamReader;

use crate::location::ObjectName;
use crate::pieces::{self, Pieces, SAVE_TIMEOUT};

/// Longest wait for each answer of the broker.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for a connection, for each broker.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Messages of 128 KiB that wait to be taken in when loading: 32 MiB. The broker's flow control stops before that.
const READ_AHEAD_MESSAGES: usize = 256;
/// Messages that wait to be sent.
const SEND_MESSAGES: usize = 16;
/// Age from which messages that no object names belong to no save that is still running.
const LEFTOVER_AGE: Duration = SAVE_TIMEOUT.saturating_mul(2);

/// A checkpoint in a NATS object store.
#[derive(Debug)]
pub struct NatsStore {
    object: ObjectName,
    config: NatsConfig,
    /// [`LEFTOVER_AGE`], shorter in tests.
    leftover_age: Duration,
}

/// A bucket, and the stream that it is made of.
struct Bucket {
    objects: ObjectStore,
    stream: Stream,
}

// === impl NatsStore ===

impl NatsStore {
    /// Connects when it is used, as the bus does.
    pub fn new(object: ObjectName, bus: &NatsConfig) -> Self {
        let config = NatsConfig {
            client_name: format!("{}-checkpoint", bus.client_name),
            connect_timeout: CONNECT_TIMEOUT,
            subscription_messages: READ_AHEAD_MESSAGES,
            client_messages: SEND_MESSAGES,
            ..bus.clone()
        };
        Self { object, config, leftover_age: LEFTOVER_AGE }
    }

    async fn connect(&self) -> Result<Context, AccessError> {
        let client = self.config.connect_client().await.map_err(|error| self.explain_connect(error))?;
        let mut context = jetstream::new(client);
        context.set_timeout(REQUEST_TIMEOUT);
        Ok(context)
    }

    /// The bucket, or `None` if there is none.
    async fn bucket(&self, context: &Context) -> Result<Option<Bucket>, AccessError> {
        let stream = match context.get_stream(format!("OBJ_{}", self.object.bucket)).await {
            Ok(stream) => stream,
            Err(error) => {
                return match error.kind() {
                    GetStreamErrorKind::JetStream(said)
                        if said.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                    {
                        Ok(None)
                    }
                    _ => Err(self.refused("looking for the bucket", &error)),
                };
            }
        };
        let objects = context.get_object_store(&self.object.bucket).await;
        let objects = objects.map_err(|error| self.refused("opening the bucket", &error))?;
        Ok(Some(Bucket { objects, stream }))
    }

    async fn create_bucket(&self, context: &Context) -> Result<ObjectStore, AccessError> {
        let config = object_store::Config {
            bucket: self.object.bucket.clone(),
            description: Some("kvatlas index checkpoints".to_owned()),
            max_age: self.object.ttl,
            num_replicas: self.object.replicas,
            ..object_store::Config::default()
        };
        let created = context.create_object_store(config).await;
        created.map_err(|error| self.refused("creating the bucket", &error))
    }

    async fn store(&self, pieces: Pieces) -> Result<(), SaveError> {
        let context = self.connect().await?;
        let objects = match self.bucket(&context).await? {
            Some(bucket) => {
                self.purge_leftovers(&bucket).await?;
                bucket.objects
            }
            None => self.create_bucket(&context).await?,
        };
        let pieces = stream::try_unfold(pieces, |mut pieces| async {
            Ok::<_, io::Error>(pieces.next().await?.map(|piece| (piece, pieces)))
        });
        let mut reader = StreamReader::new(Box::pin(pieces));
        let put = objects.put(self.object.name.as_str(), &mut reader).await;
        put.map_err(|error| self.refused("saving", &error))?;
        Ok(())
    }

    /// Purges messages that no object names and that are old enough to belong to no running save.
    async fn purge_leftovers(&self, bucket: &Bucket) -> Result<(), AccessError> {
        let Bucket { objects, stream } = bucket;
        let found = self.messages(stream, "*").await?;
        if found.len() <= 1 {
            return Ok(());
        }
        let refused = |error: &dyn Display| self.refused("looking for leftovers", error);
        let objects = objects.list().await.map_err(|error| refused(&error))?;
        let named: HashSet<String> =
            objects.map_ok(|object| object.nuid).try_collect().await.map_err(|error| refused(&error))?;
        let long_ago = SystemTime::now() - self.leftover_age;
        for (subject, _) in found {
            if subject.rsplit('.').next().is_none_or(|nuid| named.contains(nuid)) {
                continue;
            }
            let last = stream.get_last_raw_message_by_subject(&subject).await;
            // Gone meanwhile, if there is none.
            if last.is_ok_and(|message| SystemTime::from(message.time) < long_ago) {
                stream.purge().filter(&subject).await.map_err(|error| refused(&error))?;
                tracing::debug!(%subject, "purged what a save that failed had left");
            }
        }
        Ok(())
    }

    /// Whether all messages of an object are there. The library would wait for those that are not.
    async fn check_whole(&self, stream: &Stream, info: &ObjectInfo) -> Result<(), LoadError> {
        let found: usize =
            self.messages(stream, &info.nuid).await?.iter().map(|(_, messages)| messages).sum();
        if found == info.chunks {
            return Ok(());
        }
        let reason = format!("{found} of {} messages are there: it expired or was replaced", info.chunks);
        Err(LoadError::Torn { reason })
    }

    /// Subjects of objects' messages, and how many there are under each.
    async fn messages(&self, stream: &Stream, nuid: &str) -> Result<Vec<(String, usize)>, AccessError> {
        let refused = |error: &dyn Display| self.refused("counting messages", error);
        let subjects = stream.info_with_subjects(format!("$O.{}.C.{nuid}", self.object.bucket)).await;
        subjects.map_err(|error| refused(&error))?.try_collect().await.map_err(|error| refused(&error))
    }

    fn refused(&self, what: &str, error: &dyn Display) -> AccessError {
        let (place, reason) =
            (self.object.to_string(), format!("{what}: {error}").replace(['\n', '\r'], "; "));
        // JetStream is asked by messages; without permission to ask, or without JetStream, there is no answer.
        AccessError::Refused { place, reason }
    }

    fn explain_connect(&self, error: ConnectError) -> AccessError {
        let (place, reason) = (self.object.to_string(), error.to_string());
        match error {
            ConnectError::Unauthorized { .. } | ConnectError::Tls { .. } => {
                AccessError::Unauthorized { place, reason }
            }
            ConnectError::File { what, path, reason } => AccessError::Secret { what, path, reason },
            ConnectError::Unreachable { .. }
            | ConnectError::UrlCount { .. }
            | ConnectError::InvalidUrl { .. } => AccessError::Unreachable { place, reason },
        }
    }
}

#[async_trait]
impl CheckpointStore for NatsStore {
    fn kind(&self) -> &'static str {
        "nats"
    }

    fn place(&self) -> String {
        self.object.to_string()
    }

    fn keeps_for(&self) -> Option<Duration> {
        Some(self.object.ttl)
    }

    async fn load(&self, max_bytes: u64) -> Result<Option<Vec<u8>>, LoadError> {
        let context = self.connect().await?;
        let Some(bucket) = self.bucket(&context).await? else { return Ok(None) };
        let mut object = match bucket.objects.get(self.object.name.as_str()).await {
            Ok(object) => object,
            Err(error) if error.kind() == GetErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.refused("loading", &error).into()),
        };
        let bytes = object.info().size as u64;
        if bytes > max_bytes {
            return Err(LoadError::TooLarge { bytes, max_bytes });
        }
        self.check_whole(&bucket.stream, object.info()).await?;
        let mut stored = Vec::with_capacity(object.info().size);
        if let Err(error) = (&mut object).take(max_bytes).read_to_end(&mut stored).await {
            return Err(match error.kind() {
                io::ErrorKind::InvalidData => LoadError::Torn { reason: error.to_string() },
                _ => self.refused("loading", &error).into(),
            });
        }
        if stored.len() as u64 != bytes {
            let reason = format!("it has {} bytes and not {bytes}", stored.len());
            return Err(LoadError::Torn { reason });
        }
        Ok(Some(pieces::in_order(stored)))
    }

    async fn save(&self, write: WriteCheckpoint) -> Result<CheckpointSize, SaveError> {
        pieces::save(write, |pieces| self.store(pieces)).await
    }
}

#[cfg(test)]
mod tests {
    use kvatlas_bus::NatsAuth;
    use kvatlas_bus::test_server::NatsServer;

    use super::*;

    const ANY_SIZE: u64 = 1 << 30;

    fn store(server: &NatsServer) -> NatsStore {
        let object = match "nats://checkpoints/index".parse().unwrap() {
            crate::Location::Nats(object) => object,
            other => panic!("{other}"),
        };
        NatsStore::new(object, &NatsConfig::new([server.url()]))
    }

    fn writes(bytes: &'static [u8], then: Result<(), io::ErrorKind>) -> WriteCheckpoint {
        Box::new(move |out| {
            out.write_all(bytes)?;
            // Enough for some messages to be on their way.
            if then.is_err() {
                out.write_all(&vec![7; pieces::PIECE_BYTES + 1])?;
            }
            then?;
            Ok(CheckpointSize { bytes: bytes.len() as u64, ..CheckpointSize::default() })
        })
    }

    async fn subjects(store: &NatsStore) -> usize {
        let bucket = store.bucket(&store.connect().await.unwrap()).await.unwrap().unwrap();
        store.messages(&bucket.stream, "*").await.unwrap().len()
    }

    #[tokio::test]
    async fn what_a_failed_save_left_is_purged_once_no_running_save_can_own_it() {
        let Some(server) = NatsServer::start_with(&["--jetstream"]) else { return };
        let mut store = store(&server);
        let saved = || writes(b"a checkpoint of some bytes", Ok(()));
        store.save(saved()).await.unwrap();
        for _ in 0..2 {
            let failed = store.save(writes(b"a checkpoint of some bytes", Err(io::ErrorKind::Other))).await;
            assert_eq!(failed.unwrap_err().reason(), "unwritable");
        }
        store.save(saved()).await.unwrap();
        assert_eq!(subjects(&store).await, 3, "another server's save looks just like this");
        store.leftover_age = Duration::ZERO;
        store.save(saved()).await.unwrap();
        assert_eq!(subjects(&store).await, 1);
        assert!(store.load(ANY_SIZE).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_broker_without_object_stores_is_refused_and_not_waited_for() {
        let Some(server) = NatsServer::start() else { return };
        let store = store(&server);
        let error = store.load(ANY_SIZE).await.unwrap_err();
        assert!(error.reason() == "refused" && error.to_string().contains("bucket"), "{error}");
        assert_eq!(
            store.save(writes(b"a checkpoint of some bytes", Ok(()))).await.unwrap_err().reason(),
            "refused"
        );
    }

    #[tokio::test]
    async fn a_password_that_was_replaced_on_disk_is_used_the_next_time() {
        let Some(server) = NatsServer::start_with(&["--jetstream", "--user", "u", "--pass", "hunter2"])
        else {
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        let mut store = store(&server);
        store.config.auth = NatsAuth::UserPasswordFile { user: "u".to_owned(), password_file: path.clone() };
        assert_eq!(store.load(ANY_SIZE).await.unwrap_err().reason(), "secret");
        std::fs::write(&path, "wrong").unwrap();
        assert_eq!(store.load(ANY_SIZE).await.unwrap_err().reason(), "unauthorized");
        std::fs::write(&path, "hunter2\n").unwrap();
        assert!(store.load(ANY_SIZE).await.unwrap().is_none());
        store.save(writes(b"a checkpoint of some bytes", Ok(()))).await.unwrap();
    }
}
