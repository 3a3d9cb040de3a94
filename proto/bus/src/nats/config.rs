//! What a NATS connection needs to be told, and why a connection could not be made.
//!
//! Secrets are read here and given to the client; nothing here prints them, not even in `Debug` or in an error.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_nats::{AuthError, ConnectErrorKind, ConnectOptions, ServerAddr};

use super::credentials;
use crate::DEFAULT_PUBLISH_TIMEOUT;

/// Most brokers to start from; the client learns the others of a cluster by itself.
const MAX_URLS: usize = 64;

/// Where the brokers are and how to talk to them.
#[derive(Clone)]
pub struct NatsConfig {
    /// `nats://HOST:PORT` or `tls://HOST:PORT`; the port defaults to 4222. Several for a cluster. Credentials belong in
    /// `auth`; those in a URL work too, but other programs may show them.
    pub urls: Vec<String>,
    /// How the broker's monitoring names this connection.
    pub client_name: String,
    /// Longest wait for each broker at start and at each reconnection.
    pub connect_timeout: Duration,
    /// Longest wait of a publish for the connection to take the message.
    pub publish_timeout: Duration,
    /// Who this client is.
    pub auth: NatsAuth,
    /// Encryption.
    pub tls: NatsTls,
    /// Messages that one subscription holds before further ones are lost.
    pub subscription_messages: usize,
    /// Commands (mostly publishes) that wait for the connection before publishers wait.
    pub client_messages: usize,
}

/// How a client proves who it is. Files are read anew for each connection, so that what is rotated is in force with the next
/// one.
#[derive(Clone, Default)]
pub enum NatsAuth {
    /// Not at all, or by the TLS certificate.
    #[default]
    None,
    /// By a user name and password.
    UserPassword {
        /// The name.
        user: String,
        /// The password.
        password: String,
    },
    /// By a user name and the password in a file.
    UserPasswordFile {
        /// The name.
        user: String,
        /// The file.
        password_file: PathBuf,
    },
    /// By a token.
    Token(String),
    /// By the JWT and seed in a `.creds` file.
    CredentialsFile(PathBuf),
    /// By the nkey whose seed is in a file.
    NkeySeedFile(PathBuf),
}

/// Encryption of the connection.
#[derive(Clone, Debug, Default)]
pub struct NatsTls {
    /// Refuse a broker without TLS. (A broker that demands TLS gets it anyway.)
    pub required: bool,
    /// PEM file with the authorities to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// This client's own certificate, where the broker demands one.
    pub client_identity: Option<ClientIdentity>,
}

/// A certificate and its private key.
#[derive(Clone, Debug)]
pub struct ClientIdentity {
    /// PEM file with the certificate chain.
    pub certificate_file: PathBuf,
    /// PEM file with the key.
    pub key_file: PathBuf,
}

/// The failures of [`NatsBus::connect`](super::NatsBus::connect). Each is one line without credentials.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is no broker to connect to, or there are too many.
    #[error("{given} broker URLs are given: give 1 to {MAX_URLS}, such as nats://127.0.0.1:4222")]
    UrlCount {
        /// How many there are.
        given: usize,
    },
    /// A URL is not one of a NATS broker.
    #[error("{url:?} is not the URL of a NATS broker ({reason}): write nats://HOST:PORT or tls://HOST:PORT")]
    InvalidUrl {
        /// The URL without its credentials.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that the configuration names cannot be used.
    #[error("cannot use the {what} {path:?}: {reason}; check the path, its permissions and its content")]
    File {
        /// What the file is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
    /// Nobody answered as a NATS broker does.
    #[error(
        "no NATS broker reachable at {servers} ({reason}): check that it runs there and that this host may connect"
    )]
    Unreachable {
        /// Who was tried.
        servers: String,
        /// What happened.
        reason: String,
    },
    /// The broker does not accept who we are.
    #[error(
        "the NATS broker at {servers} refuses this client ({reason}): check the user, token, credentials or seed"
    )]
    Unauthorized {
        /// Who was tried.
        servers: String,
        /// What happened.
        reason: String,
    },
    /// No encrypted connection could be agreed on.
    #[error(
        "no TLS connection to the NATS broker at {servers} ({reason}): check its certificate, the CA file and ours"
    )]
    Tls {
        /// Who was tried.
        servers: String,
        /// What happened.
        reason: String,
    },
}

// === impl NatsConfig ===

impl NatsConfig {
    /// A broker in the same cluster answers within milliseconds; a name look-up that fails takes seconds.
    pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
    /// Seconds of slack at thousands of frames a second. More than the in-process bus has, because here nobody waits
    /// for a slow subscriber.
    pub const DEFAULT_SUBSCRIPTION_MESSAGES: usize = 16_384;
    /// Bridges a short reconnection; the publisher's own queue stands before it.
    pub const DEFAULT_CLIENT_MESSAGES: usize = 2048;

