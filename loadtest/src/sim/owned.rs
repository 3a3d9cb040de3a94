//! Which shards an index owns, how that changes at run time, and what must hold of it.
//!
//! * What is given up is not visible any more. What is taken in is not known before something was heard of it, and is
//!   exact as soon as it is visible ([`super::checks`] looks).
//! * An index that says that it has found everything out ([`kvatlas_index::Index::is_finding_out`], after the time that
//!   publishers have to show themselves) shows every source that it shows in one of its shards in all of them. In a shard
//!   that it took in when there were no faults any more, it knows every source that lives, and all of them are exact. (Where
//!   a clock was set back, a source that lives may be taken for an older life of itself until that one's lease ends.)

use std::collections::BTreeMap;

use bytes::Bytes;
use kvatlas_index::{DISCOVERY, OwnerFilter};
use kvatlas_proto::{ShardId, ShardSet};

use super::bus::Kind;
use super::checks::{Claim, claim};
use super::world::{Event, World};
use super::{EXACT_MS, until_exact};

/// How long publishers have to show themselves, microseconds: as in the server.
const DISCOVERY_US: u64 = DISCOVERY.as_micros() as u64;
/// Time between two looks whether everything is found out, while that is waited for, microseconds.
const LOOK_US: u64 = 10_000;

// === impl World: what indexes own ===

impl World {
    /// An index is to own other shards. It takes them in when it runs and does not stand still.
    pub(super) fn want(&mut self, number: usize, set: ShardSet, beside: bool) {
        let shards = set.shards(self.partition);
        let process = &mut self.indexes[number];
        if !beside {
            process.wanted.clear();
        }
        process.wanted.extend(shards);
        if process.is_up() {
            let life = process.life;
            self.at(self.now_us, Event::Own { index: number, life });
        }
    }

    /// A running index owns what it is to own from now on.
    pub(super) fn on_own(&mut self, number: usize) {
        let process = &mut self.indexes[number];
        let before = std::mem::take(&mut process.owned);
        let since_us = |shard: &ShardId| before.get(shard).copied().unwrap_or(self.now_us);
        process.owned = process.wanted.iter().map(|shard| (*shard, since_us(shard))).collect();
        let owned: Vec<ShardId> = process.owned.keys().copied().collect();
        let Some(index) = process.index() else { return };
        index.own(&owned);
        // What was heard of a shard is given up with it.
        process.heard.retain(|(_, shard), _| owned.contains(shard));
        let shown: Vec<String> = owned.iter().map(ToString::to_string).collect();
        self.log.line(self.now_us, format_args!("index {number} owns [{}]", shown.join(" ")));
        self.check_owned(number, &before);
        self.begins_to_find_out(number);
    }

    /// Publishers are asked to show themselves, and have some time for it.
    pub(super) fn begins_to_find_out(&mut self, number: usize) {
        let process = &mut self.indexes[number];
        (process.finding_out, process.owned_since_us) = (true, self.now_us);
        for shim in 0..self.shims.len() {
            self.send_to_shim(number, shim, Kind::Hello, &Bytes::new());
        }
    }

    /// What is not owned is not there, and neither is what was taken in just now.
    fn check_owned(&mut self, number: usize, before: &BTreeMap<ShardId, u64>) {
        let process = &self.indexes[number];
        let Some(index) = process.index() else { return };
        let inconsistent = index.check().err();
        let visible = self.partition.all().find(|shard| {
            let filter = OwnerFilter { shard: Some(*shard), ..OwnerFilter::default() };
            let kept = before.contains_key(shard) && process.owned.contains_key(shard);
            let known = !index.sources(&filter, self.now_ms()).is_empty() || !index.dump(&filter).is_empty();
            (known && !kept) || index.owns(*shard) != process.owned.contains_key(shard)
        });
        if let Some(error) = inconsistent {
            self.fail(
                "a change of what is owned leaves an index consistent",
                format!("index {number}: {error}"),
            );
        }
        if let Some(shard) = visible {
            let what = format!("index {number} shows sources in shard {shard}");
            self.fail("what was given up or taken in just now is not visible", what);
        }
    }

    /// Looks whether an index has found out everything, if that is so.
    pub(super) fn look_found_out(&mut self, number: usize) {
        let process = &self.indexes[number];
        let Some(index) = process.index() else { return };
        let waits = self.now_us < process.owned_since_us + DISCOVERY_US;
        if waits || index.is_finding_out(self.now_ms()) {
            return;
        }
        self.counts.found_out += 1;
        self.indexes[number].finding_out = false;
        for shim in 0..self.shims.len() {
            if let Some(what) = self.not_found_out(number, shim) {
                let what = format!("index {number} says that it knows everything: {what}");
                return self.fail("who has found everything out shows every source in all its shards", what);
            }
        }
    }

    /// `None` if an index shows a source in all of its shards, or in none because it need not know it yet.
    fn not_found_out(&self, number: usize, shim: usize) -> Option<String> {
        let states: Vec<_> = self.indexes[number]
            .owned
            .iter()
            .map(|(shard, since_us)| {
                (*shard, *since_us, self.look(number, shim, *shard).map(|(info, _)| info.state))
            })
            .collect();
        let hidden =
            states.iter().filter(|(.., state)| state.map(claim).is_none_or(Claim::is_hidden)).count();
        let as_one = hidden == 0 || hidden == states.len();
        let inexact = states.iter().find(|(_, since_us, state)| {
            self.must_be_known(shim, *since_us)
                && !state.map(claim).is_some_and(|claim| self.is_found_out(claim))
        });
        (!as_one || inexact.is_some()).then(|| format!("shim {shim} is {states:?}, the worst {inexact:?}"))
    }

    /// Whether a source lives and nothing keeps it from being heard by an index that takes in a shard then.
    fn must_be_known(&self, shim: usize, taken_in_us: u64) -> bool {
        let without_faults = self.quiet_since_us.is_some_and(|quiet_us| taken_in_us >= quiet_us);
        let lives = self.shims[shim].speaks_since_us().is_some_and(|since_us| since_us < taken_in_us);
        without_faults && lives && !self.clock_went_back
    }

    fn is_found_out(&self, claim: Claim) -> bool {
        // A frame for which there was no room behind others is asked for as soon as they are known.
        claim == Claim::Exact || (self.small_buffers && claim == Claim::Doubtful)
    }

    /// With everything quiet and exact, the indexes change what they own; first each takes over what another one had, then
    /// everything. Each time all must be found out, and exact, in the usual time.
    pub(super) fn hand_over(&mut self) {
        let parts = self.indexes.len().max(2) as u32;
        for everything in [false, true] {
            for number in 0..self.indexes.len() {
                let next = ShardSet::new((number as u32 + 1) % parts, parts)
                    .expect("a remainder is below its divisor");
                let (set, beside) = if everything { (ShardSet::ALL, true) } else { (next, false) };
                self.want(number, set, beside);
            }
            let since_us = self.now_us;
            let finding_out = |world: &Self| world.indexes.iter().any(|process| process.finding_out);
            while self.failure.is_none() && (self.now_us == since_us || finding_out(self)) {
                self.run_until(self.now_us + LOOK_US);
                if self.now_us - since_us > EXACT_MS * 1_000 {
                    let what =
                        format!("after {EXACT_MS} ms an index does not know everything that it took in");
                    return self.fail("what is taken in is found out in time", what);
                }
            }
            until_exact(self, since_us, EXACT_MS);
        }
    }
}
