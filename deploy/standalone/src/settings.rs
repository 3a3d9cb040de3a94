//! Settings of the long-running roles: command line, then environment, then a TOML file, then defaults.
//!
//! Each struct is at once a group of flags and a table of the file, so a setting has one name and one sentence of
//! documentation. A setting that is wrong is refused at start with a message that says what to change.

mod store;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use kvatlas_bus::{ClientIdentity, NatsAuth, NatsConfig, NatsTls};
use kvatlas_index::TenantKeys;
use kvatlas_proto::KeySeed;
use kvatlas_proto::subject::Subjects;
use serde::Deserialize;

mod cluster;

pub use cluster::{ClusterSettings, Ownership};

use crate::engine::EngineSpec;
use crate::failure::Failure;

mod access;

pub use access::{AuthSettings, LimitSettings, TlsSettings};
pub use store::StoreSettings;

/// Where the gRPC service listens if nothing else is said: loopback, where nobody else's network is.
pub const DEFAULT_GRPC: &str = "127.0.0.1:7460";
/// Where metrics and health checks are served if nothing else is said.
pub const DEFAULT_HTTP: &str = "127.0.0.1:7461";

/// All settings of `serve` and `shim`.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// TOML file with settings; what the command line or the environment says wins over it.
    #[arg(long, env = "KVATLAS_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Engine to follow, as KEY=VALUE,...; may be given several times. Keys: model, instance, zmq (required); adapter
    /// (auto, vllm, sglang or envelope), replay, topic, tenant, block-size, data-parallel-size, attach (connect or
    /// bind), removal (per-copy or last-copy), store-only-ttl-s.
    #[arg(long = "engine", env = "KVATLAS_ENGINE", value_delimiter = ';', value_name = "KEY=VALUE,...")]
    #[serde(rename = "engine")]
    pub engines: Vec<EngineSpec>,
    #[command(flatten)]
    pub keys: KeySettings,
    #[command(flatten)]
    pub nats: NatsSettings,
    #[command(flatten)]
    pub cluster: ClusterSettings,
    #[command(flatten)]
    pub shim: ShimSettings,
    #[command(flatten)]
    pub server: ServerSettings,
    #[command(flatten)]
    pub tls: TlsSettings,
    #[command(flatten)]
    pub auth: AuthSettings,
    #[command(flatten)]
    pub limits: LimitSettings,
    #[command(flatten)]
    #[serde(rename = "checkpoint-store")]
    pub store: StoreSettings,
}

/// `[keys]`: how block keys are computed.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct KeySettings {
    /// File with a secret key seed, 16 hex digits. Shims and servers of one deployment need the same. Default: the
    /// published seed.
    #[arg(long, env = "KVATLAS_KEY_SEED_FILE", value_name = "FILE")]
    pub key_seed_file: Option<PathBuf>,
    /// TOML file with secrets of tenants that get key spaces of their own: [tenants], name = "32 or more hex digits". A server
    /// reads it again when it changes; a shim needs its own tenant's and a restart. Default: all have the seed.
    #[arg(long, env = "KVATLAS_TENANT_SECRETS_FILE", value_name = "FILE")]
    pub tenant_secrets_file: Option<PathBuf>,
}

/// `[nats]`: the broker. Without a URL the bus is in-process.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct NatsSettings {
    /// Broker, for example nats://127.0.0.1:4222; may be given several times for a cluster. Default: no broker, one process.
    #[arg(long = "nats", env = "KVATLAS_NATS", value_delimiter = ',', value_name = "URL")]
    pub url: Vec<BrokerUrl>,
    /// Name of this deployment in NATS subjects. Default: kvatlas.
    #[arg(long, env = "KVATLAS_SUBJECT_PREFIX", value_name = "PREFIX")]
    pub subject_prefix: Option<String>,
    /// NATS credentials file (JWT and key).
    #[arg(long = "nats-credentials-file", env = "KVATLAS_NATS_CREDENTIALS_FILE", value_name = "FILE")]
    pub credentials_file: Option<PathBuf>,
    /// File with an NKey seed.
    #[arg(long = "nats-nkey-file", env = "KVATLAS_NATS_NKEY_FILE", value_name = "FILE")]
    pub nkey_file: Option<PathBuf>,
    /// NATS user name; needs --nats-password-file.
    #[arg(long = "nats-user", env = "KVATLAS_NATS_USER", value_name = "NAME")]
    pub user: Option<String>,
    /// File with the NATS user's password.
    #[arg(long = "nats-password-file", env = "KVATLAS_NATS_PASSWORD_FILE", value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// PEM file with the authorities to trust for the broker's certificate instead of the system's. Requires TLS.
    #[arg(long = "nats-ca-file", env = "KVATLAS_NATS_CA_FILE", value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// PEM file with this client's certificate; needs --nats-key-file. Requires TLS.
    #[arg(long = "nats-certificate-file", env = "KVATLAS_NATS_CERTIFICATE_FILE", value_name = "FILE")]
    pub certificate_file: Option<PathBuf>,
    /// PEM file with this client's private key.
    #[arg(long = "nats-key-file", env = "KVATLAS_NATS_KEY_FILE", value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

