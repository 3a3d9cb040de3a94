//! Scenarios as text that people read and write: a line about the world, then one line per step.
//!
//! ```text
//! seed 7 engines 2 device 24 host 8 replay 50 indexes 2 shards 5 parts 2 files
//! t=0.250s engine 1 serves 12 blocks of #3
//! t=0.900s bus shim 1 <-> index 0 loses 20% for 3.000s
//! t=1.250s index 0 is killed for 0.300s (disk torn)
//! t=1.900s index 1 owns 0of2
//! t=2.000s index 0 owns 1of2 too
//! ```

use std::fmt;
use std::str::FromStr;

use kvatlas_proto::ShardSet;

use super::op::{BusFault, DiskFault, Op, Process, Scenario, Step, WorldConfig};

/// A line is not of a scenario.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a line of a scenario: see the operations in the module's documentation")]
pub struct ParseScenarioError(String);

/// A duration as text.
struct Seconds(u64);

// === impl Op ===

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serve { engine, prompt, blocks } => {
                write!(f, "engine {engine} serves {blocks} blocks of #{prompt}")
            }
            Self::Evict { engine, blocks } => write!(f, "engine {engine} evicts {blocks} blocks"),
            Self::Offload { engine, blocks } => write!(f, "engine {engine} offloads {blocks} blocks"),
            Self::Reset { engine } => write!(f, "engine {engine} resets its cache"),
            Self::RestartEngine { engine, for_ms } => {
                write!(f, "engine {engine} restarts after {}", Seconds(*for_ms))
            }
            Self::LoseEvents { engine, messages } => {
                write!(f, "engine {engine} link loses {messages} messages")
            }
            Self::CutEvents { engine, for_ms } => {
                write!(f, "engine {engine} link is cut for {}", Seconds(*for_ms))
            }
            Self::HoldReplay { engine, for_ms } => {
                write!(f, "engine {engine} replay is away for {}", Seconds(*for_ms))
            }
            Self::Kill { process, for_ms, disk } => {
                write!(f, "{process} is killed for {}{disk}", Seconds(*for_ms))
            }
            Self::Stall { process, for_ms } => write!(f, "{process} stalls for {}", Seconds(*for_ms)),
            Self::Own { index, set, beside } => {
                write!(f, "index {index} owns {set}{}", if *beside { " too" } else { "" })
            }
            Self::SetBack { shim, by_ms } => {
                write!(f, "shim {shim} clock is set back by {}", Seconds(*by_ms))
            }
            Self::Bus { pair: None, fault, for_ms } => write!(f, "bus {fault} for {}", Seconds(*for_ms)),
            Self::Bus { pair: Some((shim, index)), fault, for_ms } => {
                write!(f, "bus shim {shim} <-> index {index} {fault} for {}", Seconds(*for_ms))
            }
        }
    }
}

impl FromStr for Op {
    type Err = ParseScenarioError;

    fn from_str(text: &str) -> Result<Self, ParseScenarioError> {
        let words: Vec<&str> = text.split_whitespace().collect();
        parse_op(&words).ok_or_else(|| ParseScenarioError(text.to_owned()))
    }
}

fn parse_op(words: &[&str]) -> Option<Op> {
    Some(match words {
        ["engine", engine, rest @ ..] => parse_engine_op(engine.parse().ok()?, rest)?,
        ["shim", shim, "clock", "is", "set", "back", "by", time] => {
            Op::SetBack { shim: shim.parse().ok()?, by_ms: parse_seconds(time)? }
        }
        ["index", index, "owns", set] => {
            Op::Own { index: index.parse().ok()?, set: parse_set(set)?, beside: false }
        }
        ["index", index, "owns", set, "too"] => {
            Op::Own { index: index.parse().ok()?, set: parse_set(set)?, beside: true }
        }
        [kind @ ("shim" | "index"), number, rest @ ..] => {
            let number = number.parse().ok()?;
            let process = if *kind == "shim" { Process::Shim(number) } else { Process::Index(number) };
            match rest {
                ["is", "killed", "for", time, disk @ ..] => {
                    Op::Kill { process, for_ms: parse_seconds(time)?, disk: parse_disk(disk)? }
                }
                ["stalls", "for", time] => Op::Stall { process, for_ms: parse_seconds(time)? },
                _ => return None,
            }
        }
        ["bus", "shim", shim, "<->", "index", index, fault @ .., "for", time] => Op::Bus {
            pair: Some((shim.parse().ok()?, index.parse().ok()?)),
            fault: parse_bus_fault(fault)?,
            for_ms: parse_seconds(time)?,
        },
        ["bus", fault @ .., "for", time] => {
            Op::Bus { pair: None, fault: parse_bus_fault(fault)?, for_ms: parse_seconds(time)? }
        }
        _ => return None,
    })
}

