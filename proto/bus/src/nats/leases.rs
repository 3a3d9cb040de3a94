//! Which part of the shards each server owns, agreed on by leases in a NATS key-value bucket.
//!
//! The bucket holds `division`, the number of servers that the shards are divided among, and a key `slot.N.I.R` for each
//! server that holds a slot: replica R of ordinal I of N. A server takes one, renews it, and takes another when the division
//! changes or another needs it more ([`slots`] has the rules). Whoever owns this decides what a slot means.
//!
//! **A lease divides work, nothing else.** When the bucket cannot be reached, nothing changes: every server keeps what it has.
//! That is safe because nobody relies on a lease being exclusive. Two servers with the same part are replicas of each other,
//! and both right; a part that nobody has is seen by who asks for it. So there is no fencing, and no clock is compared with
//! another one: the broker ends leases by its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use async_nats::Client;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

mod bucket;
mod slots;

use super::NatsBus;
use bucket::Bucket;
pub use bucket::{LeaseError, SlotTable};
pub use slots::{LEASE_MS, RENEW_MS, Slot};
use slots::{LOOK_MS, MAX_REPLICAS, Step, Tenant, View};

/// Longest wait for a first slot: a lease, after which the slot of a server that died is free, and as much again. Who gets none
/// is not of use, and whoever started it shall know.
pub const FIRST_SLOT_MAX: Duration = Duration::from_millis(4 * LEASE_MS);
/// Most changes in one look. Many servers that start at once each find a slot taken as often as there are others.
const STEPS_PER_LOOK: usize = 256;
/// Longest name of a bucket or server, bytes.
const MAX_NAME_BYTES: usize = 128;
/// Longest wait for a slot to be given up at the end; then it ends by itself.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// Which bucket, and who wants a slot in it.
#[derive(Clone, Debug)]
pub struct LeaseConfig {
    /// Name of the bucket: one for each deployment.
    pub bucket: String,
    /// Name of this life of the server. No other may have it, not even its next life.
    pub server: String,
    /// Number of servers to divide the shards among if the bucket does not say.
    pub initial_servers: u16,
    /// Most servers that they can be divided among. A division into more is not followed.
    pub max_servers: u16,
}

/// A server's slot, held until this is dropped or shut down.
#[derive(Debug)]
pub struct SlotLease {
    slot: watch::Receiver<Slot>,
    counters: Arc<Counters>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// Looks at the bucket from outside, and changes the division.
#[derive(Clone, Debug)]
pub struct Slots(Bucket);

/// What happened to a lease since it was first held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaseStats {
    /// Whether a slot is held now, as far as is known.
    pub held: bool,
    /// Slots taken: the first, and one for each change.
    pub taken: u64,
    /// Times that the slot was renewed.
    pub renewed: u64,
    /// Times that the slot was lost: not renewed in time, or the bucket lost it.
    pub lost: u64,
    /// Times that somebody else was quicker to take a slot.
    pub refused: u64,
    /// Looks at the bucket that failed.
    pub failed: u64,
    /// Looks that found a division which cannot be, and did not follow it.
    pub ignored: u64,
}

#[derive(Debug, Default)]
struct Counters {
    held: AtomicU64,
    taken: AtomicU64,
    renewed: AtomicU64,
    lost: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    ignored: AtomicU64,
}

/// The shell around a [`Tenant`].
struct Keeper {
    client: Client,
    brokers: String,
    config: LeaseConfig,
    bucket: Option<Bucket>,
    tenant: Tenant,
    /// At which revision the held slot is in the bucket.
    revision: u64,
    started: Instant,
    counters: Arc<Counters>,
    /// Whether the last look failed, so that a broker that is away is one line in the log.
    failing: bool,
}

// === impl NatsBus ===

