//! Where the index keeps its checkpoint: one setting names the place, a few say how to get in.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use kvatlas_bus::ClientIdentity;
use kvatlas_index::store::FileStore;
use kvatlas_index::{CHECKPOINT_INTERVAL, CheckpointConfig, CheckpointStore};
use kvatlas_stores::{Location, NatsStore, Password, RedisLocation, RedisStore, StoreAccess};
use serde::Deserialize;

use super::{Settings, check_readable};
use crate::failure::Failure;

/// Has the password where a file is not at hand. There is no flag for it: command lines are shown to everybody.
const PASSWORD_VARIABLE: &str = "KVATLAS_CHECKPOINT_STORE_PASSWORD";

/// `[checkpoint-store]`: how to get into the Redis or Valkey that --checkpoint-store names.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
// Ids are given where other groups have fields of the same name.
pub struct StoreSettings {
    /// User name at the checkpoint store, if it is not in its URL.
    #[arg(
        id = "checkpoint_store_user",
        long = "checkpoint-store-user",
        env = "KVATLAS_CHECKPOINT_STORE_USER",
        value_name = "NAME"
    )]
    pub user: Option<String>,
    /// File with the password for the checkpoint store, read at each connect. (Or put the password into the environment
    /// variable KVATLAS_CHECKPOINT_STORE_PASSWORD.)
    #[arg(
        id = "checkpoint_store_password_file",
        long = "checkpoint-store-password-file",
        env = "KVATLAS_CHECKPOINT_STORE_PASSWORD_FILE",
        value_name = "FILE"
    )]
    pub password_file: Option<PathBuf>,
    /// PEM file with the authorities to trust for the checkpoint store's certificate instead of the system's.
    #[arg(
        id = "checkpoint_store_ca_file",
        long = "checkpoint-store-ca-file",
        env = "KVATLAS_CHECKPOINT_STORE_CA_FILE",
        value_name = "FILE"
    )]
    pub ca_file: Option<PathBuf>,
    /// PEM file with this client's certificate; needs --checkpoint-store-key-file.
    #[arg(
        id = "checkpoint_store_certificate_file",
        long = "checkpoint-store-certificate-file",
        env = "KVATLAS_CHECKPOINT_STORE_CERTIFICATE_FILE",
        value_name = "FILE"
    )]
    pub certificate_file: Option<PathBuf>,
    /// PEM file with this client's private key.
    #[arg(
        id = "checkpoint_store_key_file",
        long = "checkpoint-store-key-file",
        env = "KVATLAS_CHECKPOINT_STORE_KEY_FILE",
        value_name = "FILE"
    )]
    pub key_file: Option<PathBuf>,
}

// === impl Settings ===

impl Settings {
    /// Where and how often checkpoints are written, if at all.
    pub fn checkpoint(&self) -> Result<Option<CheckpointConfig>, Failure> {
        let Some(location) = self.checkpoint_location()? else {
            if self.server.checkpoint_interval_s.is_some() || self.store.is_given() {
                return Err(Failure::usage(
                    "settings of a checkpoint are given but no place for it: add --checkpoint-file FILE or \
                     --checkpoint-store URL",
                ));
            }
            return Ok(None);
        };
        if self.store.is_given() && !matches!(location, Location::Redis(_)) {
            return Err(Failure::usage(format!(
                "--checkpoint-store-user, -password-file, -ca-file, -certificate-file and -key-file are for Redis and \
                 Valkey, not for {location}"
            )));
        }
        let store: Arc<dyn CheckpointStore> = match location {
            Location::File(path) => Arc::new(FileStore::new(path)),
            Location::Nats(object) => {
                let bus = self.nats.config("index")?.ok_or_else(|| {
                    Failure::usage(format!("{object} is in a NATS broker but none is given: add --nats URL"))
                })?;
                Arc::new(NatsStore::new(object, &bus))
            }
            Location::Redis(location) => {
                let password = std::env::var(PASSWORD_VARIABLE).ok();
                let access = self.store.access(&location, password)?;
                Arc::new(RedisStore::new(location, access))
            }
        };
        let interval = self.server.checkpoint_interval_s.map_or(CHECKPOINT_INTERVAL, Duration::from_secs);
        Ok(Some(CheckpointConfig { store, interval }))
    }

    fn checkpoint_location(&self) -> Result<Option<Location>, Failure> {
        match (&self.server.checkpoint_store, &self.server.checkpoint_file) {
            (Some(_), Some(_)) => Err(Failure::usage(
                "give one place for the checkpoint: --checkpoint-file FILE is short for --checkpoint-store file:FILE",
            )),
            (Some(url), None) => match url.parse() {
                Ok(location) => Ok(Some(location)),
                Err(problem) => Err(Failure::usage(format!("{problem}"))),
            },
            (None, Some(path)) => Ok(Some(Location::File(path.clone()))),
            (None, None) => Ok(None),
        }
    }
}

// === impl StoreSettings ===

impl StoreSettings {
    pub(super) fn or(self, file: Self) -> Self {
        Self {
            user: self.user.or(file.user),
            password_file: self.password_file.or(file.password_file),
            ca_file: self.ca_file.or(file.ca_file),
            certificate_file: self.certificate_file.or(file.certificate_file),
            key_file: self.key_file.or(file.key_file),
        }
    }

    fn is_given(&self) -> bool {
        self.user.is_some() || self.password_file.is_some() || self.names_tls()
    }

    fn names_tls(&self) -> bool {
        self.ca_file.is_some() || self.certificate_file.is_some() || self.key_file.is_some()
    }

