//! Typed client of a kvatlas server: score, outcome, list of owners, dump; each call with a deadline and errors that name
//! the server.
//!
//! The connection is made with the first call and again whenever it was lost, so a client can be made before its
//! server runs. There are no retries here: a gateway that gets no score in time routes without one, and a tool says
//! what went wrong.

use std::time::Duration;

use kvatlas_proto::grpc::atlas_client::AtlasClient;
use kvatlas_proto::grpc::{
    DumpRequest, DumpResponse, ListOwnersRequest, ListOwnersResponse, ReportOutcomeRequest,
    ReportOutcomeResponse, ScoreRequest, ScoreResponse,
};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

/// Deadline of a call, unless configured: far above a look-up, far below a person's patience.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(2);
/// Largest answer, bytes: a list of every owner of a fleet of tens of thousands of sources.
pub const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Silence on the connection after which the server is probed, so that a dead one is noticed between calls.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);

/// Which server, and how long to wait for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// `http://host:port`, or `host:port` for short.
    pub endpoint: String,
    /// Longest time a call may take, connecting included; for a dump the longest wait for its next chunk.
    pub deadline: Duration,
}

/// A client of one server. Clones share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    atlas: AtlasClient<Channel>,
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

/// The endpoint cannot be a server's address.
#[derive(Debug, thiserror::Error)]
#[error("endpoint {endpoint:?} is not usable: {problem}; give http://host:port or host:port")]
pub struct EndpointError {
    endpoint: String,
    problem: String,
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
        Self { endpoint: endpoint.into(), deadline: DEFAULT_DEADLINE }
    }
}

// === impl Client ===

impl Client {
    /// Prepares a client; the first call connects. Must be called inside a tokio runtime, which then drives the
    /// connection.
    pub fn connect(config: ClientConfig) -> Result<Self, EndpointError> {
        let ClientConfig { endpoint, deadline } = config;
        let failed = |problem: String| EndpointError { endpoint: endpoint.clone(), problem };
        let url = if endpoint.contains("://") { endpoint.clone() } else { format!("http://{endpoint}") };
        let transport = Endpoint::from_shared(url).map_err(|error| failed(error.to_string()))?;
        if transport.uri().scheme_str() != Some("http") {
            return Err(failed("this client speaks plain HTTP/2 only".to_owned()));
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
        let atlas = AtlasClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
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
        for (bad, word) in [("", "invalid"), ("https://a:1", "plain"), ("a", "port"), ("http://", "")] {
            let error = Client::connect(ClientConfig::new(bad)).unwrap_err().to_string();
            assert!(error.contains("host:port") && error.contains(word), "{error}");
        }
        assert!(Client::connect(ClientConfig::new("[::1]:50051")).is_ok());
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
        let client = Client::connect(ClientConfig { endpoint, deadline }).unwrap();
        let error = client.list_owners(ListOwnersRequest::default()).await.unwrap_err();
        assert!(matches!(error, CallError::Deadline { .. }), "{error:?}");
    }
}