impl NatsBus {
    /// Takes a slot, waiting for one up to [`FIRST_SLOT_MAX`], and keeps it. The bucket is made if it is missing.
    pub async fn lease_slot(&self, config: LeaseConfig) -> Result<SlotLease, LeaseError> {
        check_name("bucket", &config.bucket)?;
        check_name("server", &config.server)?;
        let counters = Arc::new(Counters::default());
        let mut keeper = Keeper {
            client: self.client.clone(),
            brokers: self.servers.clone(),
            bucket: None,
            tenant: Tenant::new(config.initial_servers, config.max_servers),
            revision: 0,
            started: Instant::now(),
            counters: Arc::clone(&counters),
            failing: false,
            config,
        };
        let first = keeper.first().await?;
        let (stop, stopped) = watch::channel(false);
        let (wanted, slot) = watch::channel(first);
        let task = tokio::spawn(keeper.keep(wanted, stopped));
        Ok(SlotLease { slot, counters, stop, task })
    }

    /// Opens a bucket of slots that servers have made.
    pub async fn slots(&self, bucket: impl Into<String>) -> Result<Slots, LeaseError> {
        let bucket = bucket.into();
        check_name("bucket", &bucket)?;
        Bucket::open(self.client.clone(), bucket, self.servers.clone()).await.map(Slots)
    }
}

// === impl SlotLease ===

impl SlotLease {
    /// The slot, as it is now and as it changes. It stays as it is while no slot is held.
    pub fn slot(&self) -> watch::Receiver<Slot> {
        self.slot.clone()
    }

    /// What reads the counters, for as long as anybody wants to.
    pub fn stats(&self) -> impl Fn() -> LeaseStats + Send + Sync + use<> {
        let counters = Arc::clone(&self.counters);
        move || LeaseStats {
            held: counters.held.load(Relaxed) == 1,
            taken: counters.taken.load(Relaxed),
            renewed: counters.renewed.load(Relaxed),
            lost: counters.lost.load(Relaxed),
            refused: counters.refused.load(Relaxed),
            failed: counters.failed.load(Relaxed),
            ignored: counters.ignored.load(Relaxed),
        }
    }

    /// Gives the slot up, so that somebody else can have it at once. Takes a second at most.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        let _ = timeout(LEAVE_TIMEOUT, &mut self.task).await;
    }
}

impl Drop for SlotLease {
    fn drop(&mut self) {
        self.task.abort();
    }
}

// === impl Slots ===

impl Slots {
    /// Who holds what.
    pub async fn table(&self) -> Result<SlotTable, LeaseError> {
        self.0.table().await
    }

    /// Divides the shards among so many servers from now on.
    pub async fn divide(&self, servers: u16) -> Result<(), LeaseError> {
        self.0.divide(servers).await
    }
}

// === impl Keeper ===

