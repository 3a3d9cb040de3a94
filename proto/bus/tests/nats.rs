//! What only a broker brings: it can be absent, restart, refuse us, and drop what a slow reader does not take.

use std::net::TcpListener;
use std::time::Duration;

use bytes::Bytes;
use kvatlas_bus::test_server::NatsServer;
use kvatlas_bus::{
    Bus, BusStats, ClientIdentity, ConnectError, NatsAuth, NatsBus, NatsConfig, NatsTls, Subscription,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::time::{sleep, timeout};

/// Longest wait for something that has to happen; reached only when it does not.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked for.
const POLL: Duration = Duration::from_millis(5);

async fn connect(server: &NatsServer) -> NatsBus {
    NatsBus::connect(NatsConfig::new([server.url()])).await.expect("a running server")
}

async fn publish(bus: &NatsBus, payload: &'static str) {
    bus.publish("a.b".to_owned(), Bytes::from_static(payload.as_bytes())).await.expect("a usable message");
}

/// Waits until the counters say so.
async fn wait_for(bus: &NatsBus, what: &str, reached: impl Fn(BusStats) -> bool) {
    let waited = timeout(PATIENCE, async {
        while !reached(bus.stats()) {
            sleep(POLL).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("{what} did not happen: {:?}", bus.stats()));
}

/// Publishes until something arrives: while a connection is being renewed, messages may be lost.
async fn wait_until_messages_pass(publisher: &NatsBus, subscription: &mut Subscription) {
    let passed = timeout(PATIENCE, async {
        loop {
            publish(publisher, "again").await;
            if let Ok(message) = timeout(Duration::from_millis(50), subscription.recv()).await {
                return message.expect("an open bus");
            }
        }
    });
    assert_eq!(passed.await.expect("messages pass again").payload, "again");
}

/// Greets as a broker does, answers the first probe, and then says nothing for ever.
async fn hang(mut stream: tokio::net::TcpStream) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let info = r#"INFO {"server_id":"x","server_name":"x","version":"2.11.0","go":"","proto":1,"host":"x","port":1,"max_payload":1048576,"headers":true,"client_id":1,"client_ip":"127.0.0.1"}"#;
    stream.write_all(format!("{info}\r\n").as_bytes()).await.unwrap();
    let mut said: Vec<u8> = Vec::new();
    while !said.windows(4).any(|word| word == b"PING") {
        let mut bytes = [0; 1_024];
        let read = stream.read(&mut bytes).await.unwrap();
        assert!(read > 0, "a client says who it is");
        said.extend(&bytes[..read]);
    }
    stream.write_all(b"PONG\r\n").await.unwrap();
    sleep(PATIENCE * 2).await;
}

#[tokio::test]
async fn a_broker_that_hangs_is_left_and_a_connection_tried_again() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    let (came, mut connections) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(hang(stream));
            let _ = came.try_send(());
        }
    });
    let _bus = NatsBus::connect(NatsConfig::new([url])).await.unwrap();
    for connection in 1..=2 {
        let came = timeout(PATIENCE, connections.recv()).await;
        assert_eq!(came, Ok(Some(())), "connection {connection}");
    }
}

#[tokio::test]
async fn subscriptions_work_again_after_the_broker_restarted() {
    let Some(mut server) = NatsServer::start() else { return };
    let (publisher, subscriber) = (connect(&server).await, connect(&server).await);
    let mut subscription = subscriber.subscribe("a.*".to_owned()).await.unwrap();
    wait_until_messages_pass(&publisher, &mut subscription).await;
    for restarts in 1..=2 {
        server.restart();
        for bus in [&publisher, &subscriber] {
            wait_for(bus, "the reconnection", |s| s.connected && s.reconnects == restarts).await;
            assert_eq!(bus.stats().disconnects, restarts);
        }
        wait_until_messages_pass(&publisher, &mut subscription).await;
    }
}

