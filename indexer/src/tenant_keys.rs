//! How each tenant's keys are computed: from a secret of its own, or else from the deployment's seed. Pure, but for opening
//! the file.
//!
//! ```toml
//! [tenants]
//! a = "32 to 128 hexadecimal digits"      # openssl rand -hex 16
//! "" = "..."                              # the default tenant
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kvatlas_proto::scope::MAX_TENANT_BYTES;
use kvatlas_proto::{KeyHasher, KeySeed};

use crate::watched::{Watched, WatchedFileError};

/// Shortest secret, bytes: 128 bits.
pub const MIN_SECRET_BYTES: usize = 16;
/// Longest secret, bytes: what the derivation uses without hashing it first.
pub const MAX_SECRET_BYTES: usize = 64;
/// Most tenants with a secret: as many as an index has scopes.
pub const MAX_TENANT_SECRETS: usize = 1_024;

/// The key hasher of each tenant.
#[derive(Clone, Debug)]
pub struct TenantKeys {
    default: KeyHasher,
    by_tenant: BTreeMap<String, KeyHasher>,
}

/// Secrets by tenant. Shows only whose they are.
#[derive(Default)]
pub(crate) struct TenantSecrets(BTreeMap<String, Vec<u8>>);

/// The secrets cannot be used. Names tenants, never secrets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TenantSecretsError {
    /// The file is not what it should be.
    #[error("{0}: it has one table, [tenants], of a tenant's name and its secret each")]
    Form(String),
    /// A secret is not one.
    #[error(
        "the secret of tenant {0:?} is not {digits} hexadecimal digits, an even number: make one with openssl rand -hex 16",
        digits = format_args!("{} to {}", 2 * MIN_SECRET_BYTES, 2 * MAX_SECRET_BYTES)
    )]
    Secret(String),
    /// A tenant's name is too long.
    #[error("a tenant's name has {0} bytes: the most are {MAX_TENANT_BYTES}")]
    Tenant(usize),
    /// There are too many.
    #[error("it has secrets of {0} tenants: the most are {MAX_TENANT_SECRETS}")]
    TooMany(usize),
}

// === impl TenantKeys ===

impl TenantKeys {
    /// All tenants have this seed.
    pub fn new(seed: KeySeed) -> Self {
        Self { default: KeyHasher::new(seed), by_tenant: BTreeMap::new() }
    }

    /// Reads a file with secrets; tenants that it does not name have `seed`.
    pub fn read(path: &Path, seed: KeySeed) -> Result<Self, WatchedFileError> {
        let (_, secrets) = TenantSecrets::open(path.to_owned())?;
        Ok(Self::with_secrets(seed, &secrets))
    }

    pub(crate) fn with_secrets(seed: KeySeed, secrets: &TenantSecrets) -> Self {
        let hasher = |(tenant, secret): (&String, &Vec<u8>)| {
            (tenant.clone(), KeyHasher::new(KeySeed::of_tenant(secret, tenant)))
        };
        Self { by_tenant: secrets.0.iter().map(hasher).collect(), ..Self::new(seed) }
    }

    /// How this tenant's keys are computed.
    pub fn of(&self, tenant: &str) -> &KeyHasher {
        self.by_tenant.get(tenant).unwrap_or(&self.default)
    }
}

// === impl TenantSecrets ===

impl TenantSecrets {
    pub(crate) fn open(path: PathBuf) -> Result<(Watched<Self>, Self), WatchedFileError> {
        let parse = |contents: &[Vec<u8>]| {
            let [text] = contents else { unreachable!("one path is watched") };
            let text = std::str::from_utf8(text).map_err(|_| "it is not text".to_owned())?;
            Self::parse(text).map_err(|error| error.to_string())
        };
        Watched::open("file of tenants' secrets", vec![path], parse)
    }

