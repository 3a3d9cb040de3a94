//! Divides a query among servers and waits for what they say, within the caller's time.
//!
//! Questions are requests on the bus to a queue group, one per set of shards, so which replica answers, and what happens when
//! one is gone, is the broker's business. A question that is slow is asked once more, of all replicas; the one that has it
//! already leaves it to the others. What nobody answers in time is missing, and the answer says so.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use kvatlas_bus::{Bus, BusMessage, Subscription};
use kvatlas_proto::ShardSet;
use kvatlas_proto::subject::{Asker, Subject, Subjects};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use super::answer::ShardAnswer;
use super::inquiry::Inquiry;
use super::metrics::ClusterMetrics;
use super::presence::{Cover, Presence};
use super::steward::Serving;
use crate::clock::Clock;
use crate::index::{BlockSizeMismatch, Index};
use crate::query::{ScoreAnswer, ScoreQuery};

/// Longest wait for a shard server, whatever time the caller has. Many times what an answer takes; within it a broker has
/// noticed that a server is gone.
pub const SHARD_TIMEOUT: Duration = Duration::from_millis(250);
/// Of the caller's time, what is kept to put the answer together and send it.
const RESERVE: Duration = Duration::from_millis(1);
/// Wait before it is asked again who has a set, when nobody took the question: a server takes this long to come back at best.
const NOBODY_WAIT: Duration = Duration::from_millis(5);
/// A question is asked again when it takes this many times the usual time, ...
const HEDGE_FACTOR: u32 = 4;
/// ... and at least this long; shorter would double the load whenever the machine is busy.
const HEDGE_LEAST: Duration = Duration::from_millis(5);
/// Questions per second time asked: a slow cluster is not made slower by asking everything twice.
const QUESTIONS_PER_HEDGE: u64 = 20;
/// Most second questions that may be saved up.
const HEDGES_SAVED: u64 = 10;
/// Questions that wait for an answer. At the bound a query is answered from what is here, and says so.
const MAX_PENDING: usize = 65_536;
/// Answers to one question that are kept: the first one counts.
const ANSWERS_KEPT: usize = 4;

/// Asks other servers.
pub(crate) struct Coordinator {
    pub(crate) index: Arc<Index>,
    bus: Arc<dyn Bus>,
    subjects: Subjects,
    asker: Asker,
    clock: Clock,
    serving: Arc<Serving>,
    presence: Arc<Mutex<Presence>>,
    pub(crate) metrics: Arc<ClusterMetrics>,
    pending: Mutex<HashMap<u64, mpsc::Sender<Bytes>>>,
    next: AtomicU64,
    /// Usual time of an answer, microseconds: a moving average.
    usual_us: AtomicU64,
    /// Second questions that may be asked, times [`QUESTIONS_PER_HEDGE`].
    hedges: AtomicU64,
}

/// An answer, and how much of the question it covers.
#[derive(Debug)]
pub(crate) struct Covered<T> {
    pub(crate) answer: T,
    /// Share of the blocks that were asked about, 0 to 1.
    pub(crate) coverage: f64,
    /// What is missing, a sentence each.
    pub(crate) missing: Vec<String>,
}

/// What became of one question.
enum Asked {
    Answered(ShardAnswer),
    /// No server takes questions for the set now.
    Nobody,
    /// Not in time, or not in a usable form.
    Silent,
}

/// Takes its question off the list when it is given up.
struct Waiting<'a> {
    coordinator: &'a Coordinator,
    number: u64,
    answers: mpsc::Receiver<Bytes>,
}

// === impl Coordinator ===

impl Coordinator {
    #[allow(clippy::too_many_arguments)] // The shell hands over its parts once.
    pub(crate) fn new(
        index: Arc<Index>,
        bus: Arc<dyn Bus>,
        subjects: Subjects,
        asker: Asker,
        clock: Clock,
        serving: Arc<Serving>,
        presence: Arc<Mutex<Presence>>,
        metrics: Arc<ClusterMetrics>,
    ) -> Self {
        Self {
            index,
            bus,
            subjects,
            asker,
            clock,
            serving,
            presence,
            metrics,
            pending: Mutex::default(),
            next: AtomicU64::new(1),
            usual_us: AtomicU64::new(HEDGE_LEAST.as_micros() as u64),
            hedges: AtomicU64::new(HEDGES_SAVED * QUESTIONS_PER_HEDGE),
        }
    }