#[tokio::test]
async fn messages_published_while_the_broker_is_away_arrive_in_order_when_it_is_back() {
    let Some(mut server) = NatsServer::start() else { return };
    let bus = connect(&server).await;
    let mut subscription = bus.subscribe("a.b".to_owned()).await.unwrap();
    server.stop();
    wait_for(&bus, "the disconnection", |s| !s.connected).await;
    for payload in ["1", "2", "3"] {
        publish(&bus, payload).await;
    }
    server.restart();
    for payload in ["1", "2", "3"] {
        let message = timeout(PATIENCE, subscription.recv()).await.expect("in time").expect("an open bus");
        assert_eq!(message.payload, payload);
    }
}

#[tokio::test]
async fn publish_gives_up_and_counts_when_the_broker_stays_away() {
    let Some(mut server) = NatsServer::start() else { return };
    let bus = NatsBus::connect(NatsConfig {
        client_messages: 4,
        publish_timeout: Duration::from_millis(20),
        ..NatsConfig::new([server.url()])
    })
    .await
    .unwrap();
    server.stop();
    wait_for(&bus, "the disconnection", |s| !s.connected).await;
    for _ in 0..7 {
        publish(&bus, "x").await;
    }
    let stats = bus.stats();
    assert_eq!((stats.published, stats.abandoned, stats.refused), (4, 3, 0));
    wait_for(&bus, "a failed attempt", |s| s.failed_reconnects > 0).await;
    server.restart();
    wait_for(&bus, "the reconnection", |s| s.connected).await;
    bus.flush().await.unwrap();
}

#[tokio::test]
async fn a_subscription_made_while_the_broker_is_away_is_in_force_when_it_is_back() {
    let Some(mut server) = NatsServer::start() else { return };
    let (publisher, subscriber) = (connect(&server).await, connect(&server).await);
    server.stop();
    wait_for(&subscriber, "the disconnection", |s| !s.connected).await;
    let mut subscription =
        subscriber.subscribe("a.*".to_owned()).await.expect("no error: the broker is only away");
    server.restart();
    wait_until_messages_pass(&publisher, &mut subscription).await;
}

#[tokio::test]
async fn a_dropped_subscription_is_gone_at_the_broker() {
    let Some(server) = NatsServer::start() else { return };
    let bus = connect(&server).await;
    let observer = async_nats::connect(server.url()).await.unwrap();
    let is_listened_to = || async {
        let request = async_nats::Request::new().timeout(Some(Duration::from_millis(50)));
        let outcome = observer.send_request("a.b", request).await;
        outcome.expect_err("nobody answers").kind() != async_nats::RequestErrorKind::NoResponders
    };
    let subscription = bus.subscribe("a.*".to_owned()).await.unwrap();
    assert!(is_listened_to().await);
    drop(subscription);
    let gone = timeout(PATIENCE, async { while is_listened_to().await {} });
    gone.await.expect("the broker stops delivering");
}

#[tokio::test]
async fn a_slow_subscriber_loses_messages_that_are_counted_and_holds_nobody_back() {
    let Some(server) = NatsServer::start() else { return };
    let publisher = connect(&server).await;
    let config = NatsConfig { subscription_messages: 2, ..NatsConfig::new([server.url()]) };
    let subscriber = NatsBus::connect(config).await.unwrap();
    let mut slow = subscriber.subscribe("a.b".to_owned()).await.unwrap();
    for payload in ["1", "2", "3", "4", "5"] {
        publish(&publisher, payload).await;
    }
    wait_for(&subscriber, "the loss", |s| s.dropped == 3).await;
    for payload in ["1", "2"] {
        assert_eq!(slow.recv().await.unwrap().payload, payload);
    }
    publish(&publisher, "6").await;
    assert_eq!(timeout(PATIENCE, slow.recv()).await.unwrap().unwrap().payload, "6");
}

