//! What every checkpoint store promises, kept by each of them with a real server behind it and a real index in front of it.

#[path = "../../tests/common/mod.rs"]
mod common;
mod places;

use std::sync::Arc;
use std::time::Duration;

use common::frames::{Op, Publisher};
use common::{PATIENCE, Stage, ask_keys, config};
use kvatlas_index::store::WriteCheckpoint;
use kvatlas_index::{CheckpointConfig, CheckpointSize, CheckpointStore, IndexServerConfig};
use kvatlas_stores::PIECE_BYTES;
use places::{ClusterPlace, FilePlace, NatsPlace, Place, RedisPlace};

/// Never comes in a test: only the last checkpoint is saved, at the end.
const AT_THE_END: Duration = Duration::from_secs(3_600);
const OFTEN: Duration = Duration::from_millis(100);
const ANY_SIZE: u64 = 1 << 30;

#[tokio::test(flavor = "multi_thread")]
async fn a_file_keeps_every_promise() {
    keeps_every_promise(&mut FilePlace::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nats_bucket_keeps_every_promise() {
    let Some(mut place) = NatsPlace::start() else { return };
    keeps_every_promise(&mut place).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_server_keeps_every_promise() {
    let Some(mut place) = RedisPlace::start() else { return };
    keeps_every_promise(&mut place).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_cluster_keeps_every_promise() {
    let Some(mut place) = ClusterPlace::start() else { return };
    keeps_every_promise(&mut place).await;
}

async fn keeps_every_promise(place: &mut dyn Place) {
    what_is_missing_is_no_failure(place).await;
    what_was_saved_is_there_for_the_next_server_and_replaced_as_a_whole(place).await;
    what_is_torn_or_damaged_is_refused_counted_and_replaced(place).await;
    while_it_is_away_the_server_serves_and_when_it_is_back_it_gets_a_checkpoint(place).await;
    a_checkpoint_of_many_pieces_comes_back_and_leaves_nothing_of_the_one_before(place).await;
    a_save_that_fails_leaves_the_old_checkpoint(place).await;
}

async fn what_is_missing_is_no_failure(place: &mut dyn Place) {
    let stage = Stage::with(keeping(place, AT_THE_END)).await;
    ready(&stage).await;
    let (_, metrics) = stage.get("/metrics").await;
    assert!(!metrics.contains("checkpoint_refused_total{"), "{metrics}");
    assert!(
        metrics.contains("checkpoint_age_seconds inf") || metrics.contains("checkpoint_age_seconds +Inf"),
        "{metrics}"
    );
    // An index that has nothing to say does not say it.
    assert!(stage.server.shutdown().await);
    assert!(place.store().load(ANY_SIZE).await.unwrap().is_none());
}

async fn what_was_saved_is_there_for_the_next_server_and_replaced_as_a_whole(place: &mut dyn Place) {
    let stage = Stage::with(keeping(place, AT_THE_END)).await;
    let mut a = Publisher::new("m", "a:1");
    stage.publish(&mut a, &[Op::Stored(0, vec![1, 2])]).await;
    assert!(stage.server.shutdown().await, "a checkpoint is saved at the end");

    let stage = Stage::with(keeping(place, AT_THE_END)).await;
    holds(&stage, 2).await;
    assert!(stage.score(ask_keys("m", [1])).await.unwrap().instances.is_empty(), "nothing counts unproved");
    let (_, metrics) = stage.get("/metrics").await;
    assert!(metrics.contains("kvatlas_index_checkpoint_restored_blocks 2"), "{metrics}");
    stage.publish(a.epoch(2), &[Op::Stored(0, vec![1, 2, 3])]).await;
    assert!(stage.server.shutdown().await);

    let stage = Stage::with(keeping(place, AT_THE_END)).await;
    holds(&stage, 3).await;
    assert!(stage.server.shutdown().await);
}

async fn what_is_torn_or_damaged_is_refused_counted_and_replaced(place: &mut dyn Place) {
    let mut whole = place.store().load(ANY_SIZE).await.unwrap().unwrap();
    place.tear().await;
    refuses(place, place.torn()).await;
    *whole.last_mut().unwrap() ^= 1;
    place.store().save(writes(whole)).await.unwrap();
    refuses(place, "damaged").await;
    assert_eq!(place.store().load(4).await.unwrap_err().reason(), "too_large");

    let stage = Stage::with(keeping(place, AT_THE_END)).await;
    stage.publish(&mut Publisher::new("m", "b:1"), &[Op::Stored(0, vec![7])]).await;
    assert!(stage.server.shutdown().await);
    let stage = Stage::with(keeping(place, AT_THE_END)).await;
    holds(&stage, 1).await;
    assert!(stage.server.shutdown().await);
}

/// A server starts cold, serves, and counts why.
async fn refuses(place: &dyn Place, reason: &str) {
    let stage = Stage::with(keeping(place, AT_THE_END)).await;
    ready(&stage).await;
    assert_eq!(stage.server.index().totals(0).blocks, 0);
    counts(&stage, &format!("checkpoint_refused_total{{store=\"{}\",reason=\"{reason}\"}} 1", place.kind()))
        .await;
    stage.score(ask_keys("m", [1])).await.unwrap();
    assert!(stage.server.shutdown().await);
}

async fn while_it_is_away_the_server_serves_and_when_it_is_back_it_gets_a_checkpoint(place: &mut dyn Place) {
    place.stop();
    let (load, save) = place.stopped();
    let stage = Stage::with(keeping(place, OFTEN)).await;
    let mut a = Publisher::new("m", "a:1");
    stage.publish(&mut a, &[Op::Stored(0, vec![1, 2])]).await;
    assert_eq!(stage.score(ask_keys("m", [1])).await.unwrap().instances.len(), 1);
    counts(&stage, &format!("checkpoint_refused_total{{store=\"{}\",reason=\"{load}\"}} 1", place.kind()))
        .await;
    counts(&stage, &format!("checkpoint_failures_total{{store=\"{}\",reason=\"{save}\"}}", place.kind()))
        .await;

    place.start();
    counts(&stage, &format!("checkpoints_written_total{{store=\"{}\"}} 1", place.kind())).await;
    let (_, metrics) = stage.get("/metrics").await;
    assert!(!metrics.contains("checkpoint_age_seconds inf"), "{metrics}");
    assert!(stage.server.shutdown().await);
    let stage = Stage::with(keeping(place, AT_THE_END)).await;
    holds(&stage, 2).await;

    // A server that is asked to end does not wait for a store that is away.
    place.stop();
    stage.publish(&mut Publisher::new("m", "b:1"), &[Op::Stored(0, vec![7])]).await;
    assert!(stage.server.shutdown().await);
    place.start();
}

async fn a_checkpoint_of_many_pieces_comes_back_and_leaves_nothing_of_the_one_before(place: &mut dyn Place) {
    let store = place.store();
    for pieces in [3, 1, 2] {
        let bytes: Vec<u8> = (0..pieces * PIECE_BYTES + 777).map(|n| (n * 31 / 7 % 256) as u8).collect();
        let size = store.save(writes(bytes.clone())).await.unwrap();
        assert_eq!(size.bytes, bytes.len() as u64);
        assert_eq!(place.parts().await, place.parts_of(bytes.len()));
        assert!(place.store().load(ANY_SIZE).await.unwrap().unwrap() == bytes, "the same bytes come back");
    }
}

async fn a_save_that_fails_leaves_the_old_checkpoint(place: &mut dyn Place) {
    let store = place.store();
    let old = b"an old checkpoint of some bytes".to_vec();
    store.save(writes(old.clone())).await.unwrap();
    let failing: WriteCheckpoint = Box::new(|out| {
        out.write_all(&vec![7; 2 * PIECE_BYTES])?;
        Err(std::io::Error::other("no more"))
    });
    assert_eq!(store.save(failing).await.unwrap_err().reason(), "unwritable");
    assert_eq!(place.store().load(ANY_SIZE).await.unwrap().unwrap(), old);
    let new = b"a new checkpoint of some bytes".to_vec();
    store.save(writes(new.clone())).await.unwrap();
    assert_eq!(place.store().load(ANY_SIZE).await.unwrap().unwrap(), new);
}

fn keeping(place: &dyn Place, interval: Duration) -> IndexServerConfig {
    let store: Arc<dyn CheckpointStore> = place.store();
    IndexServerConfig { checkpoint: Some(CheckpointConfig { store, interval }), ..config() }
}

fn writes(bytes: Vec<u8>) -> WriteCheckpoint {
    Box::new(move |out| {
        out.write_all(&bytes)?;
        Ok(CheckpointSize { bytes: bytes.len() as u64, ..CheckpointSize::default() })
    })
}

async fn ready(stage: &Stage) {
    until(stage, "/readyz", "ready").await;
}

async fn counts(stage: &Stage, metric: &str) {
    until(stage, "/metrics", metric).await;
}

async fn holds(stage: &Stage, blocks: usize) {
    stage.until("the checkpoint is taken in", || stage.server.index().totals(0).blocks == blocks).await;
}

async fn until(stage: &Stage, page: &str, wanted: &str) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !stage
            .get(page)
            .await
            .1
            .lines()
            .any(|line| line.contains(wanted) && !line.contains("not ready"))
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "{page} never showed {wanted}:\n{}", stage.get(page).await.1);
}
