//! Who may ask what: a table of identities, and the decision for one credential and one question. Pure.
//!
//! ```toml
//! [[identity]]
//! name = "gateway-a"                      # shown in refusals and logs
//! token-sha256 = ["9f86d0..."]            # of the bearer token; several while one is being replaced
//! certificate = ["gateway.a.example"]     # DNS name or URI of a client certificate's alternative names
//! common-name = ["gateway-a"]             # or the common name of its subject
//! tenants = ["a", ""]                     # or "all"; "" is the default tenant
//! models = ["m"]                          # absent: all
//! rights = ["query", "observe"]           # query, observe, dump, report
//! ```
//!
//! A credential that is presented and not known is refused, even if another one beside it would do: a caller that thinks
//! it is somebody should hear that it is not. Nothing here holds or shows a token: digests are kept, and compared in
//! constant time over all identities.

use std::collections::BTreeSet;
use std::sync::Arc;

use ring::digest::{SHA256, digest};
use serde::Deserialize;
use subtle::ConstantTimeEq as _;

use crate::tls::PeerNames;

/// Most identities of a file: tenants and gateways of a large deployment. Each costs a comparison per connection's call.
pub const MAX_IDENTITIES: usize = 1_024;
/// Most credentials of one identity: the one in use, and those that come and go.
pub const MAX_CREDENTIALS: usize = 16;
/// Longest bearer token, bytes; larger than any JSON web token in use.
pub const MAX_TOKEN_BYTES: usize = 8_192;
/// Longest name of an identity, bytes.
const MAX_NAME_BYTES: usize = 128;

type TokenDigest = [u8; 32];

/// What an identity may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Right {
    /// Score, and what else answers a question about a prompt.
    Query,
    /// `ListOwners` and `Watch`.
    Observe,
    /// `Dump`.
    Dump,
    /// `ReportOutcome`.
    Report,
}

/// Everybody who is known.
#[derive(Debug, Default)]
pub(crate) struct AuthTable {
    identities: Vec<Arc<Identity>>,
}

/// Somebody who is known. Shows no credential.
pub(crate) struct Identity {
    pub(crate) name: String,
    tokens: Vec<TokenDigest>,
    alternative_names: BTreeSet<String>,
    common_names: BTreeSet<String>,
    tenants: Names,
    models: Names,
    rights: BTreeSet<Right>,
}

/// All names, or these.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Names {
    All,
    Only(BTreeSet<String>),
}

/// What a caller presents. Shows nothing of it.
#[derive(Clone, Default)]
pub(crate) struct Credential {
    token: Option<TokenDigest>,
    peer: Arc<PeerNames>,
}

/// Nobody is known by what was presented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UnknownCallerError {
    #[error(
        "this server answers known callers only: send the metadata `authorization: Bearer TOKEN`, or connect with a \
         client certificate that it knows"
    )]
    Missing,
    #[error("the authorization metadata is not one `Bearer TOKEN` of at most {MAX_TOKEN_BYTES} bytes")]
    Malformed,
    #[error("this token is not known here: it may have been replaced")]
    Token,
    #[error("the names in this client certificate are not known here")]
    Certificate,
}

/// Somebody known asked for what is not theirs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DeniedError {
    #[error("{name:?} may not {}: its rights are {rights}", right.verb())]
    Right { name: String, right: Right, rights: String },
    #[error("{name:?} may not ask about {}", tenant_name(tenant))]
    Tenant { name: String, tenant: String },
    #[error("{name:?} may not ask about model {model:?}")]
    Model { name: String, model: String },
}

