//! Typed client of a kvatlas server: score, outcome, list of owners, dump; each call with a deadline and errors that name
//! the server.
//!
//! With TLS if the endpoint is `https://` or [`ClientConfig::tls`] says how; with a bearer token if there is a file with one.
//!
//! The connection is made with the first call and again whenever it was lost, so a client can be made before its
//! server runs. There are no retries here: a gateway that gets no score in time routes without one, and a tool says
//! what went wrong.

use std::path::PathBuf;
use std::time::Duration;

use kvatlas_proto::grpc::atlas_client::AtlasClient;
use kvatlas_proto::grpc::{
    DumpRequest, DumpResponse, ListOwnersRequest, ListOwnersResponse, PlanRequest, PlanResponse,
    ReportOutcomeRequest, ReportOutcomeResponse, ScoreRequest, ScoreResponse, SpeculateRequest,
    SpeculateResponse,
};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status, Streaming};

mod token;

use token::Bearer;
pub use token::{MAX_TOKEN_BYTES, TOKEN_REREAD};

/// Deadline of a call, unless configured: far above a look-up, far below a person's patience.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(2);
/// Largest answer, bytes: a list of every owner of a fleet of tens of thousands of sources.
pub const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Silence on the connection after which the server is probed, so that a dead one is noticed between calls.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// Which server, and how long to wait for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// `http://host:port`, `https://host:port`, or `host:port` for short: then with TLS if `tls` is given.
    pub endpoint: String,
    /// Longest time a call may take, connecting included; for a dump the longest wait for its next chunk.
    pub deadline: Duration,
    /// How to encrypt; `None` with `https://`: trust the system's authorities.
    pub tls: Option<ClientTls>,
    /// File with the bearer token that says who asks. Read again from time to time.
    pub token_file: Option<PathBuf>,
}

/// TLS of a client. The files are read when the client is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// PEM file with the authorities to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// PEM files with this client's certificate chain and private key, where the server asks for them.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Name to expect in the server's certificate instead of the endpoint's host.
    pub server_name: Option<String>,
}

/// A client of one server. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    atlas: AtlasClient<InterceptedService<Channel, Bearer>>,
    endpoint: String,
    deadline: Duration,
}

/// A dump as it arrives.
#[derive(Debug)]
pub struct Dump {
    chunks: Streaming<DumpResponse>,
    endpoint: String,
    deadline: Duration,
}

/// A client cannot be made like this.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The endpoint cannot be a server's address.
    #[error(
        "endpoint {endpoint:?} is not usable: {problem}; give http://host:port, https://host:port or host:port"
    )]
    Address {
        /// As it was given.
        endpoint: String,
        /// What is wrong.
        problem: String,
    },
    /// A file of the configuration cannot be used. Its content is never shown.
    #[error("cannot use the {what} {path}: {problem}", path = path.display())]
    File {
        /// What the file is for.
        what: &'static str,
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Authorities, certificate and key make no TLS configuration.
    #[error(
        "TLS to {endpoint:?} cannot be set up: {problem}; check the CA file, the certificate and its key"
    )]
    Tls {
        /// Which server.
        endpoint: String,
        /// What is wrong.
        problem: String,
    },
}

/// A call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// There is no connection to the server.
    #[error("{call} did not reach {endpoint}: {problem}; does the server run, and is this its gRPC port?")]
    Unreachable {
        /// Which call.
        call: &'static str,
        /// Which server.
        endpoint: String,
        /// What the transport says.
        problem: String,
    },
    /// The deadline passed.
    #[error(
        "{call} on {endpoint} took longer than {deadline:?}: give it a longer deadline, or look at the server"
    )]
    Deadline {
        /// Which call.
        call: &'static str,
        /// Which server.
        endpoint: String,
        /// The deadline.
        deadline: Duration,
    },
    /// The server refused.
    #[error("{endpoint} refused {call} ({code:?}): {message}")]
    Refused {
        /// Which call.
        call: &'static str,
        /// Which server.
        endpoint: String,
        /// gRPC status code.
        code: Code,
        /// What the server says.
        message: String,
    },
}

// === impl ClientConfig ===

impl ClientConfig {
    /// This server, with the default deadline.
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self { endpoint: endpoint.into(), deadline: DEFAULT_DEADLINE, tls: None, token_file: None }
    }
}

// === impl ClientTls ===