    /// Files are looked at once now, so that a wrong path is noticed at the start and not half a minute later.
    fn access(&self, location: &RedisLocation, password: Option<String>) -> Result<StoreAccess, Failure> {
        if self.names_tls() && !location.has_tls {
            return Err(Failure::usage(format!(
                "certificates are given but {location} is not encrypted: write rediss:// or redis-cluster+tls://"
            )));
        }
        let user = match (&location.user, &self.user) {
            (Some(_), Some(_)) => {
                return Err(Failure::usage(
                    "give the checkpoint store's user once: in its URL or as a setting",
                ));
            }
            (one, other) => one.clone().or(other.clone()),
        };
        let password = match (&self.password_file, password) {
            (Some(_), Some(_)) => {
                return Err(Failure::usage(format!(
                    "give the checkpoint store's password once: in --checkpoint-store-password-file or in \
                     {PASSWORD_VARIABLE}"
                )));
            }
            (Some(path), None) => Password::File(path.clone()),
            (None, Some(password)) => Password::Given(password),
            (None, None) => Password::None,
        };
        if user.is_some() && matches!(password, Password::None) {
            return Err(Failure::usage(
                "a user for the checkpoint store needs a password: add --checkpoint-store-password-file FILE",
            ));
        }
        let client_identity = match (&self.certificate_file, &self.key_file) {
            (None, None) => None,
            (Some(certificate), Some(key)) => {
                Some(ClientIdentity { certificate_file: certificate.clone(), key_file: key.clone() })
            }
            _ => {
                return Err(Failure::usage(
                    "--checkpoint-store-certificate-file and --checkpoint-store-key-file belong together",
                ));
            }
        };
        let files = [&self.password_file, &self.ca_file, &self.certificate_file, &self.key_file];
        files.into_iter().flatten().try_for_each(|path| check_readable(path))?;
        Ok(StoreAccess { user, password, ca_file: self.ca_file.clone(), client_identity })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{NatsSettings, ServerSettings};

    fn settings(store: &str) -> Settings {
        let server = ServerSettings { checkpoint_store: Some(store.to_owned()), ..ServerSettings::default() };
        Settings { server, ..Settings::default() }
    }

    fn problem(settings: &Settings) -> String {
        settings.checkpoint().unwrap_err().to_string()
    }

    fn kind(settings: &Settings) -> (&'static str, String) {
        let store = settings.checkpoint().unwrap().unwrap().store;
        (store.kind(), store.place())
    }

    #[test]
    fn one_setting_chooses_the_store() {
        assert!(Settings::default().checkpoint().unwrap().is_none());
        assert_eq!(kind(&settings("file:/a/b")), ("file", "file:/a/b".into()));
        assert_eq!(kind(&settings("redis://h")).0, "redis");
        assert_eq!(kind(&settings("redis-cluster+tls://h1,h2")).0, "redis");
        let nats = NatsSettings { url: vec!["nats://h".into()], ..NatsSettings::default() };
        let broker = Settings { nats, ..settings("nats://bucket/index-0") };
        assert_eq!(kind(&broker), ("nats", "nats://bucket/index-0".into()));
        let mut short = Settings::default();
        short.server.checkpoint_file = Some("/a/b".into());
        assert_eq!(kind(&short), kind(&settings("file:/a/b")));
    }

    #[test]
    fn what_does_not_belong_together_is_refused_with_what_to_do() {
        let mut both = settings("redis://h");
        both.server.checkpoint_file = Some("f".into());
        assert!(problem(&both).contains("one place"));
        assert!(problem(&settings("nats://bucket")).contains("--nats URL"));
        assert!(problem(&settings("redis://me:hunter2@h")).contains("--checkpoint-store-password-file"));
        assert!(problem(&settings("redis://me@h")).contains("--checkpoint-store-password-file"));

        let mut alone = Settings::default();
        alone.server.checkpoint_interval_s = Some(5);
        assert!(problem(&alone).contains("--checkpoint-store URL"));
        let with = |store, access| Settings { store: access, ..settings(store) };
        let user = || StoreSettings { user: Some("u".into()), ..StoreSettings::default() };
        assert!(problem(&with("file:/a", user())).contains("for Redis"));
        assert!(problem(&with("redis://u@h", user())).contains("once"));
        let ca = || StoreSettings { ca_file: Some("ca.pem".into()), ..StoreSettings::default() };
        assert!(problem(&with("redis://h", ca())).contains("rediss://"));
        assert!(problem(&with("rediss://h", ca())).contains("ca.pem"));
        let half = StoreSettings { key_file: Some("k".into()), ..StoreSettings::default() };
        assert!(problem(&with("rediss://h", half)).contains("belong together"));
    }

    #[test]
    fn a_password_is_given_once_and_never_shown() {
        let Location::Redis(location) = "redis://u@h".parse().unwrap() else { panic!("redis") };
        let given = StoreSettings::default().access(&location, Some("hunter2".into())).unwrap();
        assert!(!format!("{given:?}").contains("hunter2"));
        let file = StoreSettings { password_file: Some("p".into()), ..StoreSettings::default() };
        let twice = file.access(&location, Some("hunter2".into())).unwrap_err().to_string();
        assert!(twice.contains("once") && !twice.contains("hunter2"), "{twice}");
    }

    #[test]
    fn a_file_sets_what_flags_set() {
        let settings: Settings = toml::from_str(
            r#"
            [server]
            checkpoint-store = "rediss://h"
            [checkpoint-store]
            user = "atlas"
            password-file = "/run/secrets/redis"
            "#,
        )
        .unwrap();
        assert_eq!(settings.server.checkpoint_store.as_deref(), Some("rediss://h"));
        assert_eq!(settings.store.user.as_deref(), Some("atlas"));
    }
}
