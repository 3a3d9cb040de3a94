//! What one setting says about where checkpoints are kept.
//!
//! ```text
//! file:PATH
//! nats://BUCKET[/NAME][?replicas=1&ttl-s=86400]                 the broker is a setting of its own
//! redis://[USER@]HOST[:PORT][/DATABASE][?prefix=kvatlas&name=index&ttl-s=86400]
//! rediss://...                                                  the same over TLS
//! redis-cluster://[USER@]HOST[:PORT],HOST[:PORT],...[?...]      some nodes of a cluster; they name the others
//! redis-cluster+tls://...
//! ```
//!
//! No password: URLs are shown in lists of processes, in logs and in manifests.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Where a checkpoint is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// In a file.
    File(PathBuf),
    /// In a bucket of a NATS object store.
    Nats(ObjectName),
    /// In Redis or Valkey.
    Redis(RedisLocation),
}

/// An object in a NATS object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectName {
    /// The bucket. If there is none it is created.
    pub bucket: String,
    /// Name of the object.
    pub name: String,
    /// Copies that a bucket which is created here has, 1 to 5.
    pub replicas: usize,
    /// How long a bucket which is created here keeps an object.
    pub ttl: Duration,
}

/// Keys in Redis or Valkey.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisLocation {
    /// The server, or some nodes of a cluster.
    pub nodes: Vec<Node>,
    /// Whether it is a cluster.
    pub is_cluster: bool,
    /// Whether the connection is encrypted.
    pub has_tls: bool,
    /// User name.
    pub user: Option<String>,
    /// Number of the database; 0 in a cluster.
    pub database: u16,
    /// First part of every key.
    pub prefix: String,
    /// Second part of every key: which index it is.
    pub name: String,
    /// How long the checkpoint is kept after it was last saved.
    pub ttl: Duration,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// The setting does not name a place. The text never shows what may be a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the checkpoint store {shown:?} cannot be used: {problem}")]
pub struct InvalidLocationError {
    shown: String,
    problem: String,
}

const REDIS_PORT: u16 = 6379;
const DEFAULT_PREFIX: &str = "kvatlas";
const DEFAULT_NAME: &str = "index";
/// How long a checkpoint is kept if nothing else is said: as long as an outage that is worth a warm restart.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3_600);
/// Shortest time: what expires between two saves is never there.
const MIN_TTL_S: u64 = 60;
/// Longest time, 30 days: whoever stops a server for longer has no use for what it held.
const MAX_TTL_S: u64 = 30 * 24 * 3_600;
/// Copies that JetStream can keep.
const MAX_REPLICAS: usize = 5;
/// Nodes of a cluster to start from; it names the others.
const MAX_NODES: usize = 64;
/// Longest name of a bucket, object, prefix or index, bytes.
const MAX_NAME_BYTES: usize = 128;

// === impl Location ===

impl FromStr for Location {
    type Err = InvalidLocationError;

    fn from_str(text: &str) -> Result<Self, InvalidLocationError> {
        let refuse = |problem: String| InvalidLocationError { shown: without_password(text), problem };
        parse(text).map_err(refuse)
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Nats(object) => object.fmt(f),
            Self::Redis(redis) => redis.fmt(f),
        }
    }
}

fn parse(text: &str) -> Result<Location, String> {
    let forms = "write file:PATH, nats://BUCKET/NAME, redis://HOST:PORT, rediss://HOST:PORT, \
                 redis-cluster://HOST:PORT,... or redis-cluster+tls://HOST:PORT,...";
    let (scheme, rest) = text.split_once(':').ok_or(forms)?;
    if scheme == "file" {
        let path = rest.strip_prefix("//").unwrap_or(rest);
        let is_other_host = rest.starts_with("//") && !path.starts_with('/');
        return match path {
            "" => Err("it names no file: write file:PATH".to_owned()),
            _ if is_other_host => Err("a file is on this host: write file:PATH or file:///PATH".to_owned()),
            _ => Ok(Location::File(path.into())),
        };
    }
    let rest = rest.strip_prefix("//").ok_or(forms)?;
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    match scheme {
        "nats" => ObjectName::parse(place, query).map(Location::Nats),
        "redis" => RedisLocation::parse(place, query, false, false).map(Location::Redis),
        "rediss" => RedisLocation::parse(place, query, false, true).map(Location::Redis),
        "redis-cluster" => RedisLocation::parse(place, query, true, false).map(Location::Redis),
        "redis-cluster+tls" => RedisLocation::parse(place, query, true, true).map(Location::Redis),
        _ => Err(forms.to_owned()),
    }
}

// === impl ObjectName ===

