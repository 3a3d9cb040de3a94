//! What each role may publish and subscribe to on the broker, from the code that builds the subjects, so that permissions
//! and subjects cannot drift apart.
//!
//! The broker is the only place where this can be enforced: an index believes an event because only its source may publish on
//! that source's subject.

use crate::ids::{DpRank, InstanceId};
use crate::subject::Subjects;

/// Subjects that one connection uses for itself: a subscription is confirmed by a message to oneself. No data passes there.
const OWN_INBOX: &str = "_INBOX.>";

/// What index servers tell each other, below the deployment's prefix: questions about shards and hot keys, their answers, and
/// who is there. Shims and observers have no business there.
const BETWEEN_SERVERS: [&str; 5] = ["q.>", "hq.>", "qr.>", "srv", "exp"];

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusRole {
    /// The publisher of one instance.
    Shim {
        /// Whose events it publishes.
        instance: InstanceId,
        /// One data-parallel rank; `None`: all of them.
        rank: Option<DpRank>,
    },
    /// An index server.
    Index,
    /// Somebody who only listens to events, for audit.
    Observer,
}

/// Subjects and patterns; everything else is forbidden.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    /// May be published on.
    pub publish: Vec<String>,
    /// May be subscribed to.
    pub subscribe: Vec<String>,
}

/// What is asked of the broker about the bucket of slots; it has no other use for a server.
const SLOT_REQUESTS: [&str; 5] =
    ["STREAM.INFO", "STREAM.CREATE", "STREAM.UPDATE", "STREAM.PURGE", "STREAM.MSG.GET"];

// === impl Subjects ===

impl Subjects {
    /// What servers publish that take their shards by lease.
    fn slots(&self) -> impl Iterator<Item = String> + use<> {
        let bucket = self.slot_bucket();
        let requests = SLOT_REQUESTS.map(|request| format!("$JS.API.{request}.KV_{bucket}"));
        [format!("$KV.{bucket}.>")].into_iter().chain(requests)
    }

