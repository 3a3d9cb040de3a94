//! Who reaches the gRPC port and what they may ask: TLS, certificates that are replaced, identities, tenants.

#[path = "common/certificates.rs"]
mod certificates;
mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use certificates::{Authority, Pair};
use common::frames::{Op, Publisher};
use common::{PATIENCE, Stage, any_port, ask_keys, bus, config};
use kvatlas_client::{CallError, Client, ClientConfig, ClientTls};
use kvatlas_index::{IndexServer, IndexServerConfig, RunningIndexServer, StartError, TlsFiles};
use kvatlas_proto::grpc as pb;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::{ServerReflectionRequest, server_reflection_request::MessageRequest};

/// Longest time for a call in these tests.
const DEADLINE: Duration = Duration::from_secs(10);

fn tls_files(pair: &Pair, client_ca_file: Option<PathBuf>) -> TlsFiles {
    TlsFiles { certificate_file: pair.certificate.clone(), key_file: pair.key.clone(), client_ca_file }
}

async fn serve(config: IndexServerConfig) -> RunningIndexServer {
    IndexServer::start(config, bus(), Registry::default()).await.unwrap()
}

fn client(server: &RunningIndexServer, tls: ClientTls) -> Client {
    let endpoint = server.grpc_addr().to_string();
    let config = ClientConfig { deadline: DEADLINE, tls: Some(tls), ..ClientConfig::new(endpoint) };
    Client::connect(config).unwrap()
}

fn trusting(authority: &Authority) -> ClientTls {
    ClientTls { ca_file: Some(authority.ca_file()), ..ClientTls::default() }
}

async fn list(client: &Client) -> Result<usize, CallError> {
    let answer = client.list_owners(pb::ListOwnersRequest::default()).await?;
    Ok(answer.sources.len())
}

/// A number of the metrics page.
async fn metric(server: &RunningIndexServer, name: &str) -> u64 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(server.http_addr().unwrap()).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0, |number| number.parse().unwrap())
}

async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("it never happened that {what}"));
}

// ------------------------------------------------------------------------------------------------ TLS

#[tokio::test]
async fn a_server_is_trusted_with_its_authority_and_name_only() {
    let authority = Authority::new();
    let pair = authority.sign("server", &["127.0.0.1", "kvatlas.example"], "server");
    let server = serve(IndexServerConfig { tls: Some(tls_files(&pair, None)), ..config() }).await;
    assert_eq!(list(&client(&server, trusting(&authority))).await.unwrap(), 0);
    let named = |name: &str| ClientTls { server_name: Some(name.to_owned()), ..trusting(&authority) };
    assert_eq!(list(&client(&server, named("kvatlas.example"))).await.unwrap(), 0);
    for tls in [trusting(&Authority::new()), named("other.example"), ClientTls::default()] {
        let error = list(&client(&server, tls)).await.unwrap_err();
        assert!(matches!(error, CallError::Unreachable { .. }), "{error:?}");
    }
    let plain = ClientConfig { deadline: DEADLINE, ..ClientConfig::new(server.grpc_addr().to_string()) };
    assert!(list(&Client::connect(plain).unwrap()).await.is_err(), "plain text is not answered");
    until("failed handshakes are counted", || async {
        metric(&server, "kvatlas_index_connections_refused_total{reason=\"handshake\"}").await >= 3
    })
    .await;
}

#[tokio::test]
async fn where_client_certificates_are_asked_for_only_those_of_the_authority_connect() {
    let (authority, other) = (Authority::new(), Authority::new());
    let pair = authority.sign("server", &["127.0.0.1"], "server");
    let tls = Some(tls_files(&pair, Some(authority.ca_file())));
    let server = serve(IndexServerConfig { tls, ..config() }).await;
    let with =
        |pair: Pair| ClientTls { identity: Some((pair.certificate, pair.key)), ..trusting(&authority) };
    let known = client(&server, with(authority.sign("client", &["a.example"], "a")));
    assert_eq!(list(&known).await.unwrap(), 0);
    for tls in [trusting(&authority), with(other.sign("client", &["a.example"], "a"))] {
        assert!(list(&client(&server, tls)).await.is_err());
    }
}