fn parse_engine_op(engine: usize, words: &[&str]) -> Option<Op> {
    Some(match words {
        ["serves", blocks, "blocks", "of", prompt] => Op::Serve {
            engine,
            prompt: prompt.strip_prefix('#')?.parse().ok()?,
            blocks: blocks.parse().ok()?,
        },
        ["evicts", blocks, "blocks"] => Op::Evict { engine, blocks: blocks.parse().ok()? },
        ["offloads", blocks, "blocks"] => Op::Offload { engine, blocks: blocks.parse().ok()? },
        ["resets", "its", "cache"] => Op::Reset { engine },
        ["restarts", "after", time] => Op::RestartEngine { engine, for_ms: parse_seconds(time)? },
        ["link", "loses", messages, "messages"] => {
            Op::LoseEvents { engine, messages: messages.parse().ok()? }
        }
        ["link", "is", "cut", "for", time] => Op::CutEvents { engine, for_ms: parse_seconds(time)? },
        ["replay", "is", "away", "for", time] => Op::HoldReplay { engine, for_ms: parse_seconds(time)? },
        _ => return None,
    })
}

fn parse_bus_fault(words: &[&str]) -> Option<BusFault> {
    let percent = |word: &str| word.strip_suffix('%')?.parse().ok();
    Some(match words {
        ["loses", share] => BusFault::Loss { percent: percent(share)? },
        ["duplicates", share] => BusFault::Duplicates { percent: percent(share)? },
        ["damages", share] => BusFault::Damage { percent: percent(share)? },
        ["delays", "up", "to", time] => BusFault::Delay { up_to_ms: parse_seconds(time)? },
        ["is", "cut"] => BusFault::Cut,
        _ => return None,
    })
}

fn parse_disk(words: &[&str]) -> Option<DiskFault> {
    match words {
        [] => Some(DiskFault::None),
        ["(disk", what] => DiskFault::ALL.into_iter().find(|fault| what.strip_suffix(')') == fault.name()),
        _ => None,
    }
}

fn parse_set(word: &str) -> Option<ShardSet> {
    let (ordinal, servers) = word.split_once("of")?;
    ShardSet::new(ordinal.parse().ok()?, servers.parse().ok()?).ok()
}

fn parse_seconds(word: &str) -> Option<u64> {
    let seconds: f64 = word.strip_suffix('s')?.parse().ok()?;
    Some((seconds * 1e3).round() as u64)
}

// === impl Process ===

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shim(number) => write!(f, "shim {number}"),
            Self::Index(number) => write!(f, "index {number}"),
        }
    }
}

// === impl DiskFault ===

impl DiskFault {
    fn name(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Old => Some("old"),
            Self::Torn => Some("torn"),
            Self::Flipped => Some("flipped"),
            Self::Lost => Some("lost"),
        }
    }
}

impl fmt::Display for DiskFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().map_or(Ok(()), |name| write!(f, " (disk {name})"))
    }
}

// === impl BusFault ===

impl fmt::Display for BusFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loss { percent } => write!(f, "loses {percent}%"),
            Self::Duplicates { percent } => write!(f, "duplicates {percent}%"),
            Self::Damage { percent } => write!(f, "damages {percent}%"),
            Self::Delay { up_to_ms } => write!(f, "delays up to {}", Seconds(*up_to_ms)),
            Self::Cut => f.write_str("is cut"),
        }
    }
}