/// The file cannot be used. Names identities, never what they present.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AuthFileError {
    #[error("{0}")]
    Toml(String),
    #[error("it has {0} identities: the most are {MAX_IDENTITIES}")]
    TooMany(usize),
    #[error("identity {0}: a name has 1 to {MAX_NAME_BYTES} bytes")]
    Name(usize),
    #[error("{0:?} is there twice: an identity has one entry with all of its credentials")]
    Twice(String),
    #[error("{0:?} has no credential: give token-sha256, certificate or common-name")]
    NoCredential(String),
    #[error("{0:?} has more than {MAX_CREDENTIALS} credentials of a kind")]
    TooManyCredentials(String),
    #[error(
        "{0:?}: token-sha256 is a list of 64 hexadecimal digits each: printf %s TOKEN | sha256sum | cut -c1-64"
    )]
    Digest(String),
    #[error("{0:?} and {1:?} have a credential in common: each must name one identity")]
    Shared(String, String),
    #[error("{0:?}: {1} is \"all\" or a list of names")]
    Names(String, &'static str),
    #[error("{0:?} has no rights: give some of query, observe, dump, report")]
    NoRights(String),
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct AuthFile {
    #[serde(default)]
    identity: Vec<IdentityEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct IdentityEntry {
    name: String,
    // Read by hand: an error of the parser would quote what was written, perhaps a token in clear.
    #[serde(default = "empty_list")]
    token_sha256: toml::Value,
    #[serde(default)]
    certificate: BTreeSet<String>,
    #[serde(default)]
    common_name: BTreeSet<String>,
    tenants: toml::Value,
    #[serde(default = "all")]
    models: toml::Value,
    rights: BTreeSet<Right>,
}

fn empty_list() -> toml::Value {
    toml::Value::Array(Vec::new())
}

fn all() -> toml::Value {
    toml::Value::String("all".to_owned())
}

fn tenant_name(tenant: &str) -> String {
    if tenant.is_empty() { "the default tenant".to_owned() } else { format!("tenant {tenant:?}") }
}

// === impl Right ===

impl Right {
    fn verb(self) -> &'static str {
        match self {
            Self::Query => "query",
            Self::Observe => "observe",
            Self::Dump => "dump",
            Self::Report => "report",
        }
    }
}

// === impl AuthTable ===

impl AuthTable {
    /// Reads the file's text.
    pub(crate) fn parse(text: &str) -> Result<Self, AuthFileError> {
        let file: AuthFile =
            toml::from_str(text).map_err(|error| AuthFileError::Toml(error.message().to_owned()))?;
        if file.identity.len() > MAX_IDENTITIES {
            return Err(AuthFileError::TooMany(file.identity.len()));
        }
        let mut table = Self::default();
        for (at, entry) in file.identity.into_iter().enumerate() {
            let identity = entry.check(at)?;
            for other in &table.identities {
                if other.name == identity.name {
                    return Err(AuthFileError::Twice(identity.name));
                }
                if other.shares_a_credential(&identity) {
                    return Err(AuthFileError::Shared(other.name.clone(), identity.name));
                }
            }
            table.identities.push(Arc::new(identity));
        }
        Ok(table)
    }

    /// Identities.
    pub(crate) fn len(&self) -> usize {
        self.identities.len()
    }

    /// Who presents this. A token decides alone where there is one.
    pub(crate) fn identify(&self, credential: &Credential) -> Result<Arc<Identity>, UnknownCallerError> {
        if let Some(token) = &credential.token {
            let mut found = None;
            // All of them, always: time says nothing about which digest is similar.
            for identity in &self.identities {
                for known in &identity.tokens {
                    if bool::from(known.ct_eq(token)) {
                        found = Some(identity);
                    }
                }
            }
            return found.cloned().ok_or(UnknownCallerError::Token);
        }
        let PeerNames { alternative, common } = &*credential.peer;
        if alternative.is_empty() && common.is_empty() {
            return Err(UnknownCallerError::Missing);
        }
        let named = |identity: &&Arc<Identity>| {
            alternative.iter().any(|name| identity.alternative_names.contains(name))
                || common.iter().any(|name| identity.common_names.contains(name))
        };
        self.identities.iter().find(named).cloned().ok_or(UnknownCallerError::Certificate)
    }
}

// === impl Identity ===

impl Identity {
    /// Whether it may do this at all, whatever the tenant.
    pub(crate) fn has(&self, right: Right) -> Result<(), DeniedError> {
        if self.rights.contains(&right) {
            return Ok(());
        }
        let rights: Vec<&str> = self.rights.iter().map(|right| right.verb()).collect();
        Err(DeniedError::Right { name: self.name.clone(), right, rights: rights.join(", ") })
    }

    /// Whether it may do this to a tenant's model.
    pub(crate) fn may(&self, right: Right, model: &str, tenant: &str) -> Result<(), DeniedError> {
        self.has(right)?;
        let name = || self.name.clone();
        if !self.tenants.contains(tenant) {
            return Err(DeniedError::Tenant { name: name(), tenant: tenant.to_owned() });
        }
        if !self.models.contains(model) {
            return Err(DeniedError::Model { name: name(), model: model.to_owned() });
        }
        Ok(())
    }

    fn shares_a_credential(&self, other: &Self) -> bool {
        self.tokens.iter().any(|token| other.tokens.contains(token))
            || !self.alternative_names.is_disjoint(&other.alternative_names)
            || !self.common_names.is_disjoint(&other.common_names)
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, tenants, models, rights, .. } = self;
        f.debug_struct("Identity")
            .field("name", name)
            .field("tenants", tenants)
            .field("models", models)
            .field("rights", rights)
            .finish_non_exhaustive()
    }
}

