//! The policies that are compared, by name.

use std::fmt;
use std::str::FromStr;

/// How requests are routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Policy {
    /// Anybody.
    Random,
    /// One after the other.
    RoundRobin,
    /// Whoever has the least to prefill.
    LeastLoad,
    /// Where the session was before; a new one goes to the least loaded.
    Session,
    /// The longest prefix that the router itself sent there before, beside load.
    Approximate,
    /// The longest prefix by the index, whatever the load.
    Overlap,
    /// llm-d's weighted sum with precise prefixes from the index.
    Llmd,
    /// Dynamo's router over the index.
    Dynamo,
    /// Least expected time to first token with what the pod itself holds: Mooncake's cache-aware local.
    Local,
    /// The same where blocks may be pulled from peers: cache-aware global.
    Global,
    /// The planner's best plan, with the cost of work for others in it.
    Ours,
}

/// There is no such policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no policy {name:?}: give all or some of {}, separated by commas", Policy::ALL.map(Policy::name).join(", "))]
pub struct UnknownPolicyError {
    /// What was asked for.
    pub name: String,
}

// === impl Policy ===

impl Policy {
    /// All of them, simple ones first.
    pub const ALL: [Self; 11] = [
        Self::Random,
        Self::RoundRobin,
        Self::LeastLoad,
        Self::Session,
        Self::Approximate,
        Self::Overlap,
        Self::Llmd,
        Self::Dynamo,
        Self::Local,
        Self::Global,
        Self::Ours,
    ];

    /// Its name on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::LeastLoad => "least-load",
            Self::Session => "session",
            Self::Approximate => "approximate",
            Self::Overlap => "overlap",
            Self::Llmd => "llm-d",
            Self::Dynamo => "dynamo",
            Self::Local => "local",
            Self::Global => "global",
            Self::Ours => "ours",
        }
    }

    /// Whether it asks the index.
    pub fn asks_index(self) -> bool {
        self >= Self::Overlap
    }

    /// Those that are named, separated by commas; `all` is all of them.
    pub fn parse_list(names: &str) -> Result<Vec<Self>, UnknownPolicyError> {
        if names == "all" {
            return Ok(Self::ALL.to_vec());
        }
        let mut policies: Vec<Self> =
            names.split(',').map(|name| name.trim().parse()).collect::<Result<_, _>>()?;
        policies.sort_unstable();
        policies.dedup();
        Ok(policies)
    }
}

impl FromStr for Policy {
    type Err = UnknownPolicyError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|policy| policy.name() == name);
        known.ok_or_else(|| UnknownPolicyError { name: name.to_owned() })
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
