//! How much is answered at a time, and until when: an admission limit with a short queue, and the caller's deadline.
//!
//! A server that takes everything in answers nothing in time. So calls beyond a number wait, few and briefly, and the rest
//! hear at once that they should go elsewhere; what nobody waits for any more is not computed.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

/// Calls in flight, by default: far above what the processors work on at a time, so it binds only when calls pile up.
pub const DEFAULT_MAX_INFLIGHT: usize = 256;
/// Longest wait for a place. A gateway that got no score by then has routed without one.
pub const MAX_ADMISSION_WAIT: Duration = Duration::from_millis(250);
/// Large prompts that wait for a processor; each holds up to megabytes.
const LARGE_WAITING: usize = 16;
/// Longest part of a deadline that is left for the answer's way back, so that the caller hears the reason and not silence.
const MAX_ANSWER_MARGIN: Duration = Duration::from_millis(2);

/// Until when an answer is of use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Deadline(Option<Instant>);

/// A limit of calls in flight, and a queue before it as long as the limit.
#[derive(Clone, Debug)]
pub(crate) struct Admission {
    what: &'static str,
    bound: usize,
    slots: Arc<Semaphore>,
    queue: Arc<Semaphore>,
}

/// A place, or the right to wait for one.
#[derive(Debug)]
pub(crate) enum Entered {
    Admitted(Admitted),
    Waiting { slots: Arc<Semaphore>, what: &'static str, bound: usize, _queue: OwnedSemaphorePermit },
}

/// A place; free again when dropped.
#[derive(Debug)]
pub(crate) struct Admitted(#[allow(dead_code, reason = "held, not used")] OwnedSemaphorePermit);

/// The call is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OverloadError {
    #[error(
        "this server has {bound} {what} in flight, its limit, and as many wait as may: retry on another server or later, \
         or raise --max-inflight-queries"
    )]
    Full { what: &'static str, bound: usize },
    #[error(
        "no place was free within {wait} ms among the {bound} {what} that this server answers at a time: retry on \
         another server or later, or raise --max-inflight-queries",
        wait = MAX_ADMISSION_WAIT.as_millis()
    )]
    Waited { what: &'static str, bound: usize },
    #[error("the deadline passed before the call was answered: give it longer, or look at the server's load")]
    Deadline,
}

// === impl Deadline ===

impl Deadline {
    /// From the `grpc-timeout` that came with a call at `now`. One that cannot be read is none.
    pub(crate) fn of(headers: &HeaderMap, now: Instant) -> Self {
        let timeout = headers.get("grpc-timeout").and_then(|value| parse_timeout(value.as_bytes()));
        Self(timeout.and_then(|timeout| {
            let margin = MAX_ANSWER_MARGIN.min(timeout / 8);
            now.checked_add(timeout.saturating_sub(margin))
        }))
    }

    /// Whether nobody waits any more.
    pub(crate) fn has_passed(self, now: Instant) -> bool {
        self.0.is_some_and(|at| now >= at)
    }

    /// Time that is left; `None` if the caller set no deadline.
    pub(crate) fn remaining(self, now: Instant) -> Option<Duration> {
        self.0.map(|at| at.saturating_duration_since(now))
    }

    /// Nobody waits longer than `longest` from now, whatever the caller says.
    pub(crate) fn at_most(self, longest: Duration, now: Instant) -> Self {
        let remaining = self.remaining(now).map_or(longest, |remaining| remaining.min(longest));
        Self(now.checked_add(remaining))
    }

    /// What `work` makes of it, or that the deadline passed. Work that is late is not begun.
    pub(crate) async fn bound<T>(self, work: impl Future<Output = T>) -> Result<T, OverloadError> {
        let Some(at) = self.0 else { return Ok(work.await) };
        if self.has_passed(Instant::now()) {
            return Err(OverloadError::Deadline);
        }
        timeout_at(at, work).await.map_err(|_| OverloadError::Deadline)
    }
}

/// At most eight digits and a unit, as gRPC writes it.
fn parse_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(count * 3_600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

// === impl Admission ===

impl Admission {
    /// For calls of every kind: `bound` in flight, as many waiting.
    pub(crate) fn of_calls(bound: usize) -> Self {
        Self::new("calls", bound, bound)
    }

    /// For prompts whose look-up takes long enough to be in the way of others: half of the processors.
    pub(crate) fn of_large(processors: usize) -> Self {
        Self::new("large prompts", (processors / 2).max(1), LARGE_WAITING)
    }

    fn new(what: &'static str, bound: usize, waiting: usize) -> Self {
        // tokio's own bound is above anything that fits into memory.
        let semaphore = |permits: usize| Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)));
        Self { what, bound, slots: semaphore(bound), queue: semaphore(waiting) }
    }

    /// Takes a place or a place in the queue, at once.
    pub(crate) fn enter(&self) -> Result<Entered, OverloadError> {
        if let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() {
            return Ok(Entered::Admitted(Admitted(slot)));
        }
        let (what, bound) = (self.what, self.bound);
        let queue = Arc::clone(&self.queue).try_acquire_owned();
        let queue = queue.map_err(|_| OverloadError::Full { what, bound })?;
        Ok(Entered::Waiting { slots: Arc::clone(&self.slots), what, bound, _queue: queue })
    }

    /// Takes a place, after a short wait if it must be.
    pub(crate) async fn admit(&self, deadline: Deadline) -> Result<Admitted, OverloadError> {
        self.enter()?.admitted(deadline).await
    }
}