impl ClientTls {
    fn setting(&self) -> Result<ClientTlsConfig, EndpointError> {
        let mut setting = match &self.ca_file {
            Some(path) => {
                ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("CA file", path)?))
            }
            None => ClientTlsConfig::new().with_enabled_roots(),
        };
        if let Some((certificate, key)) = &self.identity {
            let certificate = read("client certificate", certificate)?;
            setting = setting.identity(Identity::from_pem(certificate, read("client key", key)?));
        }
        Ok(match &self.server_name {
            Some(name) => setting.domain_name(name),
            None => setting,
        })
    }
}

fn read(what: &'static str, path: &PathBuf) -> Result<Vec<u8>, EndpointError> {
    let failed =
        |error: std::io::Error| EndpointError::File { what, path: path.clone(), problem: error.to_string() };
    std::fs::read(path).map_err(failed)
}

// === impl Client ===

impl Client {
    /// Prepares a client; the first call connects. Must be called inside a tokio runtime, which then drives the
    /// connection.
    pub fn connect(config: ClientConfig) -> Result<Self, EndpointError> {
        let ClientConfig { endpoint, deadline, tls, token_file } = config;
        let failed = |problem: String| EndpointError::Address { endpoint: endpoint.clone(), problem };
        let scheme = if tls.is_some() { "https" } else { "http" };
        let url = if endpoint.contains("://") { endpoint.clone() } else { format!("{scheme}://{endpoint}") };
        let mut transport = Endpoint::from_shared(url).map_err(|error| failed(error.to_string()))?;
        match (transport.uri().scheme_str(), tls) {
            (Some("https"), tls) => {
                let setting = tls.unwrap_or_default().setting()?;
                transport = transport.tls_config(setting).map_err(|error| {
                    let problem = deepest(&error).to_string();
                    EndpointError::Tls { endpoint: endpoint.clone(), problem }
                })?;
            }
            (Some("http"), None) => {}
            (Some("http"), Some(_)) => {
                return Err(failed("TLS is configured for a plain address".to_owned()));
            }
            _ => return Err(failed("this client speaks gRPC over http and https only".to_owned())),
        }
        if transport.uri().port_u16().is_none() {
            return Err(failed("it has no port".to_owned()));
        }
        let channel = transport
            .connect_timeout(deadline)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_while_idle(true)
            .connect_lazy();
        let bearer = Bearer::open(token_file)?;
        let atlas =
            AtlasClient::with_interceptor(channel, bearer).max_decoding_message_size(MAX_ANSWER_BYTES);
        Ok(Self { atlas, endpoint, deadline })
    }

    /// Which server.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// How much of a prompt each instance holds.
    pub async fn score(&self, request: ScoreRequest) -> Result<ScoreResponse, CallError> {
        let mut atlas = self.atlas.clone();
        let answer = within("Score", &self.endpoint, self.deadline, atlas.score(request)).await?;
        Ok(answer.into_inner())
    }

    /// Where a prompt would best be served, which blocks move, and why.
    pub async fn plan(&self, request: PlanRequest) -> Result<PlanResponse, CallError> {
        let mut atlas = self.atlas.clone();
        let answer = within("Plan", &self.endpoint, self.deadline, atlas.plan(request)).await?;
        Ok(answer.into_inner())
    }

    /// Makes the blocks of a request that was just routed visible at once.
    pub async fn speculate(&self, request: SpeculateRequest) -> Result<SpeculateResponse, CallError> {
        let mut atlas = self.atlas.clone();
        let answer = within("Speculate", &self.endpoint, self.deadline, atlas.speculate(request)).await?;
        Ok(answer.into_inner())
    }

    /// Tells what an engine reported for a request, to compare with what was predicted.
    pub async fn report_outcome(
        &self,
        request: ReportOutcomeRequest,
    ) -> Result<ReportOutcomeResponse, CallError> {
        let mut atlas = self.atlas.clone();
        let answer =
            within("ReportOutcome", &self.endpoint, self.deadline, atlas.report_outcome(request)).await?;
        Ok(answer.into_inner())
    }

    /// Who publishes, and what they hold.
    pub async fn list_owners(&self, request: ListOwnersRequest) -> Result<ListOwnersResponse, CallError> {
        let mut atlas = self.atlas.clone();
        let answer = within("ListOwners", &self.endpoint, self.deadline, atlas.list_owners(request)).await?;
        Ok(answer.into_inner())
    }

