//! Every NATS subject of kvatlas, built and parsed in one place.
//!
//! ```text
//! PREFIX.v1.ev.SCOPE.SHARD.INSTANCE.RANK     event frames of one source
//! PREFIX.v1.ctl.INSTANCE.RANK                requests to the publisher of one source
//! PREFIX.v1.rep.ASKER.INSTANCE.RANK          its answers to one asker
//! PREFIX.v1.hello                            asks every publisher for a heartbeat now
//! PREFIX.v1.q.SET                            a question to any one server that owns a set of shards (a queue group)
//! PREFIX.v1.hq.SET                           the same question again, to all of them: the first was slow
//! PREFIX.v1.qr.ASKER.NUMBER                  the answer
//! PREFIX.v1.srv                              servers say which sets they own
//! PREFIX.v1.exp                              a server says which blocks a request that was routed will bring
//! ```
//!
//! `PREFIX` is the deployment's name (default `kvatlas`), `SCOPE` the scope token (16 hex digits), `SHARD` the virtual
//! shard (`17of64`; `all` where the key space is not cut), `SET` a set of shards (`2of4` servers), `INSTANCE` the instance name with every byte outside
//! `[A-Za-z0-9_-]` written as `=XX`. A subscription to [`Subjects::all_events`] therefore sees every event, and an
//! operator can put a JetStream stream over it for audit or replay without a change here.

use std::fmt::{self, Write as _};

use crate::ids::{DpRank, InstanceId, SourceId};
use crate::scope::ScopeToken;
use crate::shard::{ShardId, ShardSet};

/// Subject prefix of a deployment that names none.
pub const DEFAULT_PREFIX: &str = "kvatlas";
/// Version of the subject layout.
const VERSION: &str = "v1";
/// Longest name of an asker, in bytes.
const MAX_ASKER_BYTES: usize = 64;

/// Builds and parses the subjects of one deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subjects {
    prefix: String,
}

/// The prefix cannot be a NATS subject.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("subject prefix {0:?} is not usable: give 1 to 64 of A-Z a-z 0-9 _ - separated by single dots")]
pub struct InvalidPrefixError(String);

/// The name cannot be a word of a subject.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} cannot name an asker: give 1 to {MAX_ASKER_BYTES} of A-Z a-z 0-9 _ -")]
pub struct InvalidAskerError(String);

/// Who asks publishers and gets their answers: one life of one index server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asker(String);

/// The subject is not one of ours.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("subject {0:?} is not a kvatlas subject of this deployment")]
pub struct UnknownSubjectError(String);

/// A parsed subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Event frames of one source.
    Events {
        /// Which key space.
        scope: ScopeToken,
        /// Which part of it.
        shard: ShardId,
        /// Who publishes.
        source: SourceId,
    },
    /// A request to one source's publisher.
    Control {
        /// Who is asked.
        source: SourceId,
    },
    /// An answer of one source's publisher.
    Reply {
        /// Who had asked.
        asker: Asker,
        /// Who answers.
        source: SourceId,
    },
    /// Every publisher is to show itself.
    Hello,
    /// The answer of an index server to another one's question.
    Answer {
        /// Who had asked.
        asker: Asker,
        /// Which of its questions.
        number: u64,
    },
}

// === impl Subjects ===

impl Default for Subjects {
    fn default() -> Self {
        Self { prefix: DEFAULT_PREFIX.to_owned() }
    }
}

impl Subjects {
    /// Accepts dot-separated words of `[A-Za-z0-9_-]`, at most 64 bytes.
    pub fn new(prefix: impl Into<String>) -> Result<Self, InvalidPrefixError> {
        let prefix = prefix.into();
        let word = |w: &str| !w.is_empty() && w.bytes().all(is_plain);
        if prefix.is_empty() || prefix.len() > 64 || !prefix.split('.').all(word) {
            return Err(InvalidPrefixError(prefix));
        }
        Ok(Self { prefix })
    }