// === impl Entered ===

impl Entered {
    /// Waits for the place.
    pub(crate) async fn admitted(self, deadline: Deadline) -> Result<Admitted, OverloadError> {
        let admitted = match self {
            Self::Admitted(admitted) => admitted,
            Self::Waiting { slots, what, bound, .. } => {
                let longest = Deadline::default().at_most(MAX_ADMISSION_WAIT, Instant::now());
                let slot = longest.bound(deadline.bound(slots.acquire_owned())).await;
                let slot = slot.map_err(|_| OverloadError::Waited { what, bound })??;
                Admitted(slot.expect("the semaphore is never closed"))
            }
        };
        // A place that came too late goes to somebody who still waits.
        if deadline.has_passed(Instant::now()) { Err(OverloadError::Deadline) } else { Ok(admitted) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deadline(text: &'static str) -> Deadline {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-timeout", text.parse().unwrap());
        Deadline::of(&headers, Instant::now())
    }

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        for (text, expected) in [
            ("2H", Some(Duration::from_secs(7_200))),
            ("3M", Some(Duration::from_secs(180))),
            ("4S", Some(Duration::from_secs(4))),
            ("5m", Some(Duration::from_millis(5))),
            ("6u", Some(Duration::from_micros(6))),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("", None),
            ("m", None),
            ("5", None),
            ("5x", None),
            ("-5m", None),
            ("123456789m", None),
        ] {
            assert_eq!(parse_timeout(text.as_bytes()), expected, "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_leaves_time_for_the_answers_way_and_none_is_none() {
        let now = Instant::now();
        assert_eq!(deadline("100m").remaining(now), Some(Duration::from_millis(98)));
        assert_eq!(deadline("1m").remaining(now), Some(Duration::from_micros(875)));
        assert_eq!(deadline("soon").remaining(now), None);
        assert!(!Deadline::default().has_passed(now) && deadline("0m").has_passed(now));
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_is_late_is_not_begun() {
        let mut begun = false;
        let result = deadline("0m").bound(async { begun = true }).await;
        assert_eq!((result, begun), (Err(OverloadError::Deadline), false));
        let never = deadline("10m").bound(std::future::pending::<()>()).await;
        assert_eq!(never, Err(OverloadError::Deadline));
        assert_eq!(deadline("10m").bound(async { 7 }).await, Ok(7));
    }

    #[tokio::test(start_paused = true)]
    async fn calls_beyond_limit_and_queue_are_refused_at_once() {
        let admission = Admission::of_calls(1);
        let first = admission.admit(Deadline::default()).await.unwrap();
        let second = admission.enter().unwrap();
        assert!(matches!(second, Entered::Waiting { .. }));
        let refused = admission.enter().unwrap_err();
        assert_eq!(refused, OverloadError::Full { what: "calls", bound: 1 });
        assert!(refused.to_string().contains("--max-inflight-queries"), "{refused}");
        drop(first);
        assert!(second.admitted(Deadline::default()).await.is_ok());
        assert!(matches!(admission.enter(), Ok(Entered::Admitted(_))), "every place is free again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_after_its_bound_or_with_the_deadline() {
        let admission = Admission::of_calls(1);
        let _first = admission.admit(Deadline::default()).await.unwrap();
        let waited = admission.admit(Deadline::default()).await.unwrap_err();
        assert_eq!(waited, OverloadError::Waited { what: "calls", bound: 1 });
        let late = admission.admit(deadline("50m")).await.unwrap_err();
        assert_eq!(late, OverloadError::Deadline);
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_comes_after_the_deadline_is_left_to_others() {
        let admission = Admission::of_calls(1);
        let passed = deadline("0m");
        assert_eq!(admission.admit(passed).await.unwrap_err(), OverloadError::Deadline);
        assert!(matches!(admission.enter(), Ok(Entered::Admitted(_))));
    }

    #[test]
    fn large_prompts_leave_half_of_the_processors_to_others() {
        for (processors, bound) in [(1, 1), (2, 1), (16, 8)] {
            assert_eq!(Admission::of_large(processors).bound, bound);
        }
    }
}