    /// What `role` needs, and nothing more.
    pub fn permissions(&self, role: &BusRole) -> Permissions {
        let inbox = || OWN_INBOX.to_owned();
        match role {
            BusRole::Shim { instance, rank } => Permissions {
                publish: vec![self.events_of(instance, *rank), self.replies_of(instance, *rank), inbox()],
                subscribe: vec![self.control_of(instance, *rank), self.hello(), inbox()],
            },
            BusRole::Index => {
                let between = || BETWEEN_SERVERS.iter().map(|words| self.below(words));
                Permissions {
                    publish: [self.all_controls(), self.hello()]
                        .into_iter()
                        .chain(between())
                        .chain(self.slots())
                        .chain([inbox()])
                        .collect(),
                    // A server's name is new in each life, so this names the answers to all servers.
                    subscribe: [self.all_events(), self.below("rep.>")]
                        .into_iter()
                        .chain(between())
                        .chain([inbox()])
                        .collect(),
                }
            }
            BusRole::Observer => {
                Permissions { publish: vec![inbox()], subscribe: vec![self.all_events(), inbox()] }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SourceId;
    use crate::scope::ScopeToken;
    use crate::shard::ShardId;
    use crate::subject::Asker;

    /// NATS' rule: `*` is one word, a last `>` one or more.
    fn matches(pattern: &str, subject: &str) -> bool {
        let (mut pattern, mut subject) = (pattern.split('.'), subject.split('.'));
        loop {
            match (pattern.next(), subject.next()) {
                (Some(">"), Some(_)) | (None, None) => return true,
                (Some(word), Some(other)) if word == "*" || word == other => {}
                _ => return false,
            }
        }
    }

    fn allows(patterns: &[String], subject: &str) -> bool {
        patterns.iter().any(|pattern| matches(pattern, subject))
    }

    fn source(instance: &str, rank: u32) -> SourceId {
        SourceId { instance: InstanceId::new(instance).unwrap(), rank: DpRank(rank) }
    }

    struct Every {
        events: String,
        reply: String,
        control: String,
    }

    fn every(subjects: &Subjects, source: &SourceId) -> Every {
        Every {
            events: subjects.events(ScopeToken(7), ShardId::WHOLE, source),
            reply: subjects.reply(&Asker::new("index-1").unwrap(), source),
            control: subjects.control(source),
        }
    }

    #[test]
    fn a_shim_speaks_for_its_instance_alone() {
        let subjects = Subjects::new("prod.kv").unwrap();
        let own = source("10.0.0.7:8000", 0);
        let all_ranks = BusRole::Shim { instance: own.instance.clone(), rank: None };
        let one_rank = BusRole::Shim { instance: own.instance.clone(), rank: Some(own.rank) };
        for (role, second_rank) in [(all_ranks, true), (one_rank, false)] {
            let may = subjects.permissions(&role);
            for (asked, allowed) in [
                (own.clone(), true),
                (source("10.0.0.7:8000", 1), second_rank),
                (source("10.0.0.8:8000", 0), false),
                (source("*", 0), false),
            ] {
                let Every { events, reply, control } = every(&subjects, &asked);
                let partition = subjects.events(ScopeToken(7), ShardId::new(3, 64).unwrap(), &asked);
                for subject in [&events, &reply, &partition] {
                    assert_eq!(allows(&may.publish, subject), allowed, "{role:?} {subject}");
                    assert!(!allows(&may.subscribe, subject), "{role:?} {subject}");
                }
                assert_eq!(allows(&may.subscribe, &control), allowed, "{role:?} {control}");
                assert!(!allows(&may.publish, &control), "{role:?} {control}");
            }
            assert!(allows(&may.subscribe, &subjects.hello()) && !allows(&may.publish, &subjects.hello()));
        }
    }

    #[test]
    fn an_index_asks_and_listens_and_never_speaks_for_a_source() {
        let subjects = Subjects::default();
        let may = subjects.permissions(&BusRole::Index);
        let Every { events, reply, control } = every(&subjects, &source("a:1", 0));
        assert!(allows(&may.publish, &control) && allows(&may.publish, &subjects.hello()));
        assert!(allows(&may.subscribe, &events) && allows(&may.subscribe, &reply));
        for subject in [&events, &reply] {
            assert!(!allows(&may.publish, subject), "{subject}");
        }
    }

    #[test]
    fn what_servers_tell_each_other_is_for_servers() {
        let subjects = Subjects::default();
        let shim = BusRole::Shim { instance: InstanceId::new("a:1").unwrap(), rank: None };
        for subject in
            ["kvatlas.v1.q.1", "kvatlas.v1.hq.1", "kvatlas.v1.qr.x.1", "kvatlas.v1.srv", "kvatlas.v1.exp"]
        {
            let index = subjects.permissions(&BusRole::Index);
            assert!(allows(&index.publish, subject) && allows(&index.subscribe, subject), "{subject}");
            for role in [&shim, &BusRole::Observer] {
                let may = subjects.permissions(role);
                assert!(!allows(&may.publish, subject) && !allows(&may.subscribe, subject), "{subject}");
            }
        }
    }

    #[test]
    fn an_observer_hears_events_and_says_nothing() {
        let subjects = Subjects::default();
        let may = subjects.permissions(&BusRole::Observer);
        let Every { events, reply, control } = every(&subjects, &source("a:1", 0));
        assert!(allows(&may.subscribe, &events));
        assert!(!allows(&may.subscribe, &reply) && !allows(&may.subscribe, &control));
        assert_eq!(may.publish, [OWN_INBOX], "beside its own inbox");
    }

    #[test]
    fn nobody_reaches_another_deployment() {
        let (ours, other) = (Subjects::new("a").unwrap(), Subjects::new("b").unwrap());
        let Every { events, reply, control } = every(&other, &source("a:1", 0));
        let shim = BusRole::Shim { instance: InstanceId::new("a:1").unwrap(), rank: None };
        for role in [shim, BusRole::Index, BusRole::Observer] {
            let may = ours.permissions(&role);
            for subject in [&events, &reply, &control, &other.hello()] {
                assert!(!allows(&may.publish, subject) && !allows(&may.subscribe, subject), "{subject}");
            }
        }
    }
}
