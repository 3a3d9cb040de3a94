//! One engine as settings name it, and the shim configuration it stands for.

use std::str::FromStr;

use kvatlas_proto::subject::Subjects;
use kvatlas_proto::{DpRank, InstanceId, KeyHasher, Partition};
use kvatlas_shim::adapter::{self, ADAPTERS};
use kvatlas_shim::mirror::{MirrorLimits, RemovalPolicy, STORE_ONLY_TTL_NS};
use kvatlas_shim::shim::{EndpointConfig, ShimConfig};
use kvatlas_shim::zmq::Attach;
use serde::Deserialize;

use crate::failure::Failure;

/// Most data-parallel ranks of one engine.
const MAX_RANKS: u32 = 1_024;

/// `[[engine]]`, or `--engine KEY=VALUE,...` with the same keys.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct EngineSpec {
    /// Model name as the engine serves it.
    pub model: String,
    /// What a gateway routes to, for example 10.0.0.7:8000.
    pub instance: String,
    /// Event socket, for example tcp://10.0.0.7:5557.
    pub zmq: String,
    /// Replay socket, for example tcp://10.0.0.7:5657. Without it a gap costs what was known.
    pub replay: Option<String>,
    /// Who speaks: vllm, sglang, envelope, or auto (the default), which the first messages decide.
    #[serde(default)]
    pub adapter: String,
    /// Only messages whose topic starts with this.
    #[serde(default)]
    pub topic: String,
    /// Tenant.
    #[serde(default)]
    pub tenant: String,
    /// Tokens per block; absent: the engine's.
    pub block_size: Option<u32>,
    /// Data-parallel ranks: rank i uses both ports plus i.
    #[serde(default = "one")]
    pub data_parallel_size: u32,
    /// Who opens the connection; absent: the shim, unless the address is a wildcard.
    pub attach: Option<AttachSpec>,
    /// What a removal says about copies; per-copy is right for vLLM up to 0.33, last-copy for engines with
    /// kv_cache_report_mode=full.
    #[serde(default)]
    pub removal: RemovalSpec,
    /// Seconds for which a block counts on a medium that never announces removals; 0: for ever. Default: 3600.
    pub store_only_ttl_s: Option<u64>,
}

/// Who opens the connection.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum AttachSpec {
    /// The shim.
    Connect,
    /// The engine.
    Bind,
}

/// What a removal says about copies.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum RemovalSpec {
    /// One copy goes.
    #[default]
    PerCopy,
    /// The last copy goes.
    LastCopy,
}

fn one() -> u32 {
    1
}

// === impl EngineSpec ===

impl FromStr for EngineSpec {
    type Err = String;

    /// KEY=VALUE pairs separated by commas.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut table = toml::Table::new();
        for pair in text.split(',').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| format!("{pair:?} is not KEY=VALUE"))?;
            let value = match value.parse::<i64>() {
                Ok(number) if key.ends_with("size") || key.ends_with("-s") => toml::Value::Integer(number),
                _ => toml::Value::String(value.to_owned()),
            };
            table.insert(key.to_owned(), value);
        }
        toml::Value::Table(table).try_into().map_err(|error: toml::de::Error| error.message().to_owned())
    }
}