/// URL of a broker. It can hold credentials, so it is not shown.
#[derive(Clone, Deserialize, PartialEq, Eq)]
#[serde(transparent)]
pub struct BrokerUrl(String);

/// `[shim]`: what is common to all followed engines.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ShimSettings {
    /// Directory in which each followed engine's blocks are written down, so that they survive a restart of this process if
    /// the engine did not restart too. Used for engines with a replay socket. The files can hold token ids. Default: none.
    #[arg(long, env = "KVATLAS_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// `[server]`: the index server.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ServerSettings {
    /// Address of the gRPC service. Default: 127.0.0.1:7460; port 0 picks a free one.
    #[arg(long, env = "KVATLAS_GRPC_LISTEN", value_name = "IP:PORT")]
    pub grpc_listen: Option<SocketAddr>,
    /// Address of metrics and health checks (HTTP), for the shim too. Default: 127.0.0.1:7461; port 0 picks a free one.
    #[arg(long, env = "KVATLAS_HTTP_LISTEN", value_name = "IP:PORT")]
    pub http_listen: Option<SocketAddr>,
    /// Worth of a block per tier relative to the GPU, 0 to 1, as TIER=WEIGHT; may be given several times. Default: gpu=1
    /// cpu=0.8 ssd=0.5 remote=0.3.
    #[arg(long = "weight", env = "KVATLAS_WEIGHT", value_delimiter = ',', value_name = "TIER=WEIGHT")]
    #[serde(rename = "weight")]
    pub weights: Vec<TierWeight>,
    /// TOML file with profiles of models and engines, speeds of tiers and links, and who stands where, for scores and plans in
    /// milliseconds; may be given several times. Default: those that come with kvatlas.
    #[arg(long, env = "KVATLAS_COST_PROFILES", value_delimiter = ',', value_name = "FILE")]
    pub cost_profiles: Vec<PathBuf>,
    /// Most blocks held, counted once per owner. Default: 67108864 (about 4 GB).
    #[arg(long, env = "KVATLAS_MAX_BLOCKS", value_name = "BLOCKS")]
    pub max_blocks: Option<usize>,
    /// File in which the index writes down what it holds, so that a restart costs what has changed since; short for
    /// --checkpoint-store file:FILE. Default: none.
    #[arg(long, env = "KVATLAS_CHECKPOINT_FILE", value_name = "FILE")]
    pub checkpoint_file: Option<PathBuf>,
    /// The same somewhere else: nats://BUCKET/NAME (an object store in the broker), redis://HOST:PORT or rediss:// (TLS), or
    /// redis-cluster://HOST:PORT,... or redis-cluster+tls://. Redis and Valkey take ?prefix=kvatlas&name=index&ttl-s=86400.
    #[arg(long, env = "KVATLAS_CHECKPOINT_STORE", value_name = "URL")]
    pub checkpoint_store: Option<String>,
    /// Seconds between two checkpoints. Default: 30.
    #[arg(long, env = "KVATLAS_CHECKPOINT_INTERVAL_S", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub checkpoint_interval_s: Option<u64>,
}

/// Worth of one block on a tier.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(try_from = "String")]
pub struct TierWeight {
    /// Lower-case tier name.
    pub tier: String,
    /// 0 to 1.
    pub weight: f64,
}

/// How logs are written.
#[derive(Args, Clone, Debug)]
pub struct LogSettings {
    /// What is logged: a level (error, warn, info, debug, trace) or a filter such as warn,kvatlas_shim=debug.
    #[arg(
        long,
        env = "KVATLAS_LOG",
        default_value = "info,async_nats=warn,zeromq=warn",
        global = true,
        value_name = "FILTER"
    )]
    pub log: String,
    /// Form of the log lines on standard error.
    #[arg(long, env = "KVATLAS_LOG_FORMAT", value_enum, default_value = "text", global = true)]
    pub log_format: LogFormat,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

// === impl Settings ===

impl Settings {
    /// Completes these settings from the file they name.
    pub fn load(self) -> Result<Self, Failure> {
        let Some(path) = &self.config else { return Ok(self) };
        let text = read_text(path)?;
        let file: Self = toml::from_str(&text).map_err(|error| Failure::config(path, error.message()))?;
        Ok(self.or(file))
    }