    /// By hand: an error of the parser would quote what was written.
    fn parse(text: &str) -> Result<Self, TenantSecretsError> {
        let form = |problem: &str| TenantSecretsError::Form(problem.to_owned());
        let mut file: toml::Table = toml::from_str(text).map_err(|_| form("it is not TOML"))?;
        let tenants = match file.remove("tenants") {
            Some(toml::Value::Table(tenants)) => tenants,
            None => toml::Table::new(),
            Some(_) => return Err(form("tenants is no table")),
        };
        if !file.is_empty() {
            return Err(form("there is something beside [tenants]"));
        }
        if tenants.len() > MAX_TENANT_SECRETS {
            return Err(TenantSecretsError::TooMany(tenants.len()));
        }
        let mut secrets = BTreeMap::new();
        for (tenant, secret) in tenants {
            if tenant.len() > MAX_TENANT_BYTES {
                return Err(TenantSecretsError::Tenant(tenant.len()));
            }
            let secret = secret.as_str().and_then(from_hex);
            let secret = secret.ok_or_else(|| TenantSecretsError::Secret(tenant.clone()))?;
            secrets.insert(tenant, secret);
        }
        Ok(Self(secrets))
    }
}

impl std::fmt::Debug for TenantSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("TenantSecrets").field(&self.0.keys()).finish()
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let fits = (MIN_SECRET_BYTES..=MAX_SECRET_BYTES).contains(&pairs.len()) && rest.is_empty();
    let byte = |pair: &[u8; 2]| {
        let digits = pair.iter().all(u8::is_ascii_hexdigit);
        digits.then(|| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())?
    };
    fits.then(|| pairs.iter().map(byte).collect())?
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET_A: &str = "000102030405060708090a0b0c0d0e0f";
    const SECRET_B: &str = "ffeeddccbbaa99887766554433221100";

    fn keys(text: &str) -> TenantKeys {
        TenantKeys::with_secrets(KeySeed::PUBLISHED, &TenantSecrets::parse(text).unwrap())
    }

    fn chain(keys: &TenantKeys, tenant: &str) -> Vec<u64> {
        let tokens: Vec<u32> = (0..64).collect();
        keys.of(tenant).chain(&tokens, 16).iter().map(|key| key.0).collect()
    }

    #[test]
    fn tenants_have_key_spaces_of_their_own_and_others_the_deployments() {
        let text = format!("[tenants]\na = \"{SECRET_A}\"\nb = \"{SECRET_B}\"\nc = \"{SECRET_A}\"\n");
        let (keys, published) = (keys(&text), TenantKeys::new(KeySeed::PUBLISHED));
        assert_eq!(chain(&keys, ""), chain(&published, ""));
        let spaces = ["", "a", "b", "c"].map(|tenant| chain(&keys, tenant));
        for (at, one) in spaces.iter().enumerate() {
            for other in &spaces[at + 1..] {
                assert!(
                    one.iter().all(|key| !other.contains(key)),
                    "two tenants with one secret are two tenants"
                );
            }
        }
    }

    #[test]
    fn a_file_that_is_wrong_says_so_without_showing_a_secret() {
        for (text, expected) in [
            ("hunter2", "TOML"),
            ("[tenant]\na = \"hunter2\"", "[tenants]"),
            ("tenants = \"hunter2\"", "no table"),
            ("[tenants]\na = \"hunter2\"", "\"a\""),
            ("[tenants]\na = 7", "\"a\""),
            ("[tenants]\na = \"000102030405060708090a0b0c0d0e\"", "\"a\""),
            ("[tenants]\na = \"000102030405060708090a0b0c0d0e0fa\"", "\"a\""),
            ("[tenants]\na = \"000102030405060708090a0b0c0d0e+f\"", "\"a\""),
        ] {
            let error = TenantSecrets::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains("hunter2"), "{text}: {error}");
        }
        let secrets = TenantSecrets::parse(&format!("[tenants]\na = \"{SECRET_A}\"")).unwrap();
        let shown = format!("{secrets:?} {:?}", TenantKeys::with_secrets(KeySeed::PUBLISHED, &secrets));
        assert!(shown.contains("\"a\"") && !shown.contains("0001") && !shown.contains("15]"), "{shown}");
    }
}