    /// Where `source` publishes its frames of `shard` of `scope`.
    pub fn events(&self, scope: ScopeToken, shard: ShardId, source: &SourceId) -> String {
        format!("{}.{VERSION}.ev.{scope}.{shard}.{}", self.prefix, source_token(source))
    }

    /// Matches the events of one shard, of every scope and source.
    pub fn events_in(&self, shard: ShardId) -> String {
        format!("{}.{VERSION}.ev.*.{shard}.>", self.prefix)
    }

    /// Matches the events of every scope, shard and source.
    pub fn all_events(&self) -> String {
        format!("{}.{VERSION}.ev.>", self.prefix)
    }

    /// Where the publisher of `source` listens for requests.
    pub fn control(&self, source: &SourceId) -> String {
        format!("{}.{VERSION}.ctl.{}", self.prefix, source_token(source))
    }

    /// Where the publisher of `source` answers `asker`.
    pub fn reply(&self, asker: &Asker, source: &SourceId) -> String {
        format!("{}.{VERSION}.rep.{}.{}", self.prefix, asker.0, source_token(source))
    }

    /// Matches every answer to `asker`.
    pub fn all_replies(&self, asker: &Asker) -> String {
        format!("{}.{VERSION}.rep.{}.>", self.prefix, asker.0)
    }

    /// Matches the events of one instance, or of one rank of it, in every scope and shard.
    pub(crate) fn events_of(&self, instance: &InstanceId, rank: Option<DpRank>) -> String {
        format!("{}.{VERSION}.ev.*.*.{}", self.prefix, instance_pattern(instance, rank))
    }

    /// Matches the answers of one instance, or of one rank of it, to every asker.
    pub(crate) fn replies_of(&self, instance: &InstanceId, rank: Option<DpRank>) -> String {
        format!("{}.{VERSION}.rep.*.{}", self.prefix, instance_pattern(instance, rank))
    }

    /// Matches where one instance, or one rank of it, listens for requests.
    pub(crate) fn control_of(&self, instance: &InstanceId, rank: Option<DpRank>) -> String {
        format!("{}.{VERSION}.ctl.{}", self.prefix, instance_pattern(instance, rank))
    }

    /// Matches where every publisher listens for requests.
    pub(crate) fn all_controls(&self) -> String {
        self.below("ctl.>")
    }

    /// Words below the deployment's prefix and the version.
    pub(crate) fn below(&self, words: &str) -> String {
        format!("{}.{VERSION}.{words}", self.prefix)
    }

    /// Where every publisher is asked for a sign of life.
    pub fn hello(&self) -> String {
        format!("{}.{VERSION}.hello", self.prefix)
    }

    /// Where one of the servers that own `set` is asked.
    pub fn query(&self, set: ShardSet) -> String {
        format!("{}.{VERSION}.q.{set}", self.prefix)
    }

    /// Where all servers that own `set` are asked, because one was slow.
    pub fn hedge(&self, set: ShardSet) -> String {
        format!("{}.{VERSION}.hq.{set}", self.prefix)
    }

    /// Where `asker` is answered its question of this number.
    pub fn answer(&self, asker: &Asker, number: u64) -> String {
        format!("{}.{VERSION}.qr.{}.{number}", self.prefix, asker.0)
    }

    /// Matches every answer of a server to `asker`.
    pub fn all_answers(&self, asker: &Asker) -> String {
        format!("{}.{VERSION}.qr.{}.*", self.prefix, asker.0)
    }

    /// Where servers say which sets they own.
    pub fn servers(&self) -> String {
        format!("{}.{VERSION}.srv", self.prefix)
    }

    /// Where servers say which blocks requests that were routed will bring.
    pub fn speculations(&self) -> String {
        format!("{}.{VERSION}.exp", self.prefix)
    }