    fn or(self, file: Self) -> Self {
        Self {
            config: self.config,
            engines: or_list(self.engines, file.engines),
            keys: KeySettings {
                key_seed_file: self.keys.key_seed_file.or(file.keys.key_seed_file),
                tenant_secrets_file: self.keys.tenant_secrets_file.or(file.keys.tenant_secrets_file),
            },
            nats: self.nats.or(file.nats),
            cluster: self.cluster.or(file.cluster),
            shim: ShimSettings { state_dir: self.shim.state_dir.or(file.shim.state_dir) },
            server: self.server.or(file.server),
            tls: self.tls.or(file.tls),
            auth: self.auth.or(file.auth),
            limits: self.limits.or(file.limits),
            store: self.store.or(file.store),
        }
    }
}

// === impl KeySettings ===

impl KeySettings {
    /// The seed that the deployment uses.
    pub fn seed(&self) -> Result<KeySeed, Failure> {
        let Some(path) = &self.key_seed_file else { return Ok(KeySeed::PUBLISHED) };
        let text = read_text(path)?;
        let seed = text.trim();
        let valid = seed.len() == 16 && seed.bytes().all(|byte| byte.is_ascii_hexdigit());
        match u64::from_str_radix(seed, 16) {
            Ok(seed) if valid => Ok(KeySeed::secret(seed)),
            // The content is a secret, so it is not shown.
            _ => {
                Err(Failure::config(path, "a key seed is 16 hex digits; make one with: openssl rand -hex 8"))
            }
        }
    }

    /// How each tenant's keys are computed.
    pub fn tenants(&self) -> Result<TenantKeys, Failure> {
        let seed = self.seed()?;
        match &self.tenant_secrets_file {
            None => Ok(TenantKeys::new(seed)),
            Some(path) => TenantKeys::read(path, seed).map_err(|error| Failure::usage(error.to_string())),
        }
    }
}

// === impl NatsSettings ===

impl NatsSettings {
    fn or(self, file: Self) -> Self {
        Self {
            url: or_list(self.url, file.url),
            subject_prefix: self.subject_prefix.or(file.subject_prefix),
            credentials_file: self.credentials_file.or(file.credentials_file),
            nkey_file: self.nkey_file.or(file.nkey_file),
            user: self.user.or(file.user),
            password_file: self.password_file.or(file.password_file),
            ca_file: self.ca_file.or(file.ca_file),
            certificate_file: self.certificate_file.or(file.certificate_file),
            key_file: self.key_file.or(file.key_file),
        }
    }

    /// Subjects of this deployment.
    pub fn subjects(&self) -> Result<Subjects, Failure> {
        match &self.subject_prefix {
            None => Ok(Subjects::default()),
            Some(prefix) => Subjects::new(prefix).map_err(|error| Failure::usage(error.to_string())),
        }
    }

    /// How to connect to the broker, if there is one.
    pub fn config(&self, role: &str) -> Result<Option<NatsConfig>, Failure> {
        let auth = self.auth()?;
        let tls = self.tls()?;
        if self.url.is_empty() {
            let secured = !matches!(auth, NatsAuth::None) || tls.required;
            return if secured {
                Err(Failure::usage("broker credentials are given but no broker: add --nats URL"))
            } else {
                Ok(None)
            };
        }
        let client_name = format!("kvatlas-{role}");
        let urls = self.url.iter().map(|url| url.0.clone());
        Ok(Some(NatsConfig { client_name, auth, tls, ..NatsConfig::new(urls) }))
    }

    fn auth(&self) -> Result<NatsAuth, Failure> {
        match (&self.credentials_file, &self.nkey_file, &self.user, &self.password_file) {
            (None, None, None, None) => Ok(NatsAuth::None),
            (Some(file), None, None, None) => Ok(NatsAuth::CredentialsFile(file.clone())),
            (None, Some(file), None, None) => Ok(NatsAuth::NkeySeedFile(file.clone())),
            (None, None, Some(user), Some(file)) => {
                Ok(NatsAuth::UserPasswordFile { user: user.clone(), password_file: file.clone() })
            }
            _ => Err(Failure::usage(
                "give one way to log in to the broker: --nats-credentials-file, --nats-nkey-file, or --nats-user with \
                 --nats-password-file",
            )),
        }
    }

