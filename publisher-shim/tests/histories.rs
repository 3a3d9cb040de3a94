//! Random engine histories through encoder, adapter, mirror and frames, compared with a naive model after each step.

mod common;

use common::engine::{BLOCK, Engine, Step, any_partition, any_step};
use common::{Reader, batch_at};
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

fn run((partition, lead): (Partition, usize), steps: &[Step]) -> Result<(), TestCaseError> {
    let script = || steps.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    let (mut engine, mut source, mut reader) =
        (Engine::deep(lead), source(partition), Reader::new(partition));
    for (number, step) in steps.iter().enumerate() {
        match step {
            Step::NewEpoch => source.new_epoch(),
            Step::Forget => reader.forget(),
            _ => {}
        }
        for event in engine.step(step) {
            engine.time += 1.0;
            let message = batch_at(engine.time, vec![event]);
            prop_assert_eq!(source.live(engine.seq, &message, false), Live::Done);
            engine.seq += 1;
        }
        reader.follow(&mut source, number as u64 + 1, number % 3 == 0);
        prop_assert_eq!(&reader.held(), &engine.truth(), "after step {} of:\n{}", number + 1, script());
        prop_assert_eq!(source.mirror().visible_blocks(), reader.blocks() as u64);
        engine.check_places(partition, &reader);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_index_believes_what_the_engine_holds_after_every_step_and_where(
        cut in any_partition(), steps in proptest::collection::vec(any_step(), 1..60)
    ) {
        run(cut, &steps)?;
    }
}