    /// Name of the key-value bucket in which servers agree who owns which set. Dots, which a bucket's name cannot have, are
    /// written so that two prefixes never have one bucket.
    pub fn slot_bucket(&self) -> String {
        format!("{}-shards", self.prefix.replace('_', "__").replace('.', "_-"))
    }

    /// The inverse of the above, as far as what is received on a pattern is concerned.
    pub fn parse(&self, subject: &str) -> Result<Subject, UnknownSubjectError> {
        self.parse_inner(subject).ok_or_else(|| UnknownSubjectError(subject.to_owned()))
    }

    fn parse_inner(&self, subject: &str) -> Option<Subject> {
        let rest = subject.strip_prefix(&self.prefix)?.strip_prefix('.')?;
        let words: Vec<&str> = rest.split('.').collect();
        match words.as_slice() {
            [VERSION, "ev", scope, shard, instance, rank] => Some(Subject::Events {
                scope: ScopeToken(parse_hex16(scope)?),
                shard: parse_shard(shard)?,
                source: parse_source(instance, rank)?,
            }),
            [VERSION, "ctl", instance, rank] => {
                Some(Subject::Control { source: parse_source(instance, rank)? })
            }
            [VERSION, "rep", asker, instance, rank] => Some(Subject::Reply {
                asker: Asker::new(*asker).ok()?,
                source: parse_source(instance, rank)?,
            }),
            [VERSION, "hello"] => Some(Subject::Hello),
            [VERSION, "qr", asker, number] => {
                Some(Subject::Answer { asker: Asker::new(*asker).ok()?, number: parse_decimal(number)? })
            }
            _ => None,
        }
    }
}

// === impl Asker ===

impl Asker {
    /// Accepts 1 to 64 of `[A-Za-z0-9_-]`. Two lives of a server need two names: answers to the first would else
    /// reach the second.
    pub fn new(name: impl Into<String>) -> Result<Self, InvalidAskerError> {
        let name = name.into();
        if name.is_empty() || name.len() > MAX_ASKER_BYTES || !name.bytes().all(is_plain) {
            return Err(InvalidAskerError(name));
        }
        Ok(Self(name))
    }
}

impl fmt::Display for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-'
}

fn source_token(source: &SourceId) -> String {
    format!("{}.{}", instance_token(&source.instance), source.rank)
}

fn instance_pattern(instance: &InstanceId, rank: Option<DpRank>) -> String {
    let token = instance_token(instance);
    rank.map_or_else(|| format!("{token}.*"), |rank| format!("{token}.{rank}"))
}

fn instance_token(instance: &InstanceId) -> String {
    let mut out = String::with_capacity(instance.as_str().len() + 8);
    for byte in instance.as_str().bytes() {
        if is_plain(byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "={byte:02X}").expect("writing to a string");
        }
    }
    out
}

fn parse_source(instance: &str, rank: &str) -> Option<SourceId> {
    let mut name = Vec::with_capacity(instance.len());
    let mut bytes = instance.bytes();
    while let Some(byte) = bytes.next() {
        name.push(match byte {
            b'=' => {
                let (high, low) = (upper_hex(bytes.next()?)?, upper_hex(bytes.next()?)?);
                let value = (high << 4) | low;
                // One spelling per name: an escaped plain byte would be a second one.
                (!is_plain(value)).then_some(value)?
            }
            plain if is_plain(plain) => plain,
            _ => return None,
        });
    }
    let instance = InstanceId::new(String::from_utf8(name).ok()?).ok()?;
    Some(SourceId { instance, rank: DpRank(parse_decimal(rank)?) })
}

fn parse_shard(word: &str) -> Option<ShardId> {
    if word == "all" {
        return Some(ShardId::WHOLE);
    }
    let (number, of) = word.split_once("of")?;
    // The whole has one spelling.
    ShardId::new(parse_decimal(number)?, parse_decimal(of)?).filter(|shard| *shard != ShardId::WHOLE)
}