    /// Who holds how much of a prompt, as far as servers say within `patience`.
    pub(crate) async fn score(
        &self,
        query: &ScoreQuery<'_>,
        patience: Duration,
    ) -> Result<Covered<ScoreAnswer>, BlockSizeMismatch> {
        let inquiry = self.index.inquire(query)?;
        let deadline = Instant::now() + patience.saturating_sub(RESERVE).min(SHARD_TIMEOUT);
        let shards = inquiry.shards(self.index.partition());
        let (answers, unanswered) = self.ask_everybody(&inquiry, shards, deadline).await;
        let coverage = inquiry.coverage(&answers, &unanswered).share();
        if coverage < 1.0 {
            self.metrics.partial.inc();
        }
        let missing = self.missing(&answers, &unanswered);
        let answer = self.index.conclude(query, inquiry, &answers, self.clock.now_ms());
        Ok(Covered { answer, coverage, missing })
    }

    /// Asks until every shard has answered or the time is over. Returns the answers, and the shards without one.
    async fn ask_everybody(
        &self,
        inquiry: &Inquiry<'_>,
        shards: Vec<u16>,
        deadline: Instant,
    ) -> (Vec<ShardAnswer>, Vec<u16>) {
        let (mut answers, mut todo, mut silent) = (Vec::new(), shards, Vec::new());
        let (mut fan_out, mut avoid) = (0, Vec::new());
        loop {
            let now_ms = self.clock.now_ms();
            let cover = self.presence.lock().cover(&todo, |shard| self.serving.has(shard), &avoid, now_ms);
            avoid.clear();
            let Cover { local, remote, nobody } = cover;
            fan_out += remote.len();
            todo = nobody;
            let asking = join_all(remote.into_iter().map(|(set, shards)| async move {
                let asked = self.ask(inquiry, set, &shards, deadline).await;
                (set, shards, asked)
            }));
            // The questions are on their way while we look ourselves.
            let here = async {
                if local.is_empty() {
                    return None;
                }
                let question = inquiry.question(0, |shard| local.contains(&shard));
                self.metrics.answered_pieces.inc_by(question.pieces() as u64);
                Some(self.index.look_up(&question, |shard| self.serving.has(shard.number()), now_ms))
            };
            let (asked, here) = tokio::join!(asking, here);
            if let Some(mut answer) = here {
                todo.append(&mut answer.missing);
                answers.push(answer);
            }
            for (set, mut shards, asked) in asked {
                match asked {
                    Asked::Answered(mut answer) => {
                        // It has given these up meanwhile; whoever has them now announces it.
                        todo.append(&mut answer.missing);
                        answers.push(answer);
                    }
                    Asked::Nobody => {
                        // In the next round somebody else is asked who has these, if there is anybody.
                        avoid.push(set);
                        todo.append(&mut shards);
                    }
                    Asked::Silent => silent.append(&mut shards),
                }
            }
            if todo.is_empty() || Instant::now() + NOBODY_WAIT >= deadline {
                break;
            }
            tokio::time::sleep(NOBODY_WAIT).await;
        }
        self.metrics.fan_out.observe(fan_out as f64);
        todo.append(&mut silent);
        todo.sort_unstable();
        todo.dedup();
        (answers, todo)
    }