    /// The defaults, for brokers without authentication.
    pub fn new<U: Into<String>>(urls: impl IntoIterator<Item = U>) -> Self {
        Self {
            urls: urls.into_iter().map(Into::into).collect(),
            client_name: "kvatlas".to_owned(),
            connect_timeout: Self::DEFAULT_CONNECT_TIMEOUT,
            publish_timeout: DEFAULT_PUBLISH_TIMEOUT,
            auth: NatsAuth::None,
            tls: NatsTls::default(),
            subscription_messages: Self::DEFAULT_SUBSCRIPTION_MESSAGES,
            client_messages: Self::DEFAULT_CLIENT_MESSAGES,
        }
    }

    /// The parsed URLs.
    pub(super) fn servers(&self) -> Result<Vec<ServerAddr>, ConnectError> {
        if self.urls.is_empty() || self.urls.len() > MAX_URLS {
            return Err(ConnectError::UrlCount { given: self.urls.len() });
        }
        let parse = |url: &String| {
            let refuse = |reason: String| ConnectError::InvalidUrl { url: without_credentials(url), reason };
            let server: ServerAddr = url.parse().map_err(|error: io::Error| refuse(error.to_string()))?;
            if server.is_websocket() {
                return Err(refuse("web sockets are not supported".to_owned()));
            }
            if server.host().is_empty() {
                return Err(refuse("it names no host".to_owned()));
            }
            Ok(server)
        };
        self.urls.iter().map(parse).collect()
    }

    /// The client's options, with every named file checked, so that a wrong path is an error that names it.
    pub(super) async fn options(&self) -> Result<ConnectOptions, ConnectError> {
        // Once before the first connection, so that a wrong file is an error that names it.
        self.auth.present(&[])?;
        let auth = self.auth.clone();
        let options = match auth {
            NatsAuth::None => ConnectOptions::new(),
            auth => ConnectOptions::with_auth_callback(move |nonce| {
                let auth = auth.clone();
                async move {
                    // Reading a file may wait for a disk.
                    let presented = tokio::task::spawn_blocking(move || auth.present(&nonce)).await;
                    presented.map_err(AuthError::new)?.map_err(AuthError::new)
                }
            }),
        };
        let mut options = options
            .name(&self.client_name)
            .connection_timeout(self.connect_timeout)
            // A channel cannot hold zero messages; one is the nearest thing that works.
            .subscription_capacity(self.subscription_messages.max(1))
            .client_capacity(self.client_messages.max(1))
            .require_tls(self.tls.required);
        if let Some(ca_file) = &self.tls.ca_file {
            check_readable("CA file", ca_file).await?;
            options = options.add_root_certificates(ca_file.clone());
        }
        if let Some(ClientIdentity { certificate_file, key_file }) = &self.tls.client_identity {
            check_readable("client certificate", certificate_file).await?;
            check_readable("client key", key_file).await?;
            options = options.add_client_certificate(certificate_file.clone(), key_file.clone());
        }
        Ok(options)
    }
}

impl fmt::Debug for NatsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let urls: Vec<String> = self.urls.iter().map(|url| without_credentials(url)).collect();
        f.debug_struct("NatsConfig")
            .field("urls", &urls)
            .field("client_name", &self.client_name)
            .field("connect_timeout", &self.connect_timeout)
            .field("publish_timeout", &self.publish_timeout)
            .field("auth", &self.auth)
            .field("tls", &self.tls)
            .field("subscription_messages", &self.subscription_messages)
            .field("client_messages", &self.client_messages)
            .finish()
    }
}

// === impl NatsAuth ===

impl NatsAuth {
    /// What to send to a broker that asks for a signature of `nonce`.
    fn present(&self, nonce: &[u8]) -> Result<async_nats::Auth, ConnectError> {
        let mut auth = async_nats::Auth::new();
        match self {
            Self::None => {}
            Self::UserPassword { user, password } => {
                (auth.username, auth.password) = (Some(user.clone()), Some(password.clone()));
            }
            Self::UserPasswordFile { user, password_file } => {
                let password = credentials::password(password_file)?;
                (auth.username, auth.password) = (Some(user.clone()), Some(password));
            }
            Self::Token(token) => auth.token = Some(token.clone()),
            Self::CredentialsFile(path) => {
                let (jwt, signature) = credentials::of_credentials_file(path, nonce)?;
                (auth.jwt, auth.signature) = (Some(jwt), Some(signature));
            }
            Self::NkeySeedFile(path) => {
                let (nkey, signature) = credentials::of_seed_file(path, nonce)?;
                (auth.nkey, auth.signature) = (Some(nkey), Some(signature));
            }
        }
        Ok(auth)
    }
}