    /// The keys of owners, in chunks.
    pub async fn dump(&self, request: DumpRequest) -> Result<Dump, CallError> {
        let mut atlas = self.atlas.clone();
        let answer = within("Dump", &self.endpoint, self.deadline, atlas.dump(request)).await?;
        let (endpoint, deadline) = (self.endpoint.clone(), self.deadline);
        Ok(Dump { chunks: answer.into_inner(), endpoint, deadline })
    }
}

// === impl Dump ===

impl Dump {
    /// The next chunk; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<DumpResponse>, CallError> {
        within("Dump", &self.endpoint, self.deadline, self.chunks.message()).await
    }
}

async fn within<T>(
    call: &'static str,
    endpoint: &str,
    deadline: Duration,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(deadline, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => Err(CallError::of_status(call, endpoint, &status)),
        Err(_) => Err(CallError::Deadline { call, endpoint: endpoint.to_owned(), deadline }),
    }
}

// === impl CallError ===

impl CallError {
    /// The gRPC status code that this amounts to.
    pub fn code(&self) -> Code {
        match self {
            Self::Unreachable { .. } => Code::Unavailable,
            Self::Deadline { .. } => Code::DeadlineExceeded,
            Self::Refused { code, .. } => *code,
        }
    }

    fn of_status(call: &'static str, endpoint: &str, status: &Status) -> Self {
        let endpoint = endpoint.to_owned();
        // A status that was made on this side has the transport's error as its source; one from the server has none.
        match std::error::Error::source(status) {
            Some(source) => Self::Unreachable { call, endpoint, problem: deepest(source).to_string() },
            None => {
                Self::Refused { call, endpoint, code: status.code(), message: status.message().to_owned() }
            }
        }
    }
}

/// The innermost cause: "connection refused" says more than "transport error".
fn deepest<'a>(error: &'a (dyn std::error::Error + 'static)) -> &'a (dyn std::error::Error + 'static) {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn endpoints_that_cannot_work_are_refused_before_the_first_call() {
        for (bad, word) in [("", "invalid"), ("ftp://a:1", "https"), ("a", "port"), ("http://", "")] {
            let error = Client::connect(ClientConfig::new(bad)).unwrap_err().to_string();
            assert!(error.contains("host:port") && error.contains(word), "{error}");
        }
        assert!(Client::connect(ClientConfig::new("[::1]:50051")).is_ok());
        let tls = ClientConfig { tls: Some(ClientTls::default()), ..ClientConfig::new("http://a:1") };
        assert!(Client::connect(tls).unwrap_err().to_string().contains("plain"));
    }

    #[tokio::test]
    async fn files_that_cannot_be_used_are_named() {
        let missing = PathBuf::from("/nonexistent/kvatlas");
        let identity = Some((missing.clone(), missing.clone()));
        for tls in [
            ClientTls { ca_file: Some(missing.clone()), ..ClientTls::default() },
            ClientTls { identity, ..ClientTls::default() },
        ] {
            let config = ClientConfig { tls: Some(tls), ..ClientConfig::new("a:1") };
            let error = Client::connect(config).unwrap_err().to_string();
            assert!(error.contains("/nonexistent/kvatlas"), "{error}");
        }
        let config = ClientConfig { token_file: Some(missing), ..ClientConfig::new("a:1") };
        let error = Client::connect(config).unwrap_err().to_string();
        assert!(error.contains("token file /nonexistent/kvatlas"), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_does_not_run_is_named() {
        let address = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap()
        };
        let client = Client::connect(ClientConfig::new(address.to_string())).unwrap();
        let error = client.score(ScoreRequest::default()).await.unwrap_err();
        assert!(matches!(error, CallError::Unreachable { .. }), "{error:?}");
        assert!(error.to_string().contains(&address.to_string()), "{error}");
        assert_eq!(error.code(), Code::Unavailable);
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_ends_at_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let deadline = Duration::from_millis(50);
        let config = ClientConfig { deadline, ..ClientConfig::new(endpoint) };
        let client = Client::connect(config).unwrap();
        let error = client.list_owners(ListOwnersRequest::default()).await.unwrap_err();
        assert!(matches!(error, CallError::Deadline { .. }), "{error:?}");
    }
}
