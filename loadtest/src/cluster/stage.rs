//! A deployment that holds known conversations, on engines with shims in this process, and says nothing new meanwhile.

use std::collections::BTreeMap;
use std::time::Duration;

use kvatlas_shim::shim::Shim;
use tokio::time::{Instant, sleep};

use super::conversations::Conversations;
use super::rig::{LOOK_INTERVAL, Rig, RigConfig};
use super::scrape::Scrape;
use super::{ClusterError, PATIENCE};
use crate::publisher::{EnginePublisher, PublisherConfig};
use crate::recovery::RecoveryError;
use crate::recovery::fleet::{batch, shim_config};

/// Longest wait for a shim to follow its engine.
const FOLLOW_TIMEOUT: Duration = Duration::from_secs(20);
/// Messages that are published before others have a turn.
const BREATH: usize = 64;
const BLOCKS: &str = "kvatlas_index_blocks";

/// A rig that holds conversations.
pub struct Stage {
    /// Brokers and servers.
    pub rig: Rig,
    /// By server, resident memory while it held nothing, bytes; absent where the system does not say.
    pub empty_bytes: Vec<Option<u64>>,
    // Engines only have to stay.
    _engines: Vec<EnginePublisher>,
    shims: Vec<Shim>,
}

// === impl Stage ===

impl Stage {
    /// Starts a rig and waits until every replica has all that the conversations hold.
    pub async fn start(config: &RigConfig, conversations: &Conversations) -> Result<Self, ClusterError> {
        let mut rig = Rig::start(config).await?;
        let empty_bytes = rig.servers().iter().map(|server| resident_bytes(server.process_id())).collect();
        let (mut engines, mut shims) = (Vec::new(), Vec::new());
        for number in 0..conversations.shape().engines {
            let mut engine =
                EnginePublisher::bind(PublisherConfig::default()).await.map_err(RecoveryError::from)?;
            let name = format!("10.0.2.{number}:8000");
            let shim = shim_config(rig.site(), &name, engine.endpoints());
            shims.push(Shim::start(&shim, &rig.site().bus).map_err(RecoveryError::from)?);
            engine.wait_for_subscribers(1, FOLLOW_TIMEOUT).await.map_err(RecoveryError::from)?;
            for (at, event) in conversations.events(number).enumerate() {
                engine.publish(&batch(vec![event])).await.map_err(RecoveryError::from)?;
                if at % BREATH == 0 {
                    sleep(Duration::from_millis(1)).await;
                }
            }
            engines.push(engine);
        }
        wait_held(&rig, conversations.stored_blocks()).await?;
        rig.wait_full(conversations.shape().engines, PATIENCE).await?;
        Ok(Self { rig, empty_bytes, _engines: engines, shims })
    }

    /// The metrics of every server.
    pub async fn scrapes(&self) -> Vec<Scrape> {
        let scrapes = self.rig.servers().iter().map(super::rig::Server::scrape);
        futures_util::future::join_all(scrapes).await
    }

    /// By server, resident memory now.
    pub fn resident_bytes(&self) -> Vec<Option<u64>> {
        self.rig.servers().iter().map(|server| resident_bytes(server.process_id())).collect()
    }

    /// Stops everything.
    pub async fn stop(self) {
        for shim in self.shims {
            shim.shutdown().await;
        }
    }
}

/// Waits until the servers of every replica have so many blocks together.
async fn wait_held(rig: &Rig, blocks: usize) -> Result<(), ClusterError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut held: BTreeMap<u32, f64> = BTreeMap::new();
        for server in rig.servers() {
            *held.entry(server.replica()).or_default() += server.scrape().await.get(BLOCKS);
        }
        if held.values().all(|held| *held == blocks as f64) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let state = format!("{held:?} of {blocks} blocks");
            return Err(ClusterError::NotInTime { what: "full index", wait: PATIENCE, state });
        }
        sleep(LOOK_INTERVAL).await;
    }
}

/// Memory of a process that is in use; `None` where the system does not say (it is not Linux).
fn resident_bytes(process: Option<u32>) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{}/status", process?)).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1_024)
}