#[tokio::test]
async fn a_broker_that_is_not_there_is_named_with_what_to_check() {
    // Bound and never accepted from by a NATS server, so nobody else can answer there.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    for address in [silent.local_addr().unwrap(), closed] {
        let config = NatsConfig {
            connect_timeout: Duration::from_millis(100),
            ..NatsConfig::new([format!("nats://me:hunter2@{address}")])
        };
        let error = NatsBus::connect(config).await.err().expect("nobody is there");
        assert!(matches!(error, ConnectError::Unreachable { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(&format!("nats://{address}")) && text.contains("check"), "{text}");
        assert!(!text.contains("hunter2") && !text.contains('\n'), "{text}");
    }
}

#[tokio::test]
async fn wrong_credentials_are_refused_without_being_shown() {
    let Some(server) = NatsServer::start_with(&["--user", "me", "--pass", "hunter2"]) else { return };
    let with = |auth| NatsConfig { auth, ..NatsConfig::new([server.url()]) };
    let password =
        |password: &str| NatsAuth::UserPassword { user: "me".to_owned(), password: password.to_owned() };
    for auth in [NatsAuth::None, password("wrong-secret"), NatsAuth::Token("wrong-secret".to_owned())] {
        let error = NatsBus::connect(with(auth)).await.err().expect("refused");
        assert!(matches!(error, ConnectError::Unauthorized { .. }), "{error:?}");
        assert!(!error.to_string().contains("wrong-secret"), "{error}");
    }
    let bus = NatsBus::connect(with(password("hunter2"))).await.expect("the right password");
    assert_eq!(bus.describe(), server.url());
}

#[tokio::test]
async fn a_token_is_accepted() {
    let Some(server) = NatsServer::start_with(&["--auth", "hunter2"]) else { return };
    let auth = NatsAuth::Token("hunter2".to_owned());
    let bus = NatsBus::connect(NatsConfig { auth, ..NatsConfig::new([server.url()]) })
        .await
        .expect("the right token");
    assert!(bus.stats().connected);
}

#[tokio::test]
async fn a_publish_that_the_broker_forbids_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("server.conf");
    let user = "{ user: me, password: hunter2, permissions: { publish: \"allowed.>\" } }";
    std::fs::write(&file, format!("authorization {{ users = [ {user} ] }}")).unwrap();
    let Some(server) = NatsServer::start_with(&["-c", file.to_str().unwrap()]) else { return };
    let auth = NatsAuth::UserPassword { user: "me".to_owned(), password: "hunter2".to_owned() };
    let bus = NatsBus::connect(NatsConfig { auth, ..NatsConfig::new([server.url()]) }).await.unwrap();
    publish(&bus, "not allowed").await;
    wait_for(&bus, "the report", |s| s.broker_errors == 1).await;
    assert!(bus.stats().connected, "the connection stays");
}

#[tokio::test]
async fn an_nkey_seed_file_is_accepted_and_another_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let (known, unknown) = (nkeys::KeyPair::new_user(), nkeys::KeyPair::new_user());
    let users = format!("authorization {{ users = [ {{ nkey: {} }} ] }}", known.public_key());
    let Some(server) = NatsServer::start_with(&["-c", file("server.conf", &users).to_str().unwrap()]) else {
        return;
    };
    let connect = |name: &str, key: &nkeys::KeyPair| {
        let auth = NatsAuth::NkeySeedFile(file(name, &format!("{}\n", key.seed().unwrap())));
        NatsBus::connect(NatsConfig { auth, ..NatsConfig::new([server.url()]) })
    };
    assert!(connect("known", &known).await.expect("the right seed").stats().connected);
    let error = connect("unknown", &unknown).await.err().expect("refused");
    assert!(matches!(error, ConnectError::Unauthorized { .. }), "{error:?}");
}

