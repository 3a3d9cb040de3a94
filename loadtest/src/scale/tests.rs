//! The study in small: its figures must be of the real thing, and the same for the same seed.

use super::*;
use crate::scale::tally::SERVERS;
use kvatlas_proto::shard::SEGMENT_BLOCKS;

fn small() -> ScaleConfig {
    ScaleConfig {
        pods: MIN_PODS,
        blocks_per_pod: MIN_BLOCKS_PER_POD,
        window_s: 1,
        queries: 12,
        hot_pods: vec![70, 90],
        shards: 64,
        ..ScaleConfig::quick()
    }
}

fn study(config: &ScaleConfig) -> ScaleReport {
    run(config, &mut |_| {}).unwrap()
}

/// Everything that is counted; what is measured differs from run to run.
fn counted(report: &ScaleReport) -> Vec<String> {
    let of = |workload: &WorkloadReport| {
        let WorkloadReport { name, traffic, divisions, requests, distinct_blocks, hit_share, .. } = workload;
        format!("{name} {traffic:?} {divisions:?} {requests} {distinct_blocks} {hit_share}")
    };
    report.workloads.iter().map(of).collect()
}

#[test]
fn one_seed_gives_one_study() {
    let first = counted(&study(&small()));
    assert_eq!(first, counted(&study(&small())));
    assert_ne!(first, counted(&study(&ScaleConfig { seed: 2, ..small() })));
}

/// The comparison of cuts rests on sizes of messages by a formula: it must give what the real messages have, questions exactly
/// and answers, whose parts are padded, to a twentieth.
#[test]
fn counted_messages_are_as_large_as_real_ones() {
    for workload in study(&small()).workloads {
        for servers in SERVERS {
            let counted = workload
                .divisions
                .iter()
                .find(|row| {
                    row.cut == Cut::Segment(SEGMENT_BLOCKS) && row.shards == 64 && row.servers == servers
                })
                .unwrap();
            let real =
                workload.queries.iter().find(|row| row.servers == servers && row.candidates == 0).unwrap();
            let near = |a: f64, b: f64, by: f64| (a / b - 1.0).abs() < by;
            let what = format!("{} {servers}: {counted:?} {real:?}", workload.name);
            assert_eq!(counted.fan_out, real.fan_out, "{what}");
            assert!(near(counted.question_bytes, real.question_bytes, 0.01), "{what}");
            assert!(near(counted.answer_bytes, real.answer_bytes, 0.05), "{what}");
        }
    }
}

#[test]
fn what_cannot_be_studied_is_refused_and_explained() {
    let refused = |config: ScaleConfig| run(&config, &mut |_| {}).unwrap_err().to_string();
    assert!(refused(ScaleConfig { pods: 3, ..small() }).contains("20 to 2000"));
    assert!(refused(ScaleConfig { blocks_per_pod: 10, ..small() }).contains("at least 4000"));
    assert!(refused(ScaleConfig { pods: 2_000, blocks_per_pod: 50_000, ..small() }).contains("at most"));
    assert!(refused(ScaleConfig { queries: 0, ..small() }).contains("at least 1"));
    assert!(refused(ScaleConfig { shards: 0, ..small() }).contains("shards"));
    let nowhere = refused(ScaleConfig { traces: Some("/nowhere".into()), ..small() });
    assert!(nowhere.contains("cannot read"), "{nowhere}");
}
