//! A server on free loopback ports with an in-process bus, and the ways to ask it.
// Each test file is its own program and uses a part of this.
#![allow(dead_code, unreachable_pub)]

pub mod frames;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvatlas_bus::{Bus, InProcessBus, InProcessConfig};
use kvatlas_index::{IndexServer, IndexServerConfig, RunningIndexServer};
use kvatlas_proto::ShardId;
use kvatlas_proto::grpc as pb;
use kvatlas_proto::grpc::atlas_client::AtlasClient;
use kvatlas_proto::subject::Subjects;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::Channel;

use frames::{Op, Publisher};

/// Longest wait for something that must happen.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Stage {
    pub bus: Arc<InProcessBus>,
    pub server: RunningIndexServer,
    pub atlas: AtlasClient<Channel>,
}

pub fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

pub fn bus() -> Arc<InProcessBus> {
    Arc::new(InProcessBus::new(InProcessConfig::default()))
}

pub fn config() -> IndexServerConfig {
    IndexServerConfig { http_listen: Some(any_port()), ..IndexServerConfig::new(any_port()) }
}

pub async fn channel(server: &RunningIndexServer) -> Channel {
    Channel::from_shared(format!("http://{}", server.grpc_addr())).unwrap().connect().await.unwrap()
}

impl Stage {
    pub async fn start() -> Self {
        Self::with(config()).await
    }

    pub async fn with(config: IndexServerConfig) -> Self {
        Self::on(bus(), config).await
    }

    pub async fn on(bus: Arc<InProcessBus>, config: IndexServerConfig) -> Self {
        let server = IndexServer::start(config, bus.clone(), Registry::default()).await.unwrap();
        let atlas = AtlasClient::new(channel(&server).await).max_decoding_message_size(64 << 20);
        Self { bus, server, atlas }
    }

    /// Publishes the publisher's next frame and waits until the index has taken it in.
    pub async fn publish(&self, publisher: &mut Publisher, ops: &[Op]) {
        let (seq, source) = (publisher.header.seq, publisher.header.source.clone());
        let scope = publisher.header.scope.clone();
        self.publish_only(publisher, ops).await;
        let filter = kvatlas_index::OwnerFilter::default();
        self.until("the frame is applied", || {
            let sources = self.server.index().sources(&filter, 0);
            sources
                .iter()
                .any(|info| info.scope == scope && info.source == source && info.applied_seq >= Some(seq))
        })
        .await;
    }

    pub async fn publish_only(&self, publisher: &mut Publisher, ops: &[Op]) {
        let subject = Subjects::default().events(
            publisher.header.scope.token(),
            ShardId::WHOLE,
            &publisher.header.source,
        );
        let frame = publisher.frame(ops);
        self.bus.publish(subject, Bytes::from(frame)).await.unwrap();
    }

    pub async fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let waited = tokio::time::timeout(PATIENCE, async {
            while !done() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        waited.await.unwrap_or_else(|_| panic!("it never happened that {what}"));
    }

    pub async fn score(&self, request: pb::ScoreRequest) -> Result<pb::ScoreResponse, tonic::Status> {
        self.atlas.clone().score(request).await.map(tonic::Response::into_inner)
    }

    /// A page of the HTTP port: status line and body.
    pub async fn get(&self, path: &str) -> (String, String) {
        let mut stream = tokio::net::TcpStream::connect(self.server.http_addr().unwrap()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }
}

pub fn prompt(model: &str, input: pb::prompt::Input) -> pb::Prompt {
    pb::Prompt { model: model.into(), input: Some(input), ..pb::Prompt::default() }
}

pub fn tokens(ids: impl IntoIterator<Item = u32>) -> pb::prompt::Input {
    pb::prompt::Input::TokenIds(pb::TokenIds { ids: ids.into_iter().collect() })
}

pub fn keys(keys: impl IntoIterator<Item = u64>) -> pb::prompt::Input {
    pb::prompt::Input::BlockKeys(pb::BlockKeys { keys: keys.into_iter().collect() })
}

pub fn ask(prompt: pb::Prompt) -> pb::ScoreRequest {
    pb::ScoreRequest { request_id: 7, prompt: Some(prompt), ..pb::ScoreRequest::default() }
}

/// A score request by keys at 16 tokens a block.
pub fn ask_keys(model: &str, of: impl IntoIterator<Item = u64>) -> pb::ScoreRequest {
    ask(pb::Prompt { block_size: 16, ..prompt(model, keys(of)) })
}