impl Keeper {
    /// Waits for a first slot.
    async fn first(&mut self) -> Result<Slot, LeaseError> {
        let mut looks = interval(Duration::from_millis(LOOK_MS));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let looked = self.look(|_| ()).await;
            if let Some(slot) = self.tenant.held() {
                return Ok(slot);
            }
            match looked {
                Err(error @ (LeaseError::NoJetStream { .. } | LeaseError::NoExpiry { .. })) => {
                    return Err(error);
                }
                _ if self.started.elapsed() < FIRST_SLOT_MAX => {}
                Ok(()) => return Err(LeaseError::Full { replicas: MAX_REPLICAS }),
                Err(error) => return Err(error),
            }
        }
    }

    /// Keeps a slot until `stop`, and gives it up then.
    async fn keep(mut self, wanted: watch::Sender<Slot>, mut stop: watch::Receiver<bool>) {
        let mut looks = interval(Duration::from_millis(LOOK_MS));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                // An error means that nobody can stop this any more; the task ends with the handle.
                _ = stop.wait_for(|stop| *stop) => break,
                _ = looks.tick() => {}
            }
            let looked = tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => break,
                looked = self.look(|slot| { wanted.send_replace(slot); }) => looked,
            };
            self.note(looked);
        }
        if let (Some(bucket), Some(slot)) = (&self.bucket, self.tenant.held()) {
            // Else it ends by itself.
            if let Err(error) = bucket.leave(slot, self.revision).await {
                tracing::debug!(%slot, %error, "the slot could not be given up");
            }
        }
    }

    /// Looks at the bucket and does what is to be done, to the end. `moved` hears of each slot that is taken.
    async fn look(&mut self, moved: impl Fn(Slot)) -> Result<(), LeaseError> {
        let bucket = self.bucket().await?;
        let outcome = self.step_all(&bucket, moved).await;
        if let Err(LeaseError::Missing { .. }) = outcome {
            // It is made again with the next look.
            self.bucket = None;
        }
        outcome
    }

    async fn step_all(&mut self, bucket: &Bucket, moved: impl Fn(Slot)) -> Result<(), LeaseError> {
        for _ in 0..STEPS_PER_LOOK {
            let view = bucket.read().await?;
            let now_ms = self.started.elapsed().as_millis() as u64;
            match self.tenant.next(&view, now_ms) {
                Step::Rest => return Ok(()),
                Step::Ignore(division) => {
                    self.ignore(division);
                    return Ok(());
                }
                Step::Found(servers) => bucket.found(servers).await?,
                Step::Take(slot) => self.take(bucket, &view, slot, &moved).await?,
                Step::Renew => self.renew(bucket).await?,
            }
        }
        Ok(())
    }

    async fn take(
        &mut self,
        bucket: &Bucket,
        view: &View,
        slot: Slot,
        moved: &impl Fn(Slot),
    ) -> Result<(), LeaseError> {
        let asked_ms = self.started.elapsed().as_millis() as u64;
        let Some(revision) = bucket.hold(slot, &self.config.server, 0).await? else {
            self.counters.refused.fetch_add(1, Relaxed);
            return Ok(());
        };
        let before = self.tenant.held().map(|before| (before, self.revision));
        self.tenant.took(slot, asked_ms);
        self.revision = revision;
        self.counters.taken.fetch_add(1, Relaxed);
        self.counters.held.store(1, Relaxed);
        moved(slot);
        tracing::info!(%slot, before = before.map(|(slot, _)| tracing::field::display(slot)), division = view.division,
            "this server has a slot of the division");
        match before {
            // Failing that, it ends by itself.
            Some((before, revision)) => bucket.leave(before, revision).await,
            None => Ok(()),
        }
    }

    async fn renew(&mut self, bucket: &Bucket) -> Result<(), LeaseError> {
        let Some(slot) = self.tenant.held() else { return Ok(()) };
        let asked_ms = self.started.elapsed().as_millis() as u64;
        if let Some(revision) = bucket.hold(slot, &self.config.server, self.revision).await? {
            self.revision = revision;
            self.tenant.took(slot, asked_ms);
            self.counters.renewed.fetch_add(1, Relaxed);
        } else {
            self.tenant.lost();
            self.counters.lost.fetch_add(1, Relaxed);
            self.counters.held.store(0, Relaxed);
            tracing::warn!(%slot, "this server's slot was not renewed in time and is not its own any more; taking one");
        }
        Ok(())
    }

    async fn bucket(&mut self) -> Result<Bucket, LeaseError> {
        if let Some(bucket) = &self.bucket {
            return Ok(bucket.clone());
        }
        let (client, name) = (self.client.clone(), self.config.bucket.clone());
        let bucket = Bucket::open_or_create(client, name, self.brokers.clone()).await?;
        self.bucket = Some(bucket.clone());
        Ok(bucket)
    }

    fn ignore(&self, division: u64) {
        let ignored = self.counters.ignored.fetch_add(1, Relaxed) + 1;
        if ignored.is_power_of_two() {
            tracing::warn!(
                division,
                most = self.config.max_servers,
                "the shards cannot be divided among so many servers; this one keeps what it has: kvatlas cluster resize"
            );
        }
    }

    /// Says once that the bucket cannot be reached, and once that it can again.
    fn note(&mut self, looked: Result<(), LeaseError>) {
        match (looked, self.failing) {
            (Ok(()), false) => {}
            (Ok(()), true) => {
                self.failing = false;
                tracing::info!("the bucket of slots can be reached again");
            }
            (Err(error), failing) => {
                self.failing = true;
                self.counters.failed.fetch_add(1, Relaxed);
                if !failing {
                    tracing::warn!(%error, "this server keeps what it owns");
                }
            }
        }
    }
}

fn check_name(what: &'static str, name: &str) -> Result<(), LeaseError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(plain) {
        return Err(LeaseError::Name { what, name: name.to_owned(), most: MAX_NAME_BYTES });
    }
    Ok(())
}