#[tokio::test]
async fn a_replaced_certificate_is_used_for_new_connections_and_a_broken_one_is_not() {
    let (old, new) = (Authority::new(), Authority::new());
    let pair = old.sign("server", &["127.0.0.1"], "server");
    let server = serve(IndexServerConfig { tls: Some(tls_files(&pair, None)), ..config() }).await;
    let before = client(&server, trusting(&old));
    assert_eq!(list(&before).await.unwrap(), 0);

    let refused = "kvatlas_index_reloads_total{what=\"tls\",result=\"refused\"}";
    std::fs::write(&pair.certificate, "not a certificate").unwrap();
    until("the broken file is counted", || async { metric(&server, refused).await == 1 }).await;
    assert_eq!(list(&client(&server, trusting(&old))).await.unwrap(), 0, "the last good one stays in force");

    let replacement = new.sign("server", &["127.0.0.1"], "server");
    std::fs::copy(&replacement.key, &pair.key).unwrap();
    std::fs::copy(&replacement.certificate, &pair.certificate).unwrap();
    until("new connections get the new certificate", || async {
        list(&client(&server, trusting(&new))).await.is_ok()
    })
    .await;
    assert!(list(&client(&server, trusting(&old))).await.is_err());
    assert_eq!(list(&before).await.unwrap(), 0, "an open connection goes on");
}

#[tokio::test]
async fn unusable_files_are_named_at_start() {
    let missing = PathBuf::from("/nonexistent/kvatlas.pem");
    let pair = Pair { certificate: missing.clone(), key: missing.clone() };
    for config in [
        IndexServerConfig { tls: Some(tls_files(&pair, None)), ..config() },
        IndexServerConfig { auth_file: Some(missing), ..config() },
    ] {
        let error = IndexServer::start(config, bus(), Registry::default()).await.err().unwrap();
        assert!(matches!(error, StartError::File(_)), "{error:?}");
        assert!(error.to_string().contains("/nonexistent/kvatlas.pem"), "{error}");
    }
}

// ------------------------------------------------------------------------------------------------ identities

/// `printf %s TOKEN | sha256sum` of `token-a` and `token-all`.
const DIGEST_A: &str = "a70bf50e531ce1a817561f2f5d5b6645d4e806becf58ccc5e8cf6b8045a090a8";
const DIGEST_ALL: &str = "8e26b770c14de02b61a7cefc423dd918d0b440c3b9b24c26546dc3f12104d1dd";

fn write_auth(path: &Path, a_tenants: &str) {
    let text = format!(
        "[[identity]]\nname = \"gateway-a\"\ntoken-sha256 = [\"{DIGEST_A}\"]\ntenants = {a_tenants}\n\
         rights = [\"query\", \"observe\", \"report\"]\n\
         [[identity]]\nname = \"operator\"\ntoken-sha256 = [\"{DIGEST_ALL}\"]\ntenants = \"all\"\n\
         rights = [\"observe\", \"dump\"]\n"
    );
    std::fs::write(path, text).unwrap();
}

struct Guarded {
    stage: Stage,
    folder: tempfile::TempDir,
}

impl Guarded {
    /// Two tenants with a source each, and a model that tenants share.
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let auth_file = folder.path().join("auth.toml");
        write_auth(&auth_file, "[\"a\"]");
        let stage = Stage::with(IndexServerConfig { auth_file: Some(auth_file), ..config() }).await;
        for (tenant, instance) in [("a", "a:1"), ("b", "b:1")] {
            let mut publisher = Publisher::new("m", instance).scope(tenant, 16);
            stage.publish(&mut publisher, &[Op::Stored(0, vec![1, 2])]).await;
        }
        Self { stage, folder }
    }

    fn auth_file(&self) -> PathBuf {
        self.folder.path().join("auth.toml")
    }

    async fn score(&self, token: Option<&str>, tenant: &str) -> Result<pb::ScoreResponse, tonic::Status> {
        self.stage.score_with(as_caller(question(tenant), token)).await
    }
}

impl Stage {
    async fn score_with(
        &self,
        request: Request<pb::ScoreRequest>,
    ) -> Result<pb::ScoreResponse, tonic::Status> {
        self.atlas.clone().score(request).await.map(tonic::Response::into_inner)
    }
}

fn question(tenant: &str) -> pb::ScoreRequest {
    let mut request = ask_keys("m", [1, 2]);
    request.prompt.as_mut().unwrap().tenant = tenant.to_owned();
    request
}

fn as_caller<T>(message: T, token: Option<&str>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(token) = token {
        let value: MetadataValue<_> = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", value);
    }
    request
}