impl EngineSpec {
    /// What the shim is to do for this engine.
    pub fn shim_config(
        &self,
        hasher: KeyHasher,
        partition: Partition,
        subjects: &Subjects,
    ) -> Result<ShimConfig, Failure> {
        let name = &self.instance;
        let fail = |problem: String| Failure::usage(format!("engine {name:?}: {problem}"));
        if !(1..=MAX_RANKS).contains(&self.data_parallel_size) {
            return Err(fail(format!("data-parallel-size must be 1 to {MAX_RANKS}")));
        }
        let wildcard = self.zmq.contains("://*:") || self.zmq.contains("://0.0.0.0:");
        let attach = match self.attach {
            Some(AttachSpec::Bind) => Attach::Bind,
            None if wildcard => Attach::Bind,
            Some(AttachSpec::Connect) | None => Attach::Connect,
        };
        let endpoint = |rank: u32| -> Result<EndpointConfig, Failure> {
            let shifted = |address: &String| shift_port(address, rank).map_err(&fail);
            Ok(EndpointConfig {
                events: shifted(&self.zmq)?,
                attach,
                replay: self.replay.as_ref().map(shifted).transpose()?,
                topic: self.topic.clone(),
                rank: (self.data_parallel_size > 1).then_some(DpRank(rank)),
            })
        };
        let adapter = match self.adapter.as_str() {
            "" | "auto" => None,
            name => Some(adapter::adapter(name).ok_or_else(|| {
                let known: Vec<&str> = ADAPTERS.iter().map(|adapter| adapter.name()).collect();
                fail(format!("there is no adapter {name:?}; use auto or one of {}", known.join(", ")))
            })?),
        };
        Ok(ShimConfig {
            partition,
            adapter,
            model: self.model.clone(),
            tenant: self.tenant.clone(),
            instance: InstanceId::new(name).map_err(|error| Failure::usage(error.to_string()))?,
            endpoints: (0..self.data_parallel_size).map(endpoint).collect::<Result<_, _>>()?,
            block_size: self.block_size,
            removal: match self.removal {
                RemovalSpec::PerCopy => RemovalPolicy::PerCopy,
                RemovalSpec::LastCopy => RemovalPolicy::LastCopy,
            },
            hasher,
            limits: MirrorLimits {
                store_only_ttl_ns: self
                    .store_only_ttl_s
                    .map_or(STORE_ONLY_TTL_NS, |s| s.saturating_mul(1_000_000_000)),
                ..MirrorLimits::default()
            },
            subjects: subjects.clone(),
        })
    }
}

/// vLLM's rule for data-parallel ranks: the port plus the rank. An ipc path gets no rank.
fn shift_port(address: &str, rank: u32) -> Result<String, String> {
    if rank == 0 {
        return Ok(address.to_owned());
    }
    let problem =
        || format!("{address:?} has no port that could be raised by {rank} for data-parallel rank {rank}");
    let (host, port) = address.rsplit_once(':').ok_or_else(problem)?;
    let port: u32 = port.parse().map_err(|_| problem())?;
    match u16::try_from(port + rank) {
        Ok(port) => Ok(format!("{host}:{port}")),
        Err(_) => Err(problem()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<ShimConfig, String> {
        let spec = text.parse::<EngineSpec>()?;
        spec.shim_config(KeyHasher::default(), Partition::WHOLE, &Subjects::default())
            .map_err(|failure| failure.to_string())
    }

    #[test]
    fn ranks_have_consecutive_ports() {
        let config = config(
            "model=m,instance=a:1,zmq=tcp://a:5557,replay=tcp://a:5657,data-parallel-size=3,block-size=16",
        )
        .unwrap();
        let ends: Vec<_> =
            config.endpoints.iter().map(|e| (e.events.as_str(), e.replay.as_deref(), e.rank)).collect();
        assert_eq!(ends[2], ("tcp://a:5559", Some("tcp://a:5659"), Some(DpRank(2))));
        assert_eq!(config.block_size, Some(16));
    }

    #[test]
    fn one_rank_is_left_to_the_engine_to_name() {
        assert_eq!(config("model=m,instance=a:1,zmq=tcp://a:5557").unwrap().endpoints[0].rank, None);
    }

    #[test]
    fn a_wildcard_address_means_that_the_engine_connects() {
        assert_eq!(
            config("model=m,instance=a:1,zmq=tcp://*:5557").unwrap().endpoints[0].attach,
            Attach::Bind
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("model=m,instance=a:1", "zmq"),
            ("model=m,instance=a:1,zmq=x,modle=y", "modle"),
            ("model", "KEY=VALUE"),
            ("model=m,instance=a b,zmq=tcp://a:1", "instance name"),
            ("model=m,instance=a:1,zmq=tcp://a:65535,data-parallel-size=2", "rank 1"),
            ("model=m,instance=a:1,zmq=tcp://a:1,data-parallel-size=0", "data-parallel-size"),
            ("model=m,instance=a:1,zmq=tcp://a:1,removal=never", "never"),
            ("model=m,instance=a:1,zmq=tcp://a:1,adapter=trt", "sglang"),
        ] {
            let error = config(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
