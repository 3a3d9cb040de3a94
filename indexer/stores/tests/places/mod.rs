//! Every kind of store with a real server behind it, and what a test does to it behind its back.
// Each test file is its own program and uses a part of this.
#![allow(dead_code, unreachable_pub)]

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kvatlas_bus::test_server::NatsServer;
use kvatlas_bus::{ClientIdentity, NatsConfig};
use kvatlas_index::CheckpointStore;
use kvatlas_index::store::FileStore;
use kvatlas_stores::test_server::{Certificates, PASSWORD, TlsServer, ValkeyCluster, ValkeyServer};
use kvatlas_stores::{Location, NatsStore, ObjectName, Password, RedisLocation, RedisStore, StoreAccess};
use redis::{RedisResult, cmd};
use tempfile::TempDir;

/// A store of which nothing else knows.
#[async_trait]
pub trait Place: Send {
    /// Kind, for metric labels.
    fn kind(&self) -> &'static str;
    /// A client that knows nothing of earlier ones, as a new process has it.
    fn store(&self) -> Arc<dyn CheckpointStore>;
    /// Takes a part of the checkpoint away.
    async fn tear(&mut self);
    /// The reason that is counted for a torn checkpoint.
    fn torn(&self) -> &'static str {
        "torn"
    }
    /// Makes it unusable, and usable again.
    fn stop(&mut self);
    fn start(&mut self);
    /// The reasons that are counted for loading and saving meanwhile.
    fn stopped(&self) -> (&'static str, &'static str) {
        ("unreachable", "unreachable")
    }
    /// Parts of checkpoints that are there, whoever left them.
    async fn parts(&self) -> usize;
    /// Parts of a checkpoint of so many bytes.
    fn parts_of(&self, bytes: usize) -> usize;
}

/// A file.
pub struct FilePlace {
    folder: TempDir,
}

/// An object in a bucket.
pub struct NatsPlace {
    server: NatsServer,
}

/// Keys in one server.
pub struct RedisPlace {
    server: ValkeyServer,
}

/// Keys in a cluster.
pub struct ClusterPlace {
    cluster: ValkeyCluster,
}

// === impl FilePlace ===

impl FilePlace {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("index.checkpoint")
    }
}

#[async_trait]
impl Place for FilePlace {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn store(&self) -> Arc<dyn CheckpointStore> {
        Arc::new(FileStore::new(self.path()))
    }

    async fn tear(&mut self) {
        let bytes = fs::read(self.path()).unwrap();
        fs::write(self.path(), &bytes[..bytes.len() - 1]).unwrap();
    }

    fn torn(&self) -> &'static str {
        "damaged"
    }

    fn stop(&mut self) {
        let _ = fs::remove_file(self.path());
        fs::create_dir(self.path()).unwrap();
    }

    fn start(&mut self) {
        fs::remove_dir(self.path()).unwrap();
    }

    fn stopped(&self) -> (&'static str, &'static str) {
        ("unreadable", "unwritable")
    }

    async fn parts(&self) -> usize {
        self.folder.path().read_dir().unwrap().count()
    }

    fn parts_of(&self, _: usize) -> usize {
        1
    }
}

// === impl NatsPlace ===

impl NatsPlace {
    pub fn start() -> Option<Self> {
        Some(Self { server: NatsServer::start_with(&["--jetstream"])? })
    }

    pub fn object() -> ObjectName {
        match "nats://checkpoints/index-0".parse().unwrap() {
            Location::Nats(object) => object,
            other => panic!("{other}"),
        }
    }

    pub async fn stream(&self) -> async_nats::jetstream::stream::Stream {
        let client = NatsConfig::new([self.server.url()]).connect_client().await.unwrap();
        async_nats::jetstream::new(client).get_stream("OBJ_checkpoints").await.unwrap()
    }
}

#[async_trait]
impl Place for NatsPlace {
    fn kind(&self) -> &'static str {
        "nats"
    }

    fn store(&self) -> Arc<dyn CheckpointStore> {
        Arc::new(NatsStore::new(Self::object(), &NatsConfig::new([self.server.url()])))
    }

    async fn tear(&mut self) {
        let stream = self.stream().await;
        let last = stream.get_last_raw_message_by_subject("$O.checkpoints.C.*").await.unwrap();
        stream.delete_message(last.sequence).await.unwrap();
    }

    fn stop(&mut self) {
        self.server.stop();
    }

    fn start(&mut self) {
        self.server.restart();
    }

    async fn parts(&self) -> usize {
        // What is counted is generations, since the library decides how many messages an object is.
        let subjects = self.stream().await.info_with_subjects("$O.checkpoints.C.*").await.unwrap();
        futures_util::StreamExt::count(subjects).await
    }

    fn parts_of(&self, _: usize) -> usize {
        1
    }
}