#[tokio::test]
async fn nobody_unknown_is_answered_and_a_refusal_shows_no_token() {
    let guarded = Guarded::start().await;
    for token in [None, Some("token-x")] {
        let status = guarded.score(token, "a").await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
        assert!(!status.message().contains("token-x"), "{}", status.message());
    }
    let mut atlas = guarded.stage.atlas.clone();
    let none = |status: tonic::Status| assert_eq!(status.code(), Code::Unauthenticated);
    none(atlas.list_owners(pb::ListOwnersRequest::default()).await.unwrap_err());
    none(atlas.dump(pb::DumpRequest { model: "m".into(), ..Default::default() }).await.unwrap_err());
    none(atlas.plan(pb::PlanRequest::default()).await.unwrap_err());
    none(atlas.speculate(pb::SpeculateRequest::default()).await.unwrap_err());
    none(atlas.watch(pb::WatchRequest::default()).await.unwrap_err());
    none(atlas.report_outcome(pb::ReportOutcomeRequest::default()).await.unwrap_err());
    none(atlas.score_stream(tokio_stream::iter([question("a")])).await.unwrap_err());
    let (_, page) = guarded.stage.get("/metrics").await;
    for counted in [
        "kvatlas_index_unauthenticated_total{reason=\"missing\"} 8",
        "kvatlas_index_unauthenticated_total{reason=\"token\"} 1",
        "kvatlas_index_calls_total{call=\"Score\",result=\"unauthenticated\"} 2",
    ] {
        assert!(page.contains(counted), "{counted} is not in:\n{page}");
    }
}

#[tokio::test]
async fn an_identity_asks_about_its_own_tenants_only() {
    let guarded = Guarded::start().await;
    let answer = guarded.score(Some("token-a"), "a").await.unwrap();
    assert_eq!(answer.instances[0].matched_blocks, 2);
    for (token, tenant) in [("token-a", "b"), ("token-a", ""), ("token-all", "a")] {
        let status = guarded.score(Some(token), tenant).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{token} {tenant}");
        assert!(!status.message().contains(token), "{}", status.message());
    }
    let status = guarded.score(Some("token-a"), "b").await.unwrap_err();
    assert!(status.message().contains("gateway-a") && status.message().contains("\"b\""), "{status}");
}

