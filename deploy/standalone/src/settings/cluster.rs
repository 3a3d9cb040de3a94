//! `[cluster]`: how the key space is cut, and which part of it a server owns.

use clap::Args;
use kvatlas_proto::{Partition, ShardSet};
use serde::Deserialize;

use crate::failure::Failure;

/// `[cluster]`: one index of many servers. The number of shards is for shims and servers, the rest for servers.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct ClusterSettings {
    /// Virtual shards that the key space is cut into, 1 to 1024: the same for every shim and server of the deployment, and
    /// not to be changed later; two to four times the servers that it may ever have. Default: 1, which is not cut.
    #[arg(long, env = "KVATLAS_SHARDS", value_name = "SHARDS")]
    pub shards: Option<u32>,
    /// Servers that the shards are divided among. Default: 1. Servers with the same ordinal are replicas. With --shard-lease:
    /// how the shards are divided until `kvatlas cluster resize` says otherwise.
    #[arg(long, env = "KVATLAS_SHARD_SERVERS", value_name = "SERVERS")]
    pub shard_servers: Option<u32>,
    /// Which of them this server is, from 0; or `hostname` for the number that the host's name ends with, as a StatefulSet
    /// numbers its pods. A larger number wraps around, so twice as many pods are two replicas each. Default: 0.
    #[arg(long, env = "KVATLAS_SHARD_ORDINAL", value_name = "ORDINAL")]
    pub shard_ordinal: Option<String>,
    /// Take a part of the shards that needs a server, instead of the part that --shard-ordinal names: servers agree by leases in
    /// a bucket of the broker (JetStream, nats-server 2.11 or newer), and `kvatlas cluster resize` changes how many parts there
    /// are. Default: false.
    #[arg(long, env = "KVATLAS_SHARD_LEASE", value_name = "BOOL", num_args = 0..=1, require_equals = true,
        default_missing_value = "true")]
    pub shard_lease: Option<bool>,
}

/// Which part of the shards a server owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// The key space is not cut.
    Whole,
    /// This one, by configuration.
    Fixed(ShardSet),
    /// One that the servers agree on.
    Leased {
        /// Parts, if nobody has said how many there are.
        initial_servers: u16,
    },
}

// === impl ClusterSettings ===

impl ClusterSettings {
    pub(super) fn or(self, file: Self) -> Self {
        Self {
            shards: self.shards.or(file.shards),
            shard_servers: self.shard_servers.or(file.shard_servers),
            shard_ordinal: self.shard_ordinal.or(file.shard_ordinal),
            shard_lease: self.shard_lease.or(file.shard_lease),
        }
    }

    /// How the key space is cut.
    pub fn partition(&self) -> Result<Partition, Failure> {
        Partition::new(self.shards.unwrap_or(1)).map_err(|error| Failure::usage(error.to_string()))
    }

    /// What a server owns. Leases need a broker.
    pub fn ownership(&self, has_broker: bool) -> Result<Ownership, Failure> {
        if !self.shard_lease.unwrap_or(false) {
            return Ok(self.shard_set()?.map_or(Ownership::Whole, Ownership::Fixed));
        }
        let refuse = |why: &str| Err(Failure::usage(format!("--shard-lease {why}")));
        if self.shard_ordinal.is_some() {
            return refuse("and --shard-ordinal are two ways to say what a server owns: give one of them");
        }
        if !has_broker {
            return refuse("needs a broker to agree with other servers: add --nats URL");
        }
        match self.shard_set()? {
            None => refuse("needs a key space in pieces: give --shards, for example 64"),
            Some(set) => Ok(Ownership::Leased { initial_servers: set.servers() }),
        }
    }

    /// The set of shards by configuration; `None` where the key space is not cut.
    fn shard_set(&self) -> Result<Option<ShardSet>, Failure> {
        let partition = self.partition()?;
        let servers = self.shard_servers.unwrap_or(1);
        if partition == Partition::WHOLE {
            return if servers == 1 {
                Ok(None)
            } else {
                Err(Failure::usage(format!(
                    "a key space in one piece cannot be divided among {servers} servers: give --shards, for example {}",
                    servers.saturating_mul(4).next_power_of_two()
                )))
            };
        }
        if servers > u32::from(partition.shards()) {
            return Err(Failure::usage(format!(
                "{} shards cannot be divided among {servers} servers: each needs one",
                partition.shards()
            )));
        }
        let ordinal = match self.shard_ordinal.as_deref() {
            None => 0,
            Some("hostname") => {
                let name = std::env::var("HOSTNAME").or_else(|_| std::fs::read_to_string("/etc/hostname"));
                trailing_number(name.unwrap_or_default().trim())?
            }
            Some(number) => number.parse().map_err(|_| {
                Failure::usage(format!("{number:?} is no ordinal: give a number from 0, or hostname"))
            })?,
        };
        let set = ShardSet::new(ordinal % servers.max(1), servers);
        set.map(Some).map_err(|error| Failure::usage(error.to_string()))
    }
}

fn trailing_number(name: &str) -> Result<u32, Failure> {
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    name[name.len() - digits..].parse().map_err(|_| {
        Failure::usage(format!(
            "the host's name {name:?} does not end with a number: give --shard-ordinal a number from 0"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(shards: u32, servers: u32, ordinal: &str) -> Result<Option<ShardSet>, String> {
        let settings = ClusterSettings {
            shards: Some(shards),
            shard_servers: Some(servers),
            shard_ordinal: Some(ordinal.to_owned()),
            shard_lease: None,
        };
        settings.shard_set().map_err(|failure| failure.to_string())
    }

    #[test]
    fn ordinals_wrap_around_so_that_more_pods_are_replicas() {
        assert_eq!(set(64, 4, "6").unwrap(), Some(ShardSet::new(2, 4).unwrap()));
        assert_eq!(set(1, 1, "0").unwrap(), None);
    }

    #[test]
    fn a_lease_replaces_the_ordinal_and_needs_a_broker_and_pieces() {
        let leased = |shards, ordinal: Option<&str>| ClusterSettings {
            shards: Some(shards),
            shard_servers: Some(3),
            shard_ordinal: ordinal.map(str::to_owned),
            shard_lease: Some(true),
        };
        assert_eq!(leased(64, None).ownership(true).unwrap(), Ownership::Leased { initial_servers: 3 });
        let refused = |settings: ClusterSettings, broker| settings.ownership(broker).unwrap_err().to_string();
        assert!(refused(leased(64, Some("0")), true).contains("--shard-ordinal"));
        assert!(refused(leased(64, None), false).contains("--nats"));
        let whole = ClusterSettings { shard_servers: None, ..leased(1, None) };
        assert!(refused(whole, true).contains("--shards"));
        let fixed = ClusterSettings { shard_lease: Some(false), ..leased(64, Some("1")) };
        assert_eq!(fixed.ownership(false).unwrap(), Ownership::Fixed(ShardSet::new(1, 3).unwrap()));
    }

    #[test]
    fn what_cannot_be_divided_is_refused_with_what_can() {
        assert!(set(1, 4, "0").unwrap_err().contains("--shards, for example 16"));
        assert!(set(4, 8, "0").unwrap_err().contains("each needs one"));
        assert!(set(64, 4, "x").unwrap_err().contains("hostname"));
        assert_eq!(trailing_number("kvatlas-12").unwrap(), 12);
        assert!(trailing_number("kvatlas").is_err());
    }
}