// === impl Seconds ===

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03}s", self.0 / 1_000, self.0 % 1_000)
    }
}

// === impl Step ===

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t={} {}", Seconds(self.at_ms), self.op)
    }
}

impl FromStr for Step {
    type Err = ParseScenarioError;

    fn from_str(text: &str) -> Result<Self, ParseScenarioError> {
        let error = || ParseScenarioError(text.to_owned());
        let (time, op) = text.trim().split_once(' ').ok_or_else(error)?;
        let at_ms = time.strip_prefix("t=").and_then(parse_seconds).ok_or_else(error)?;
        Ok(Self { at_ms, op: op.parse()? })
    }
}

// === impl WorldConfig ===

impl fmt::Display for WorldConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, engines, device_blocks, host_blocks, replay_messages, indexes, .. } = self;
        write!(f, "seed {seed} engines {engines} device {device_blocks} host {host_blocks} ")?;
        write!(f, "replay {replay_messages} indexes {indexes}")?;
        if (self.shards, self.parts) != (1, 1) {
            write!(f, " shards {} parts {}", self.shards, self.parts)?;
        }
        f.write_str(if self.files { " files" } else { "" })?;
        f.write_str(if self.small_buffers { " small-buffers" } else { "" })
    }
}

impl FromStr for WorldConfig {
    type Err = ParseScenarioError;

    fn from_str(text: &str) -> Result<Self, ParseScenarioError> {
        parse_world(text).ok_or_else(|| ParseScenarioError(text.to_owned()))
    }
}

fn parse_world(text: &str) -> Option<WorldConfig> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let [
        "seed",
        seed,
        "engines",
        engines,
        "device",
        device,
        "host",
        host,
        "replay",
        replay,
        "indexes",
        indexes,
        options @ ..,
    ] = words.as_slice()
    else {
        return None;
    };
    let (shards, parts, options) = match options {
        ["shards", shards, "parts", parts, options @ ..] => {
            (shards.parse().ok()?, parts.parse().ok()?, options)
        }
        _ => (1, 1, options),
    };
    let (files, small_buffers) = match options {
        [] => (false, false),
        ["files"] => (true, false),
        ["small-buffers"] => (false, true),
        ["files", "small-buffers"] => (true, true),
        _ => return None,
    };
    Some(WorldConfig {
        seed: seed.parse().ok()?,
        engines: engines.parse().ok()?,
        device_blocks: device.parse().ok()?,
        host_blocks: host.parse().ok()?,
        replay_messages: replay.parse().ok()?,
        indexes: indexes.parse().ok()?,
        shards,
        parts,
        files,
        small_buffers,
    })
}

// === impl Scenario ===

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.world)?;
        self.steps.iter().try_for_each(|step| writeln!(f, "{step}"))
    }
}

impl FromStr for Scenario {
    type Err = ParseScenarioError;

    fn from_str(text: &str) -> Result<Self, ParseScenarioError> {
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let world = lines.next().ok_or_else(|| ParseScenarioError(String::new()))?.parse()?;
        let mut steps = lines.map(str::parse).collect::<Result<Vec<Step>, _>>()?;
        steps.sort_by_key(|step| step.at_ms);
        let scenario = Self { world, steps };
        if scenario.fits() { Ok(scenario) } else { Err(ParseScenarioError(scenario.to_string())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_not_understood_are_named() {
        for bad in ["", "seed x", "seed 7 engines 2"] {
            assert!(bad.parse::<Scenario>().is_err(), "{bad}");
        }
        let error = "t=1.000s engine 0 explodes".parse::<Step>().unwrap_err();
        assert!(error.to_string().contains("engine 0 explodes"), "{error}");
        for bad in [
            "1.0s engine 0 resets its cache",
            "t=1s index 0 is killed for 1s (disk wet)",
            "t=1s bus loses 5 for 1s",
        ] {
            assert!(bad.parse::<Step>().is_err(), "{bad}");
        }
    }
}