#[tokio::test]
async fn a_list_shows_what_the_caller_may_see() {
    let guarded = Guarded::start().await;
    let list = async |token: &str, model: &str, tenant: &str| {
        let request =
            pb::ListOwnersRequest { model: model.into(), tenant: tenant.into(), ..Default::default() };
        let mut atlas = guarded.stage.atlas.clone();
        let answer = atlas.list_owners(as_caller(request, Some(token))).await?;
        let sources = answer.into_inner().sources;
        Ok::<_, tonic::Status>(sources.into_iter().map(|source| source.instance).collect::<Vec<_>>())
    };
    assert_eq!(list("token-all", "", "").await.unwrap(), ["a:1", "b:1"]);
    assert_eq!(list("token-a", "", "").await.unwrap(), ["a:1"]);
    assert_eq!(list("token-a", "m", "a").await.unwrap(), ["a:1"]);
    assert_eq!(list("token-a", "m", "b").await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_dump_needs_its_own_right() {
    let guarded = Guarded::start().await;
    let dump = async |token: &str| {
        let request = pb::DumpRequest { model: "m".into(), tenant: "a".into(), ..Default::default() };
        let mut chunks =
            guarded.stage.atlas.clone().dump(as_caller(request, Some(token))).await?.into_inner();
        Ok::<_, tonic::Status>(chunks.message().await?.map_or(0, |chunk| chunk.keys.len()))
    };
    assert_eq!(dump("token-a").await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(dump("token-all").await.unwrap(), 2);
}

#[tokio::test]
async fn what_was_predicted_for_one_identity_is_not_told_to_another() {
    let guarded = Guarded::start().await;
    let mut scored = question("a");
    scored.request_id = 77;
    scored.prompt.as_mut().unwrap().prompt_tokens = 40;
    guarded.stage.score_with(as_caller(scored, Some("token-a"))).await.unwrap();
    let report = pb::ReportOutcomeRequest {
        request_id: 77,
        instance: "a:1".into(),
        cached_tokens: Some(32),
        ..Default::default()
    };
    let mut atlas = guarded.stage.atlas.clone();
    let denied = atlas.report_outcome(as_caller(report.clone(), Some("token-all"))).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    let answer = atlas.report_outcome(as_caller(report, Some("token-a"))).await.unwrap().into_inner();
    assert_eq!(answer.predicted_tokens, 32);
}

#[tokio::test]
async fn every_request_of_a_stream_is_checked_also_after_rights_were_taken_away() {
    let guarded = Guarded::start().await;
    let (requests, stream) = mpsc::channel(1);
    let call = as_caller(ReceiverStream::new(stream), Some("token-a"));
    let mut answers = guarded.stage.atlas.clone().score_stream(call).await.unwrap().into_inner();
    let mut ask = async |tenant: &str| {
        requests.send(question(tenant)).await.unwrap();
        match answers.message().await.unwrap().unwrap().result.unwrap() {
            pb::score_stream_response::Result::Score(_) => Code::Ok,
            pb::score_stream_response::Result::Error(error) => Code::from(error.code),
        }
    };
    assert_eq!(ask("a").await, Code::Ok);
    assert_eq!(ask("b").await, Code::PermissionDenied);
    assert_eq!(ask("a").await, Code::Ok, "the stream goes on");
    write_auth(&guarded.auth_file(), "[\"b\"]");
    let patience = tokio::time::Instant::now() + PATIENCE;
    while ask("a").await == Code::Ok {
        assert!(tokio::time::Instant::now() < patience, "the change never came into force");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!((ask("a").await, ask("b").await), (Code::PermissionDenied, Code::Ok));
    std::fs::write(guarded.auth_file(), "").unwrap();
    while ask("b").await == Code::Ok {
        assert!(tokio::time::Instant::now() < patience, "the change never came into force");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(ask("b").await, Code::Unauthenticated);
}

#[tokio::test]
async fn a_broken_auth_file_opens_nothing_and_closes_nothing() {
    let guarded = Guarded::start().await;
    std::fs::write(guarded.auth_file(), "[[identity]]").unwrap();
    let refused = "kvatlas_index_reloads_total{what=\"auth\",result=\"refused\"}";
    until("the broken file is counted", || async { metric(&guarded.stage.server, refused).await == 1 }).await;
    assert!(guarded.score(Some("token-a"), "a").await.is_ok());
    assert_eq!(guarded.score(None, "a").await.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn health_and_the_description_of_the_service_need_no_identity() {
    let guarded = Guarded::start().await;
    let channel = common::channel(&guarded.stage.server).await;
    let mut health = HealthClient::new(channel.clone());
    assert!(health.check(HealthCheckRequest::default()).await.is_ok());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(channel);
    let answers = reflection.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
    assert!(answers.into_inner().message().await.unwrap().is_some());
}

#[tokio::test]
async fn a_client_certificate_is_an_identity() {
    let authority = Authority::new();
    let auth_file = authority.folder().join("auth.toml");
    std::fs::write(
        &auth_file,
        "[[identity]]\nname = \"gateway-a\"\ncertificate = [\"spiffe://x/a\"]\ntenants = [\"a\"]\n\
         rights = [\"query\"]\n[[identity]]\nname = \"old\"\ncommon-name = [\"old-gateway\"]\n\
         tenants = \"all\"\nrights = [\"query\"]\n",
    )
    .unwrap();
    let pair = authority.sign("server", &["127.0.0.1"], "server");
    let tls = Some(tls_files(&pair, Some(authority.ca_file())));
    let server =
        serve(IndexServerConfig { tls, auth_file: Some(auth_file), grpc_listen: any_port(), ..config() })
            .await;
    let with = |pair: Pair| {
        client(&server, ClientTls { identity: Some((pair.certificate, pair.key)), ..trusting(&authority) })
    };
    let a = with(authority.sign("a", &["spiffe://x/a"], "whoever"));
    let old = with(authority.sign("old", &[], "old-gateway"));
    let nobody = with(authority.sign("nobody", &["spiffe://x/nobody"], "nobody"));
    assert!(a.score(question("a")).await.is_ok());
    assert_eq!(a.score(question("b")).await.unwrap_err().code(), Code::PermissionDenied);
    assert!(old.score(question("b")).await.is_ok());
    assert_eq!(nobody.score(question("a")).await.unwrap_err().code(), Code::Unauthenticated);
}