#[tokio::test]
async fn a_rotated_secret_is_used_at_the_next_connection() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let allow = |key: &nkeys::KeyPair, password: &str| {
        let users = format!("{{ nkey: {} }}, {{ user: me, password: \"{password}\" }}", key.public_key());
        std::fs::write(path("server.conf"), format!("authorization {{ users = [ {users} ] }}")).unwrap();
    };
    let give = |key: &nkeys::KeyPair, password: &str| {
        std::fs::write(path("seed"), key.seed().unwrap()).unwrap();
        std::fs::write(path("password"), format!("{password}\n")).unwrap();
    };
    let (old, new) = (nkeys::KeyPair::new_user(), nkeys::KeyPair::new_user());
    allow(&old, "old-password");
    give(&old, "old-password");
    let configuration = path("server.conf");
    let Some(mut server) = NatsServer::start_with(&["-c", configuration.to_str().unwrap()]) else { return };
    let by_password = NatsAuth::UserPasswordFile { user: "me".to_owned(), password_file: path("password") };
    let mut buses = Vec::new();
    for auth in [NatsAuth::NkeySeedFile(path("seed")), by_password] {
        buses.push(NatsBus::connect(NatsConfig { auth, ..NatsConfig::new([server.url()]) }).await.unwrap());
    }
    allow(&new, "new-password");
    server.restart();
    for bus in &buses {
        wait_for(bus, "a refusal of the old secret", |s| s.failed_reconnects > 0 || s.broker_errors > 0)
            .await;
    }
    give(&new, "new-password");
    for bus in &buses {
        wait_for(bus, "the reconnection with the new secret", |s| s.connected).await;
        bus.flush().await.unwrap();
    }
    let mut subscription = buses[0].subscribe("a.b".to_owned()).await.unwrap();
    wait_until_messages_pass(&buses[1], &mut subscription).await;
}

/// A CA, a server certificate for the loopback address and a client certificate, as PEM files.
struct Certificates {
    folder: tempfile::TempDir,
}

impl Certificates {
    fn new() -> Self {
        let certificates = Self { folder: tempfile::tempdir().unwrap() };
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        certificates.write("ca.pem", &ca.self_signed(&key).unwrap().pem());
        let issuer = Issuer::new(ca, key);
        for name in ["server", "client"] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
            certificates.write(&format!("{name}.pem"), &params.signed_by(&key, &issuer).unwrap().pem());
            certificates.write(&format!("{name}.key"), &key.serialize_pem());
        }
        certificates
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.path(name), content).unwrap();
    }

    fn server_arguments(&self) -> Vec<String> {
        let file = |name: &str| self.path(name).to_str().unwrap().to_owned();
        let options = [("--tlscert", "server.pem"), ("--tlskey", "server.key"), ("--tlscacert", "ca.pem")];
        let files = options.into_iter().flat_map(|(option, name)| [option.to_owned(), file(name)]);
        ["--tls".to_owned(), "--tlsverify".to_owned()].into_iter().chain(files).collect()
    }
}

#[tokio::test]
async fn a_broker_that_demands_certificates_gets_ours_and_is_trusted_only_with_its_authority() {
    let certificates = Certificates::new();
    let arguments = certificates.server_arguments();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let Some(server) = NatsServer::start_with(&arguments) else { return };
    let ca_file = Some(certificates.path("ca.pem"));
    let identity = || {
        let (certificate_file, key_file) = (certificates.path("client.pem"), certificates.path("client.key"));
        Some(ClientIdentity { certificate_file, key_file })
    };
    let connect = |ca_file, client_identity| {
        let tls = NatsTls { required: true, ca_file, client_identity };
        NatsBus::connect(NatsConfig { tls, ..NatsConfig::new([server.url()]) })
    };
    let bus = connect(ca_file.clone(), identity()).await.expect("both sides know each other");
    let mut subscription = bus.subscribe("a.b".to_owned()).await.unwrap();
    publish(&bus, "encrypted").await;
    let message = timeout(PATIENCE, subscription.recv()).await.expect("in time").expect("an open bus");
    assert_eq!(message.payload, "encrypted");

    let other_authority = Certificates::new();
    let distrusted = connect(Some(other_authority.path("ca.pem")), identity()).await;
    assert!(matches!(distrusted, Err(ConnectError::Tls { .. })));
    // TLS 1.3 refuses a client only after the handshake, which can look like a plain disconnection.
    let anonymous = connect(ca_file, None).await;
    assert!(matches!(anonymous, Err(ConnectError::Tls { .. } | ConnectError::Unreachable { .. })));
}

#[tokio::test]
async fn a_broker_without_tls_is_refused_where_tls_is_required() {
    let Some(server) = NatsServer::start() else { return };
    let tls = NatsTls { required: true, ..NatsTls::default() };
    let config = NatsConfig { tls, ..NatsConfig::new([server.url()]) };
    let error = NatsBus::connect(config).await.err().expect("refused");
    assert!(matches!(error, ConnectError::Tls { .. } | ConnectError::Unreachable { .. }), "{error:?}");
}