impl fmt::Debug for NatsAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::UserPassword { user, .. } => write!(f, "UserPassword({user:?})"),
            Self::UserPasswordFile { user, password_file } => {
                write!(f, "UserPasswordFile({user:?}, {password_file:?})")
            }
            Self::Token(_) => f.write_str("Token"),
            Self::CredentialsFile(path) => write!(f, "CredentialsFile({path:?})"),
            Self::NkeySeedFile(path) => write!(f, "NkeySeedFile({path:?})"),
        }
    }
}

// === impl ConnectError ===

impl ConnectError {
    /// Turns the client's error into what the user can do about it.
    pub(super) fn explain(error: &async_nats::ConnectError, servers: String) -> Self {
        let reason = error.to_string().replace(['\n', '\r'], "; ");
        match error.kind() {
            ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                Self::Unauthorized { servers, reason }
            }
            ConnectErrorKind::Tls => Self::Tls { servers, reason },
            // The TLS library's failures arrive as IO errors of this kind.
            ConnectErrorKind::Io if io_kind(error) == Some(io::ErrorKind::InvalidData) => {
                Self::Tls { servers, reason }
            }
            ConnectErrorKind::ServerParse
            | ConnectErrorKind::Dns
            | ConnectErrorKind::TimedOut
            | ConnectErrorKind::Io
            | ConnectErrorKind::MaxReconnects => Self::Unreachable { servers, reason },
        }
    }
}

/// `SCHEME://USER:PASSWORD@HOST` without the part up to the last `@` of the authority. Works on text that is no URL,
/// because it is needed most for those.
fn without_credentials(url: &str) -> String {
    let start = url.find("://").map_or(0, |at| at + 3);
    let (scheme, rest) = url.split_at(start);
    let shown = rest.rfind('@').map_or(rest, |at| &rest[at + 1..]);
    format!("{scheme}{shown}")
}

async fn check_readable(what: &'static str, path: &Path) -> Result<(), ConnectError> {
    match tokio::fs::File::open(path).await {
        Ok(_) => Ok(()),
        Err(error) => Err(ConnectError::File { what, path: path.to_owned(), reason: error.to_string() }),
    }
}

fn io_kind(error: &async_nats::ConnectError) -> Option<io::ErrorKind> {
    let source = std::error::Error::source(error)?;
    source.downcast_ref::<io::Error>().map(io::Error::kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let mut config = NatsConfig::new(["nats://me:hunter2@broker:4222"]);
        for auth in [
            NatsAuth::UserPassword { user: "me".to_owned(), password: "hunter2".to_owned() },
            NatsAuth::Token("hunter2".to_owned()),
        ] {
            config.auth = auth;
            let shown = format!("{config:?}");
            assert!(!shown.contains("hunter2") && shown.contains("nats://broker:4222"), "{shown}");
        }
    }

    #[test]
    fn a_wrong_url_is_named_without_its_credentials() {
        for url in
            ["nats://me:hunter2@:4222", "http://me:hunter2@h", "nats://me:hunter2@h:99999", "ws://hunter2@h"]
        {
            let error = NatsConfig::new([url]).servers().unwrap_err().to_string();
            assert!(!error.contains("hunter2") && error.contains("NATS broker"), "{error}");
        }
        assert!(matches!(
            NatsConfig::new(Vec::<String>::new()).servers(),
            Err(ConnectError::UrlCount { given: 0 })
        ));
    }

    #[test]
    fn credentials_are_cut_from_text_that_is_no_url() {
        for (url, shown) in [
            ("nats://a:b@h:1", "nats://h:1"),
            ("a:b@h", "h"),
            ("nats://a:p@ss@h", "nats://h"),
            ("nats://a:p/x@h", "nats://h"),
            ("nats://h:1", "nats://h:1"),
            ("", ""),
        ] {
            assert_eq!(without_credentials(url), shown, "{url}");
        }
    }

    #[tokio::test]
    async fn a_missing_file_is_named() {
        let missing = PathBuf::from("/nonexistent/kvatlas");
        let named = |error: ConnectError| error.to_string().contains("/nonexistent/kvatlas");
        for auth in [NatsAuth::CredentialsFile(missing.clone()), NatsAuth::NkeySeedFile(missing.clone())] {
            let config = NatsConfig { auth, ..NatsConfig::new(["nats://h"]) };
            assert!(named(config.options().await.unwrap_err()));
        }
        let tls = NatsTls { ca_file: Some(missing), ..NatsTls::default() };
        let config = NatsConfig { tls, ..NatsConfig::new(["nats://h"]) };
        assert!(named(config.options().await.unwrap_err()));
    }

    #[tokio::test]
    async fn a_credentials_file_without_credentials_is_refused_without_quoting_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("user.creds");
        std::fs::write(&path, "hunter2").unwrap();
        let config = NatsConfig { auth: NatsAuth::CredentialsFile(path), ..NatsConfig::new(["nats://h"]) };
        let error = config.options().await.unwrap_err().to_string();
        assert!(error.contains("user.creds") && !error.contains("hunter2"), "{error}");
    }
}