    async fn ask(&self, inquiry: &Inquiry<'_>, set: ShardSet, shards: &[u16], deadline: Instant) -> Asked {
        let started = Instant::now();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let asked = inquiry.question(number, |shard| shards.contains(&shard));
        let payload = match asked.encode() {
            Ok(payload) => Bytes::from(payload),
            Err(error) => {
                tracing::warn!(%set, %error, "a question could not be asked");
                return Asked::Silent;
            }
        };
        let Some(mut waiting) = self.wait_for(number) else { return Asked::Silent };
        self.metrics.questions.inc();
        self.metrics.question_bytes.inc_by(payload.len() as u64);
        let reply = Some(self.subjects.answer(&self.asker, number));
        let question = BusMessage { subject: self.subjects.query(set), reply, payload };
        let again = BusMessage { subject: self.subjects.hedge(set), ..question.clone() };
        if timeout_at(deadline, self.bus.send(question)).await.is_err() {
            return Asked::Silent;
        }
        let mut hedge_at = Some(started + self.hedge_after());
        loop {
            let hedge = async {
                match hedge_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = waiting.answers.recv() => {
                    let Some(bytes) = answer else { return Asked::Silent };
                    if bytes.is_empty() {
                        // The broker says that nobody listens. Of a second question that means nothing.
                        if hedge_at.is_some() {
                            self.metrics.nobody.inc();
                            return Asked::Nobody;
                        }
                        continue;
                    }
                    match ShardAnswer::parse(&bytes, &asked) {
                        Ok(answer) => {
                            self.note_time(started.elapsed());
                            self.metrics.answer_bytes.inc_by(bytes.len() as u64);
                            return Asked::Answered(answer);
                        }
                        Err(error) => {
                            self.metrics.bad_answers.inc();
                            tracing::debug!(%set, %error, "an answer of another server is not usable");
                        }
                    }
                }
                () = sleep_until(deadline) => {
                    self.metrics.timeouts.inc();
                    return Asked::Silent;
                }
                () = hedge => {
                    hedge_at = None;
                    if self.may_hedge() {
                        self.metrics.hedges.inc();
                        if timeout_at(deadline, self.bus.send(again.clone())).await.is_err() {
                            return Asked::Silent;
                        }
                    }
                }
            }
        }
    }

    fn wait_for(&self, number: u64) -> Option<Waiting<'_>> {
        let (sender, answers) = mpsc::channel(ANSWERS_KEPT);
        let mut pending = self.pending.lock();
        if pending.len() >= MAX_PENDING {
            return None;
        }
        pending.insert(number, sender);
        Some(Waiting { coordinator: self, number, answers })
    }

    fn hedge_after(&self) -> Duration {
        (Duration::from_micros(self.usual_us.load(Ordering::Relaxed)) * HEDGE_FACTOR).max(HEDGE_LEAST)
    }

    fn note_time(&self, time: Duration) {
        self.metrics.answer_time.observe(time.as_secs_f64());
        let (usual, now) = (self.usual_us.load(Ordering::Relaxed), time.as_micros() as u64);
        // A lost update of a moving average is none.
        self.usual_us.store((usual * 15 + now) / 16, Ordering::Relaxed);
        let more = |saved: u64| Some((saved + 1).min(HEDGES_SAVED * QUESTIONS_PER_HEDGE));
        let _ = self.hedges.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    fn may_hedge(&self) -> bool {
        let less = |saved: u64| saved.checked_sub(QUESTIONS_PER_HEDGE);
        self.hedges.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    fn missing(&self, answers: &[ShardAnswer], unanswered: &[u16]) -> Vec<String> {
        let mut missing = Vec::new();
        let of = self.index.partition().shards();
        if !unanswered.is_empty() {
            missing.push(format!(
                "no server answered in time for {} of {of} shards: {}",
                unanswered.len(),
                shown(unanswered)
            ));
        }
        let not_ready: Vec<u16> = answers.iter().flat_map(|answer| answer.missing.iter().copied()).collect();
        if !not_ready.is_empty() {
            missing.push(format!("shards that are still being found out: {}", shown(&not_ready)));
        }
        missing
    }

    /// Hands answers to whoever waits for them, until `stop`.
    pub(crate) async fn deliver(self: Arc<Self>, mut answers: Subscription, stop: CancellationToken) {
        loop {
            let message = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                message = answers.recv() => message,
            };
            let Some(message) = message else { return };
            let Ok(Subject::Answer { number, .. }) = self.subjects.parse(&message.subject) else { continue };
            let waiting = self.pending.lock().get(&number).cloned();
            match waiting {
                Some(waiting) => _ = waiting.try_send(message.payload),
                None => _ = self.metrics.late_answers.inc(),
            }
        }
    }
}

/// Numbers of shards for a person: as many as fit a line.
fn shown(shards: &[u16]) -> String {
    const MOST: usize = 16;
    let mut text: Vec<String> = shards.iter().take(MOST).map(ToString::to_string).collect();
    if shards.len() > MOST {
        text.push(format!("and {} more", shards.len() - MOST));
    }
    text.join(", ")
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.coordinator.pending.lock().remove(&self.number);
    }
}
