//! What must not be in a log is not there, even where everything is logged: token ids, salts, credentials, secrets, well-formed
//! and not.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use kvatlas_bus::test_server::NatsServer;
use kvatlas_client::{Client, ClientConfig};
use kvatlas_proto::grpc as pb;
use tonic::client::Grpc;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

/// Longest wait for a line; far above what it takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Lines kept; more than a few calls log.
const LOG_LINES: usize = 200_000;
/// A token id that nothing else writes, in each form in which a log could have it.
const TOKEN_ID: u32 = 3_735_928_559;
/// In everything that is a secret here.
const MARK: &str = "hunter2";

struct Server {
    child: Child,
    lines: Receiver<String>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already, or to go now; both are fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvatlas"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("KVATLAS_")) {
            command.env_remove(name);
        }
        let mut child = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (lines_in, lines) = sync_channel(LOG_LINES);
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| lines_in.send(line))
        });
        Self { child, lines }
    }

    /// The log up to a line with this in it.
    fn log_until(&self, wanted: &str, log: &mut String) -> String {
        let deadline = Instant::now() + PATIENCE;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            log.push_str(&line);
            log.push('\n');
            if line.contains(wanted) {
                return line;
            }
        }
        panic!("{wanted} is not in:\n{log}");
    }

    /// Stops the server and reads the rest.
    fn stop(mut self, log: &mut String) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.child.wait().unwrap();
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            log.push_str(&line);
            log.push('\n');
        }
    }
}

fn prompt(block_size: u32) -> pb::Prompt {
    pb::Prompt {
        model: "m".into(),
        tenant: "a".into(),
        block_size,
        input: Some(pb::prompt::Input::TokenIds(pb::TokenIds { ids: vec![TOKEN_ID; 40] })),
        cache_salt: format!("salt-{MARK}"),
        multimodal: vec![pb::MultimodalItem { identifier: format!("image-{MARK}"), offset: 0, length: 3 }],
        ..pb::Prompt::default()
    }
}

fn question(block_size: u32) -> pb::ScoreRequest {
    pb::ScoreRequest { prompt: Some(prompt(block_size)), ..Default::default() }
}

async fn raw<M: prost::Message + Default + 'static>(
    endpoint: &str,
    authorization: &str,
    message: M,
) -> Result<(), Status> {
    let channel = Channel::from_shared(format!("http://{endpoint}")).unwrap().connect().await.unwrap();
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.unwrap();
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", MetadataValue::try_from(authorization).unwrap());
    let path = http::uri::PathAndQuery::from_static("/kvatlas.v1.Atlas/Score");
    grpc.unary(request, path, ProstCodec::<M, pb::ScoreResponse>::default()).await.map(|_| ())
}

#[tokio::test]
async fn no_token_id_and_no_secret_is_ever_logged() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| -> PathBuf {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let token = format!("token-{MARK}");
    let digest = ring::digest::digest(&ring::digest::SHA256, token.as_bytes());
    let digest = digest.as_ref().iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    let auth = file(
        "auth.toml",
        &format!(
            "[[identity]]\nname = \"gateway\"\ntoken-sha256 = \"{digest}\"\ntenants = [\"a\"]\nrights = [\"query\"]\n"
        ),
    );
    let secret = "5ec2e7005ec2e7005ec2e7005ec2e700";
    let secrets = file("secrets.toml", &format!("[tenants]\na = \"{secret}\"\n"));
    let seed = "5eed5eed5eed5eed";
    let seed_file = file("seed", seed);
    let password = file("password", &format!("password-{MARK}"));
    let token_file = file("token", &token);
    let path = |path: &PathBuf| path.to_str().unwrap().to_owned();

    let broker = NatsServer::start_with(&["--user", "me", "--pass", &format!("password-{MARK}")]);
    let (auth_path, secrets_path, seed_path) = (path(&auth), path(&secrets), path(&seed_file));
    let (password_path, engine) =
        (path(&password), "model=m,tenant=a,instance=127.0.0.1:8000,zmq=tcp://127.0.0.1:1");
    let mut arguments: Vec<&str> =
        "--log trace --log-format json serve --grpc-listen 127.0.0.1:0 --http-listen 127.0.0.1:0"
            .split(' ')
            .chain(["--engine", engine, "--auth-file", &auth_path, "--tenant-secrets-file", &secrets_path])
            .chain(["--key-seed-file", &seed_path])
            .collect();
    let url = broker.as_ref().map(NatsServer::url);
    if let Some(url) = &url {
        arguments.extend(["--nats", url, "--nats-user", "me", "--nats-password-file", &password_path]);
    }
    let mut log = String::new();
    let server = Server::start(&arguments);
    let up = server.log_until("kvatlas is up", &mut log);
    let up: serde_json::Value = serde_json::from_str(&up).unwrap();
    let endpoint = up["fields"]["grpc"].as_str().unwrap().to_owned();

    let config = ClientConfig { token_file: Some(token_file), ..ClientConfig::new(endpoint.clone()) };
    let client = Client::connect(config).unwrap();
    client.score(question(0)).await.expect("a known caller");
    assert_eq!(client.score(question(70_000)).await.unwrap_err().code(), Code::InvalidArgument);
    let mut elsewhere = question(0);
    elsewhere.prompt.as_mut().unwrap().tenant = "b".into();
    assert_eq!(client.score(elsewhere).await.unwrap_err().code(), Code::PermissionDenied);
    // Wrong and malformed credentials; a message that is none.
    for authorization in [format!("Bearer wrong-{MARK}"), format!("Basic {MARK}"), format!("{MARK} {MARK}")] {
        let refused = raw(&endpoint, &authorization, question(0)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
        assert!(!refused.message().contains(MARK), "{refused}");
    }
    let good = format!("Bearer {token}");
    assert!(raw(&endpoint, &good, format!("no-request-{MARK}")).await.is_err());
    // Files that are broken later are told about, and not quoted.
    for broken in [&auth, &secrets] {
        std::fs::write(broken, format!("[[identity]]\nname = \"{MARK}\"\n[tenants]\na = \"{MARK}\"\n"))
            .unwrap();
        server.log_until("what was taken in last stays in force", &mut log);
    }
    server.stop(&mut log);

    assert!(log.contains("\"TRACE\""), "everything is logged");
    let (id, hex) = (TOKEN_ID.to_string(), format!("{TOKEN_ID:x}"));
    for secret in [MARK, id.as_str(), hex.as_str(), secret, seed, digest.as_str()] {
        let found: Vec<&str> = log.lines().filter(|line| line.contains(secret)).collect();
        assert!(found.is_empty(), "{secret} is in the log: {}", found.join("\n"));
    }
}
