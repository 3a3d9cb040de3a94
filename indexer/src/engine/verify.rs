//! Says what is wrong. Every invariant of the engine in one place, for tests and for a debug endpoint.

use std::collections::HashMap;

use super::Shared;
use super::sets::EMPTY;
use super::strand::{MAX_BLOCKS, Parent, Place};
use super::write::Writer;

impl Writer {
    pub(super) fn check(&self, shared: &Shared) -> Result<(), String> {
        let mut blocks_of: HashMap<u32, usize> = HashMap::new();
        let mut references: HashMap<u32, u32> = HashMap::new();
        let (mut known, mut distinct, mut entries, mut floating) = (0, 0, 0, 0);
        for strand in 1..self.top {
            let header = shared.strands.get(strand);
            let length = header.blocks();
            if length == 0 {
                continue;
            }
            let wrong = |what: String| Err(format!("strand {strand} of {length} blocks: {what}"));
            known += length as usize;
            let steps: Vec<_> = header.steps(&self.token).iter().collect();
            if length > MAX_BLOCKS || steps.first().is_none_or(|step| step.start != 0) {
                return wrong(format!("steps are {steps:?}"));
            }
            for pair in steps.windows(2) {
                if pair[0].set == pair[1].set || pair[0].start >= pair[1].start || pair[1].start >= length {
                    return wrong(format!("steps are {steps:?}"));
                }
            }
            for (at, step) in steps.iter().enumerate() {
                let end = steps.get(at + 1).map_or(length, |next| next.start);
                let blocks = (end - step.start) as usize;
                *references.entry(step.set).or_default() += 1;
                distinct += if step.set == EMPTY { 0 } else { blocks };
                shared.sets.get(step.set).each_holder(&self.token, |holder| {
                    *blocks_of.entry(holder).or_default() += blocks;
                    entries += blocks;
                });
            }
            for offset in 0..length {
                let key = header.key(offset, &self.token);
                if self.place_of(shared, key) != Some(Place::new(strand, offset)) {
                    return wrong(format!("{key:?} at {offset} is not there in the table"));
                }
            }
            let mut kids_end = 0;
            let mut kid = header.first_kid();
            while kid != 0 {
                let below = shared.strands.get(kid);
                match below.parent() {
                    Parent::At(place) if place.strand() == strand && below.blocks() > 0 => {
                        kids_end = kids_end.max(place.offset() + 1);
                        if header.kids_filter() >> (place.offset() % 32) & 1 == 0 {
                            return wrong(format!("child {kid} at {} is not in the filter", place.offset()));
                        }
                    }
                    other => return wrong(format!("child {kid} follows {other:?}")),
                }
                kid = below.siblings().1;
            }
            if kids_end > header.kids_end() || kids_end > length {
                return wrong(format!("children up to {kids_end}, {} noted", header.kids_end()));
            }
            let last = steps[steps.len() - 1];
            if last.set == EMPTY && last.start.max(header.kids_end()) < length {
                return wrong("its end is of no use to anybody".into());
            }
            match header.parent() {
                Parent::Unknown => floating += 1,
                Parent::At(place) if place.offset() >= shared.strands.get(place.strand()).blocks() => {
                    return wrong(format!("follows {place:?}, which is not there"));
                }
                Parent::Root | Parent::At(_) => {}
            }
        }
        let counted =
            (self.distinct, self.entries, shared.floating.load(std::sync::atomic::Ordering::Relaxed));
        if counted != (distinct, entries, floating) || known != self.table.filled() {
            return Err(format!(
                "{distinct} blocks, {entries} entries, {floating} floating strands and {known} keys; counted were \
                 {counted:?} and {}",
                self.table.filled()
            ));
        }
        for (holder, state) in self.holders.iter().enumerate() {
            let held = blocks_of.get(&(holder as u32)).copied().unwrap_or(0);
            if held != state.blocks {
                return Err(format!("holder {holder} has {held} blocks, {} counted", state.blocks));
            }
        }
        for set in 1..self.sets.numbers() {
            let counted = references.get(&set).copied().unwrap_or(0);
            if counted != self.sets.references(set) {
                return Err(format!("set {set}: {counted} steps, {} counted", self.sets.references(set)));
            }
        }
        Ok(())
    }
}