    fn tls(&self) -> Result<NatsTls, Failure> {
        let client_identity = match (&self.certificate_file, &self.key_file) {
            (None, None) => None,
            (Some(certificate), Some(key)) => {
                Some(ClientIdentity { certificate_file: certificate.clone(), key_file: key.clone() })
            }
            _ => return Err(Failure::usage("--nats-certificate-file and --nats-key-file belong together")),
        };
        let required = client_identity.is_some() || self.ca_file.is_some();
        Ok(NatsTls { required, ca_file: self.ca_file.clone(), client_identity })
    }
}

// === impl BrokerUrl ===

impl From<&str> for BrokerUrl {
    fn from(url: &str) -> Self {
        Self(url.to_owned())
    }
}

impl std::fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BrokerUrl")
    }
}

// === impl ServerSettings ===

impl ServerSettings {
    fn or(self, file: Self) -> Self {
        Self {
            grpc_listen: self.grpc_listen.or(file.grpc_listen),
            http_listen: self.http_listen.or(file.http_listen),
            weights: or_list(self.weights, file.weights),
            cost_profiles: or_list(self.cost_profiles, file.cost_profiles),
            max_blocks: self.max_blocks.or(file.max_blocks),
            checkpoint_file: self.checkpoint_file.or(file.checkpoint_file),
            checkpoint_store: self.checkpoint_store.or(file.checkpoint_store),
            checkpoint_interval_s: self.checkpoint_interval_s.or(file.checkpoint_interval_s),
        }
    }
}

// === impl TierWeight ===

impl std::str::FromStr for TierWeight {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || {
            format!("{text:?} is not TIER=WEIGHT with gpu, cpu, ssd or remote and 0 to 1, such as cpu=0.8")
        };
        let (tier, weight) = text.split_once('=').ok_or_else(problem)?;
        let weight: f64 = weight.parse().map_err(|_| problem())?;
        if !["gpu", "cpu", "ssd", "remote"].contains(&tier) || !(0.0..=1.0).contains(&weight) {
            return Err(problem());
        }
        Ok(Self { tier: tier.to_owned(), weight })
    }
}

impl TryFrom<String> for TierWeight {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

fn or_list<T>(given: Vec<T>, file: Vec<T>) -> Vec<T> {
    if given.is_empty() { file } else { given }
}

/// Reads a small text file; the failure names it.
fn read_text(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| Failure::unreadable(path, &error))
}

/// Whether a file can be opened; the failure names it.
fn check_readable(path: &Path) -> Result<(), Failure> {
    fs::File::open(path).map(drop).map_err(|error| Failure::unreadable(path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, String> {
        toml::from_str(text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn a_file_sets_what_flags_set() {
        let settings = parse(
            r#"
            [nats]
            url = ["nats://127.0.0.1:4222"]
            [server]
            grpc-listen = "0.0.0.0:7460"
            weight = ["cpu=0.5"]
            [shim]
            state-dir = "/var/lib/kvatlas"
            [[engine]]
            model = "m"
            instance = "10.0.0.7:8000"
            zmq = "tcp://10.0.0.7:5557"
            "#,
        )
        .unwrap();
        assert_eq!(settings.nats.url.len(), 1);
        assert_eq!(settings.server.grpc_listen.unwrap().port(), 7460);
        assert_eq!(settings.engines.len(), 1);
        assert_eq!(settings.shim.state_dir.as_deref(), Some(Path::new("/var/lib/kvatlas")));
    }

    #[test]
    fn settings_show_no_secret() {
        let settings = parse("[nats]\nurl = [\"nats://me:hunter2@h\"]").unwrap();
        let config = settings.nats.config("shim").unwrap().unwrap();
        let shown = format!("{settings:?} {config:?}");
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn unknown_settings_are_refused_by_name() {
        assert!(parse("[server]\ngrpc = 1").unwrap_err().contains("unknown field `grpc`"));
        assert!(parse("[servers]").unwrap_err().contains("servers"));
        assert!(parse("[server]\nweight = [\"cpu=2\"]").unwrap_err().contains("cpu=2"));
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let given = ServerSettings { max_blocks: Some(1), ..ServerSettings::default() };
        let file = ServerSettings {
            max_blocks: Some(2),
            grpc_listen: "127.0.0.1:1".parse().ok(),
            ..Default::default()
        };
        let merged = given.or(file);
        assert_eq!((merged.max_blocks, merged.grpc_listen.is_some()), (Some(1), true));
    }

    #[test]
    fn broker_credentials_must_be_one_kind_and_need_a_broker() {
        let user = NatsSettings { user: Some("u".into()), ..NatsSettings::default() };
        assert!(user.config("shim").unwrap_err().to_string().contains("--nats-password-file"));
        let file = NatsSettings { credentials_file: Some("f".into()), ..NatsSettings::default() };
        assert!(file.config("shim").unwrap_err().to_string().contains("--nats URL"));
    }
}