impl ObjectName {
    fn parse(place: &str, query: &str) -> Result<Self, String> {
        if place.contains(['@', ':']) {
            return Err("the broker is set by --nats: write nats://BUCKET/NAME".to_owned());
        }
        let (bucket, name) = place.split_once('/').unwrap_or((place, DEFAULT_NAME));
        let bucket = checked_name("bucket", bucket, "-_")?;
        let name = checked_name("object name", name, "-_.")?;
        let mut parsed = Self { bucket, name, replicas: 1, ttl: DEFAULT_TTL };
        for (key, value) in pairs(query)? {
            match key {
                "replicas" => parsed.replicas = number(key, value, 1, MAX_REPLICAS)?,
                "ttl-s" => parsed.ttl = Duration::from_secs(number(key, value, MIN_TTL_S, MAX_TTL_S)?),
                _ => return Err(format!("{key:?} is not known: there are replicas and ttl-s")),
            }
        }
        Ok(parsed)
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nats://{}/{}", self.bucket, self.name)
    }
}

// === impl RedisLocation ===

impl RedisLocation {
    fn parse(place: &str, query: &str, is_cluster: bool, has_tls: bool) -> Result<Self, String> {
        let (user, place) = match place.rsplit_once('@') {
            Some((user, _)) if user.contains(':') => {
                return Err("a password does not belong into a URL: put it into a file and add \
                            --checkpoint-store-password-file FILE"
                    .to_owned());
            }
            Some(("", _)) => return Err("the user before @ is empty".to_owned()),
            Some((user, place)) => (Some(user.to_owned()), place),
            None => (None, place),
        };
        let (hosts, database) = place.split_once('/').unwrap_or((place, ""));
        let database = if database.is_empty() { 0 } else { number("database", database, 0, u16::MAX)? };
        if is_cluster && database != 0 {
            return Err("a cluster has one database only: leave the path away".to_owned());
        }
        let nodes = hosts.split(',').map(Node::parse).collect::<Result<Vec<_>, _>>()?;
        if !is_cluster && nodes.len() > 1 {
            return Err(
                "several hosts are a cluster: write redis-cluster:// or redis-cluster+tls://".to_owned()
            );
        }
        if nodes.len() > MAX_NODES {
            return Err(format!(
                "it names more than {MAX_NODES} nodes; some are enough, they name the others"
            ));
        }
        let (prefix, name) = (DEFAULT_PREFIX.to_owned(), DEFAULT_NAME.to_owned());
        let mut parsed = Self { nodes, is_cluster, has_tls, user, database, prefix, name, ttl: DEFAULT_TTL };
        for (key, value) in pairs(query)? {
            match key {
                "prefix" => parsed.prefix = checked_name(key, value, "-_.:")?,
                "name" => parsed.name = checked_name(key, value, "-_.")?,
                "ttl-s" => parsed.ttl = Duration::from_secs(number(key, value, MIN_TTL_S, MAX_TTL_S)?),
                _ => return Err(format!("{key:?} is not known: there are prefix, name and ttl-s")),
            }
        }
        Ok(parsed)
    }
}

impl fmt::Display for RedisLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.is_cluster, self.has_tls) {
            (false, false) => "redis://",
            (false, true) => "rediss://",
            (true, false) => "redis-cluster://",
            (true, true) => "redis-cluster+tls://",
        })?;
        for (at, node) in self.nodes.iter().enumerate() {
            write!(f, "{}{node}", if at == 0 { "" } else { "," })?;
        }
        write!(f, "/{}?prefix={}&name={}", self.database, self.prefix, self.name)
    }
}

// === impl Node ===

impl Node {
    fn parse(text: &str) -> Result<Self, String> {
        let problem = || format!("{text:?} is not HOST or HOST:PORT (an IPv6 address stands in brackets)");
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, behind) = rest.split_once(']').ok_or_else(problem)?;
                (host, behind.strip_prefix(':').or(behind.is_empty().then_some("")).ok_or_else(problem)?)
            }
            None => text.split_once(':').unwrap_or((text, "")),
        };
        let in_brackets = text.starts_with('[');
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c) || in_brackets && c == ':';
        if host.is_empty() || !host.chars().all(is_plain) {
            return Err(problem());
        }
        let port = if port.is_empty() { REDIS_PORT } else { port.parse().map_err(|_| problem())? };
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Names stay in an alphabet that needs no escaping anywhere; braces, which would bind keys to one slot, are not in it.
fn checked_name(what: &str, name: &str, further: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || further.contains(c);
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(is_plain) {
        return Err(format!(
            "the {what} {name:?} is not 1 to {MAX_NAME_BYTES} of letters, digits and any of {further}"
        ));
    }
    if name.starts_with('.') || name.ends_with('.') {
        return Err(format!("the {what} {name:?} begins or ends with a dot"));
    }
    Ok(name.to_owned())
}