// === impl Names ===

impl Names {
    fn contains(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.contains(name),
        }
    }

    fn parse(value: toml::Value) -> Option<Self> {
        match value {
            toml::Value::String(word) if word == "all" => Some(Self::All),
            list @ toml::Value::Array(_) => list.try_into().ok().map(Self::Only),
            _ => None,
        }
    }
}

// === impl Credential ===

impl Credential {
    /// From the values of the `authorization` metadata and the names of the connection's certificate.
    pub(crate) fn new<'a>(
        authorization: impl IntoIterator<Item = &'a [u8]>,
        peer: Arc<PeerNames>,
    ) -> Result<Self, UnknownCallerError> {
        let mut values = authorization.into_iter();
        let Some(value) = values.next() else { return Ok(Self { token: None, peer }) };
        let token = values.next().is_none().then(|| bearer(value)).flatten();
        let token = token.ok_or(UnknownCallerError::Malformed)?;
        Ok(Self { token: Some(sha256(token)), peer })
    }
}

/// The token of `Bearer TOKEN`; the scheme in any case, as HTTP has it.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    let fits = (1..=MAX_TOKEN_BYTES).contains(&token.len());
    (scheme.eq_ignore_ascii_case(b"bearer ") && fits && token.iter().all(u8::is_ascii_graphic))
        .then_some(token)
}

fn sha256(bytes: &[u8]) -> TokenDigest {
    digest(&SHA256, bytes).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

// === impl IdentityEntry ===

impl IdentityEntry {
    fn check(self, at: usize) -> Result<Identity, AuthFileError> {
        let name = self.name;
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(AuthFileError::Name(at + 1));
        }
        let named = || name.clone();
        let digests = match self.token_sha256 {
            toml::Value::Array(digests) => digests,
            one => vec![one],
        };
        let tokens: Option<Vec<TokenDigest>> =
            digests.iter().map(|digest| from_hex(digest.as_str()?)).collect();
        let tokens = tokens.ok_or_else(|| AuthFileError::Digest(named()))?;
        let counts = [tokens.len(), self.certificate.len(), self.common_name.len()];
        if counts == [0; 3] {
            return Err(AuthFileError::NoCredential(name));
        }
        if counts.into_iter().any(|count| count > MAX_CREDENTIALS) {
            return Err(AuthFileError::TooManyCredentials(name));
        }
        if self.rights.is_empty() {
            return Err(AuthFileError::NoRights(name));
        }
        Ok(Identity {
            tenants: Names::parse(self.tenants).ok_or_else(|| AuthFileError::Names(named(), "tenants"))?,
            models: Names::parse(self.models).ok_or_else(|| AuthFileError::Names(named(), "models"))?,
            name,
            tokens,
            alternative_names: self.certificate,
            common_names: self.common_name,
            rights: self.rights,
        })
    }
}

fn from_hex(text: &str) -> Option<TokenDigest> {
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}

#[cfg(test)]
#[path = "auth_tests.rs"]
mod tests;
