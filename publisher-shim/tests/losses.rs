//! Events that are lost for good: what is claimed afterwards is never more than the engine holds, and it grows back.

mod common;

use common::engine::{BLOCK, Engine, Step, any_partition, any_step};
use common::{Reader, batch_at};
use kvatlas_proto::frame::SourceHealth;
use kvatlas_proto::{InstanceId, Partition};
use kvatlas_shim::source::{Live, Source, SourceConfig};
use proptest::prelude::*;

fn source(partition: Partition) -> Source {
    let config = SourceConfig {
        partition,
        block_size: Some(BLOCK as u32),
        ..SourceConfig::new("m", InstanceId::new("a:1").unwrap())
    };
    Source::new(config, 1).unwrap()
}

/// A source without replay, its engine, and a reader.
struct Rig {
    engine: Engine,
    source: Source,
    reader: Reader,
    now: u64,
}

impl Rig {
    fn new(partition: Partition, lead: usize) -> Self {
        let (source, reader) = (source(partition), Reader::new(partition));
        Self { engine: Engine::deep(lead), source, reader, now: 1 }
    }

    /// Performs a step; its message is lost or arrives. Says whether the reader can know of everything before.
    fn step(&mut self, step: &Step, lost: bool) -> bool {
        self.now += 1;
        if matches!(step, Step::Restart) {
            // No engine restarts behind a connection that stays.
            self.source.connected();
        }
        let events = self.engine.step(step);
        let arrived = !events.is_empty() && !lost;
        if !events.is_empty() {
            self.engine.time += 1.0;
            let message = batch_at(self.engine.time, events);
            if !lost {
                assert_eq!(self.source.live(self.engine.seq, &message, false), Live::Done);
            }
            self.engine.seq += 1;
        }
        self.reader.follow(&mut self.source, self.now, true);
        arrived
    }

    /// Whether everything that the reader believes in is held.
    fn claims_too_much(&self) -> bool {
        let truth = self.engine.truth();
        let held = |owner| truth.get(owner).cloned().unwrap_or_default();
        !self.reader.held().iter().all(|(owner, keys)| keys.is_subset(&held(owner)))
    }

    fn blocks(&self) -> usize {
        self.reader.blocks()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_lost_no_more_is_claimed_than_the_engine_holds(
        (partition, lead) in any_partition(),
        steps in proptest::collection::vec((any_step(), prop::bool::weighted(0.1)), 1..80),
    ) {
        let mut rig = Rig::new(partition, lead);
        for (number, (step, lost)) in steps.iter().enumerate() {
            // A loss shows with the next message that arrives.
            if rig.step(step, *lost) {
                prop_assert!(!rig.claims_too_much(), "after step {} of {:?}", number + 1, steps);
            }
        }
    }
}

#[test]
fn what_the_engine_stores_again_counts_again_and_a_reset_makes_the_source_exact() {
    let mut rig = Rig::new(Partition::WHOLE, 0);
    rig.step(&Step::Compute { prompt: 0, blocks: 6 }, false);
    rig.step(&Step::Compute { prompt: 3, blocks: 6 }, true);
    // Prompt 2 shares its first two blocks with prompt 0; the engine does not store these again.
    rig.step(&Step::Compute { prompt: 2, blocks: 6 }, false);
    assert_eq!((rig.blocks(), rig.source.health()), (4, SourceHealth::EventsLost));
    // A block that is evicted and computed again is known again.
    rig.step(&Step::Evict { prompt: 0, block: 1, medium: 0 }, false);
    rig.step(&Step::Compute { prompt: 0, blocks: 2 }, false);
    assert_eq!(rig.blocks(), 5);
    rig.step(&Step::Clear, false);
    rig.step(&Step::Compute { prompt: 0, blocks: 6 }, false);
    assert_eq!((rig.reader.held(), rig.source.health()), (rig.engine.truth(), SourceHealth::Exact));
}