// === impl RedisPlace ===

impl RedisPlace {
    pub fn start() -> Option<Self> {
        Some(Self { server: ValkeyServer::start()? })
    }
}

#[async_trait]
impl Place for RedisPlace {
    fn kind(&self) -> &'static str {
        "redis"
    }

    fn store(&self) -> Arc<dyn CheckpointStore> {
        let location = redis_location(&format!("redis://{}/2?name=index-0", self.server.address()));
        Arc::new(RedisStore::new(location, access()))
    }

    async fn tear(&mut self) {
        assert_eq!(delete_a_piece(&self.server, 2), 1);
    }

    fn stop(&mut self) {
        self.server.stop();
    }

    fn start(&mut self) {
        self.server.restart();
    }

    async fn parts(&self) -> usize {
        keys(&self.server, 2).len()
    }

    fn parts_of(&self, bytes: usize) -> usize {
        redis_parts(bytes)
    }
}

// === impl ClusterPlace ===

impl ClusterPlace {
    pub fn start() -> Option<Self> {
        Some(Self { cluster: ValkeyCluster::start()? })
    }

    pub fn cluster(&self) -> &ValkeyCluster {
        &self.cluster
    }
}

#[async_trait]
impl Place for ClusterPlace {
    fn kind(&self) -> &'static str {
        "redis"
    }

    fn store(&self) -> Arc<dyn CheckpointStore> {
        let location = redis_location(&format!("redis-cluster://{}?name=index-0", self.cluster.hosts()));
        Arc::new(RedisStore::new(location, access()))
    }

    async fn tear(&mut self) {
        let deleted = self.cluster.nodes().iter().any(|node| delete_a_piece(node, 0) == 1);
        assert!(deleted);
    }

    fn stop(&mut self) {
        self.cluster.stop();
    }

    fn start(&mut self) {
        self.cluster.restart();
    }

    async fn parts(&self) -> usize {
        self.cluster.nodes().iter().map(|node| keys(node, 0).len()).sum()
    }

    fn parts_of(&self, bytes: usize) -> usize {
        redis_parts(bytes)
    }
}

pub fn redis_location(url: &str) -> RedisLocation {
    match url.parse().unwrap() {
        Location::Redis(location) => location,
        other => panic!("{other}"),
    }
}

pub fn access() -> StoreAccess {
    StoreAccess { password: Password::Given(PASSWORD.to_owned()), ..StoreAccess::default() }
}

pub fn tls_access(certificates: &Certificates) -> StoreAccess {
    let (certificate_file, key_file) = certificates.client_files();
    StoreAccess {
        ca_file: Some(certificates.ca_file()),
        client_identity: Some(ClientIdentity { certificate_file, key_file }),
        ..access()
    }
}

pub fn tls_location(server: &TlsServer) -> RedisLocation {
    redis_location(&format!("rediss://{}", server.address()))
}

/// The keys of a server's database.
pub fn keys(server: &ValkeyServer, database: u16) -> Vec<String> {
    let mut connection = server.connect();
    let selected: RedisResult<()> = cmd("SELECT").arg(database).query(&mut connection);
    selected.unwrap();
    cmd("KEYS").arg("*").query(&mut connection).unwrap()
}

/// Seconds that a key has left.
pub fn seconds_left(server: &ValkeyServer, key: &str) -> Duration {
    Duration::from_secs(cmd("TTL").arg(key).query(&mut server.connect()).unwrap())
}

fn delete_a_piece(server: &ValkeyServer, database: u16) -> usize {
    let Some(key) = keys(server, database).into_iter().find(|key| key.matches(':').count() == 3) else {
        return 0;
    };
    let mut connection = server.connect();
    let selected: RedisResult<()> = cmd("SELECT").arg(database).query(&mut connection);
    selected.unwrap();
    cmd("DEL").arg(key).query(&mut connection).unwrap()
}

/// Pieces of the body, the preamble, and the manifest.
fn redis_parts(bytes: usize) -> usize {
    (bytes - 16).div_ceil(kvatlas_stores::PIECE_BYTES) + 2
}