fn upper_hex(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

fn parse_hex16(word: &str) -> Option<u64> {
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (word.len() == 16 && word.bytes().all(lower)).then(|| u64::from_str_radix(word, 16).ok())?
}

/// Decimal without leading zeros or sign, so that each number has one spelling.
fn parse_decimal<T: std::str::FromStr + ToString>(word: &str) -> Option<T> {
    let value: T = word.parse().ok()?;
    (value.to_string() == word).then_some(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn source(name: &str, rank: u32) -> SourceId {
        SourceId { instance: InstanceId::new(name).unwrap(), rank: DpRank(rank) }
    }

    #[test]
    fn events_subject_is_what_the_documentation_shows() {
        let subject =
            Subjects::default().events(ScopeToken(0xab), ShardId::WHOLE, &source("10.0.0.7:8000", 2));
        assert_eq!(subject, "kvatlas.v1.ev.00000000000000ab.all.10=2E0=2E0=2E7=3A8000.2");
    }

    #[test]
    fn foreign_subjects_are_refused() {
        let subjects = Subjects::default();
        for bad in [
            "",
            "kvatlas",
            "kvatlas.v2.ctl.a.0",
            "other.v1.ctl.a.0",
            "kvatlas.v1.ctl.a.01",
            "kvatlas.v1.ctl.=41.0",
            "kvatlas.v1.ctl.=2e.0",
            "kvatlas.v1.ev.AB.all.a.0",
            "kvatlas.v1.ev.00000000000000ab.0of1.a.0",
            "kvatlas.v1.ev.00000000000000ab.4of4.a.0",
            "kvatlas.v1.ev.00000000000000ab.01of4.a.0",
        ] {
            assert!(subjects.parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn prefixes_with_wildcards_or_empty_words_are_refused() {
        for bad in ["", "a..b", "a.*", ">", "a b", "."] {
            assert!(Subjects::new(bad).is_err(), "{bad}");
        }
        assert!(Subjects::new("prod.kv-1").is_ok());
    }

    #[test]
    fn every_deployment_has_a_bucket_of_its_own() {
        let bucket = |prefix: &str| Subjects::new(prefix).unwrap().slot_bucket();
        assert_eq!(Subjects::default().slot_bucket(), "kvatlas-shards");
        let prefixes = ["a.b", "a_b", "a-b", "a_-b", "a__b", "a._b", "a_.b"];
        let buckets: std::collections::BTreeSet<String> = prefixes.map(bucket).into();
        assert_eq!(buckets.len(), prefixes.len(), "{buckets:?}");
        assert!(buckets.iter().all(|name| !name.contains('.')));
    }

    proptest! {
        #[test]
        fn subjects_round_trip(
            name in "[!-~]{1,40}", rank in any::<u32>(), token in any::<u64>(), of in 1u16..1_024, asked in any::<u64>(),
        ) {
            let subjects = Subjects::new("prod.kv").unwrap();
            let source = source(&name, rank);
            let shard = ShardId::new((asked % u64::from(of)) as u16, of).unwrap();
            let events = subjects.events(ScopeToken(token), shard, &source);
            let control = subjects.control(&source);
            prop_assert_eq!(
                subjects.parse(&events),
                Ok(Subject::Events { scope: ScopeToken(token), shard, source: source.clone() })
            );
            prop_assert_eq!(subjects.parse(&control), Ok(Subject::Control { source: source.clone() }));
            let asker = Asker::new("index-7").unwrap();
            let reply = subjects.reply(&asker, &source);
            prop_assert_eq!(subjects.parse(&reply), Ok(Subject::Reply { asker, source }));
            prop_assert_eq!(subjects.parse(&subjects.hello()), Ok(Subject::Hello));
            let asker = Asker::new("index-7").unwrap();
            let answer = subjects.answer(&asker, asked);
            prop_assert_eq!(subjects.parse(&answer), Ok(Subject::Answer { asker, number: asked }));
        }
    }
}
