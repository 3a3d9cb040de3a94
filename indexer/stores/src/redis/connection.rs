//! One connection to Redis or Valkey, to a server or to a cluster, with the few commands that are needed.

use std::time::Duration;

use kvatlas_index::store::AccessError;
use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClientBuilder;
use redis::cluster_async::ClusterConnection;
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind,
    FromRedisValue, IntoConnectionInfo as _, RedisConnectionInfo, RedisError, ServerErrorKind,
    TlsCertificates, cmd,
};

use crate::location::{Node, RedisLocation};
use crate::secrets::{StoreAccess, read_file};

/// Longest wait for a connection. A server in the same network answers within milliseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for an answer: 4 MiB at 1 MB/s, or a server that is busy with something large.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Times that a command in a cluster is sent again, to another node or after a pause: enough for slots that move.
const CLUSTER_RETRIES: u32 = 3;
/// Longest of these pauses, milliseconds.
const CLUSTER_RETRY_WAIT_MS: u64 = 500;

/// A connection, open until it is dropped.
#[derive(Clone)]
pub(super) enum Connection {
    Server(MultiplexedConnection),
    Cluster(ClusterConnection),
}

// === impl Connection ===

impl Connection {
    /// Connects, with secrets and certificates as they are now.
    pub(super) async fn open(location: &RedisLocation, access: &StoreAccess) -> Result<Self, AccessError> {
        let mut settings = RedisConnectionInfo::default().set_db(location.database.into());
        if let Some(user) = &access.user {
            settings = settings.set_username(user);
        }
        if let Some(password) = access.password.read().await? {
            settings = settings.set_password(password);
        }
        let certificates = if location.has_tls { Some(certificates(access).await?) } else { None };
        let connecting = async {
            if location.is_cluster {
                Self::open_cluster(location, settings, certificates).await
            } else {
                Self::open_server(location, settings, certificates).await
            }
        };
        // The client bounds each step, but not the name look-up nor all nodes of a cluster one after the other.
        let opened = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await;
        opened.map_or_else(
            |_| {
                let reason = format!("no connection within {} ms", CONNECT_TIMEOUT.as_millis());
                Err(AccessError::Unreachable { place: location.to_string(), reason })
            },
            |opened| opened.map_err(|error| explain(location, &error)),
        )
    }

    async fn open_server(
        location: &RedisLocation,
        settings: RedisConnectionInfo,
        certificates: Option<TlsCertificates>,
    ) -> Result<Self, RedisError> {
        let node = location.nodes.first().ok_or((ErrorKind::InvalidClientConfig, "no server is named"))?;
        let info = connection_info(node, location.has_tls)?.set_redis_settings(settings);
        let client = match certificates {
            Some(certificates) => Client::build_with_tls(info, certificates)?,
            None => Client::open(info)?,
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT));
        Ok(Self::Server(client.get_multiplexed_async_connection_with_config(&config).await?))
    }

    async fn open_cluster(
        location: &RedisLocation,
        settings: RedisConnectionInfo,
        certificates: Option<TlsCertificates>,
    ) -> Result<Self, RedisError> {
        let node = |node| Ok(connection_info(node, location.has_tls)?.set_redis_settings(settings.clone()));
        let nodes: Vec<ConnectionInfo> =
            location.nodes.iter().map(node).collect::<Result<_, RedisError>>()?;
        let mut builder = ClusterClientBuilder::new(nodes)
            .connection_timeout(CONNECT_TIMEOUT)
            .response_timeout(RESPONSE_TIMEOUT)
            .retries(CLUSTER_RETRIES)
            .max_retry_wait(CLUSTER_RETRY_WAIT_MS);
        if let Some(certificates) = certificates {
            builder = builder.certs(certificates);
        }
        Ok(Self::Cluster(builder.build()?.get_async_connection().await?))
    }

    pub(super) async fn get(&mut self, key: &str) -> Result<Option<Vec<u8>>, RedisError> {
        self.ask(cmd("GET").arg(key)).await
    }

    pub(super) async fn set(&mut self, key: &str, value: &[u8], ttl: Duration) -> Result<(), RedisError> {
        self.ask(cmd("SET").arg(key).arg(value).arg("EX").arg(ttl.as_secs())).await
    }

    /// Sets a value and returns the one before, in one step.
    pub(super) async fn swap(
        &mut self,
        key: &str,
        value: &[u8],
        ttl: Duration,
    ) -> Result<Option<Vec<u8>>, RedisError> {
        self.ask(cmd("SET").arg(key).arg(value).arg("EX").arg(ttl.as_secs()).arg("GET")).await
    }

    /// Deletes a value; its memory is given back without holding up other commands.
    pub(super) async fn delete(&mut self, key: &str) -> Result<(), RedisError> {
        self.ask(cmd("UNLINK").arg(key)).await
    }

    async fn ask<T: FromRedisValue>(&mut self, command: &Cmd) -> Result<T, RedisError> {
        match self {
            Self::Server(server) => ask_one(server, command).await,
            Self::Cluster(cluster) => ask_one(cluster, command).await,
        }
    }
}

async fn ask_one<T: FromRedisValue>(
    connection: &mut (impl ConnectionLike + Send),
    command: &Cmd,
) -> Result<T, RedisError> {
    command.query_async(connection).await
}

fn connection_info(node: &Node, has_tls: bool) -> Result<ConnectionInfo, RedisError> {
    let (host, port) = (node.host.clone(), node.port);
    let address = if has_tls {
        ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None }
    } else {
        ConnectionAddr::Tcp(host, port)
    };
    address.into_connection_info()
}

async fn certificates(access: &StoreAccess) -> Result<TlsCertificates, AccessError> {
    let root_cert = match &access.ca_file {
        Some(path) => Some(read_file("checkpoint store's CA file", path).await?),
        None => None,
    };
    let client_tls = match &access.client_identity {
        Some(identity) => Some(ClientTlsConfig {
            client_cert: read_file("checkpoint store's client certificate", &identity.certificate_file)
                .await?,
            client_key: read_file("checkpoint store's client key", &identity.key_file).await?,
        }),
        None => None,
    };
    Ok(TlsCertificates { client_tls, root_cert })
}

/// Turns the client's error into what can be done about it.
pub(super) fn explain(location: &RedisLocation, error: &RedisError) -> AccessError {
    let place = location.to_string();
    let reason = error.to_string().replace(['\n', '\r'], "; ");
    // A cluster's client reports that no node took it, with the nodes' own words inside.
    let says_no = ["NOAUTH", "WRONGPASS", "NOPERM"].iter().any(|code| reason.contains(code));
    match error.kind() {
        _ if says_no => AccessError::Unauthorized { place, reason },
        ErrorKind::AuthenticationFailed | ErrorKind::Server(ServerErrorKind::NoPerm) => {
            AccessError::Unauthorized { place, reason }
        }
        // What cannot be parsed is no answer of such a server, or one that is encrypted.
        ErrorKind::Io | ErrorKind::ClusterConnectionNotFound | ErrorKind::Parse => {
            AccessError::Unreachable { place, reason }
        }
        _ => AccessError::Refused { place, reason },
    }
}