fn pairs(query: &str) -> Result<Vec<(&str, &str)>, String> {
    let texts = query.split('&').filter(|text| !text.is_empty());
    texts.map(|text| text.split_once('=').ok_or_else(|| format!("{text:?} is not KEY=VALUE"))).collect()
}

fn number<N>(key: &str, value: &str, min: N, max: N) -> Result<N, String>
where
    N: Copy + FromStr + PartialOrd + fmt::Display,
{
    match value.parse() {
        Ok(number) if number >= min && number <= max => Ok(number),
        _ => Err(format!("{key}={value} is not a number from {min} to {max}")),
    }
}

/// `SCHEME://USER:PASSWORD@HOST` without what stands between the user and the last `@`.
fn without_password(text: &str) -> String {
    let start = text.find("://").map_or(0, |at| at + 3);
    let Some(at) = text.rfind('@').filter(|at| *at >= start) else { return text.to_owned() };
    let user = text[start..at].split(':').next().unwrap_or_default();
    format!("{}{user}{}", &text[..start], &text[at..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redis(text: &str) -> RedisLocation {
        match text.parse() {
            Ok(Location::Redis(redis)) => redis,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn problem(text: &str) -> String {
        text.parse::<Location>().unwrap_err().to_string()
    }

    #[test]
    fn every_form_says_what_it_means() {
        for (text, path) in [("file:/a/b", "/a/b"), ("file:///a/b", "/a/b"), ("file:a", "a")] {
            assert_eq!(text.parse(), Ok(Location::File(path.into())), "{text}");
        }
        let object = ObjectName {
            bucket: "b".into(),
            name: "index-0".into(),
            replicas: 3,
            ttl: Duration::from_secs(600),
        };
        assert_eq!("nats://b/index-0?replicas=3&ttl-s=600".parse(), Ok(Location::Nats(object)));
        assert_eq!("nats://b".parse::<Location>().unwrap().to_string(), "nats://b/index");

        let plain = redis("redis://h");
        let node = |host: &str, port| Node { host: host.to_owned(), port };
        assert_eq!((&plain.nodes[..], plain.database), (&[node("h", 6379)][..], 0));
        assert_eq!(
            (plain.is_cluster, plain.has_tls, plain.user, plain.ttl),
            (false, false, None, DEFAULT_TTL)
        );
        let full = redis("rediss://me@[::1]:7000/3?prefix=a:b&name=pod-1&ttl-s=60");
        assert_eq!((&full.nodes[..], full.database), (&[node("::1", 7000)][..], 3));
        assert_eq!(
            (full.user.as_deref(), full.prefix.as_str(), full.name.as_str()),
            (Some("me"), "a:b", "pod-1")
        );
        assert_eq!((full.has_tls, full.ttl), (true, Duration::from_secs(60)));
        assert_eq!(full.to_string(), "rediss://[::1]:7000/3?prefix=a:b&name=pod-1");
        let cluster = redis("redis-cluster+tls://h1,h2:7001,10.0.0.3");
        assert_eq!(cluster.nodes, [node("h1", 6379), node("h2", 7001), node("10.0.0.3", 6379)]);
        assert!(cluster.is_cluster && cluster.has_tls);
    }

    #[test]
    fn a_password_in_a_url_is_refused_and_never_shown() {
        for url in [
            "redis://me:hunter2@h",
            "rediss://:hunter2@h",
            "redis-cluster://a:hunter2@h1,h2",
            "http://a:hunter2@h",
        ] {
            let problem = problem(url);
            assert!(!problem.contains("hunter2"), "{problem}");
        }
        assert!(problem("redis://me:hunter2@h").contains("--checkpoint-store-password-file"));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, said) in [
            ("/var/lib/checkpoint", "write file:PATH"),
            ("file:", "names no file"),
            ("file://host/path", "on this host"),
            ("http://h", "write file:PATH"),
            ("redis:h", "write file:PATH"),
            ("nats://h:4222/b", "--nats"),
            ("nats://", "bucket"),
            ("nats://b/a b", "object name"),
            ("nats://b?replicas=9", "1 to 5"),
            ("redis://", "HOST"),
            ("redis://h:x", "HOST:PORT"),
            ("redis://::1", "brackets"),
            ("redis://h1,h2", "redis-cluster"),
            ("redis://@h", "empty"),
            ("redis://h/x", "database"),
            ("redis://h?ttl-s=5", "60 to"),
            ("redis://h?prefix={a}", "prefix"),
            ("redis://h?password=x", "not known"),
            ("redis://h?name", "KEY=VALUE"),
            ("redis-cluster://h/1", "one database"),
        ] {
            assert!(problem(text).contains(said), "{text}: {}", problem(text));
        }
    }
}
