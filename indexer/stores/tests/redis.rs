//! What only Redis and Valkey bring: encryption, passwords, expiry, a memory limit, and keys on several nodes.

mod places;

use std::fs;
use std::time::Duration;

use kvatlas_index::CheckpointSize;
use kvatlas_index::store::{CheckpointStore, WriteCheckpoint};
use kvatlas_stores::test_server::{Certificates, PASSWORD, TlsServer, ValkeyCluster, ValkeyServer};
use kvatlas_stores::{PIECE_BYTES, Password, RedisStore, StoreAccess};
use places::{access, keys, redis_location, seconds_left, tls_access, tls_location};
use redis::{RedisResult, cmd};

const ANY_SIZE: u64 = 1 << 30;

fn writes(bytes: &[u8]) -> WriteCheckpoint {
    let bytes = bytes.to_vec();
    Box::new(move |out| {
        out.write_all(&bytes)?;
        Ok(CheckpointSize { bytes: bytes.len() as u64, ..CheckpointSize::default() })
    })
}

fn some(pieces: usize) -> Vec<u8> {
    (0..pieces * PIECE_BYTES + 99).map(|n| (n * 31 / 7 % 256) as u8).collect()
}

async fn round_trip(store: &RedisStore) {
    let bytes = some(3);
    store.save(writes(&bytes)).await.unwrap();
    assert!(store.load(ANY_SIZE).await.unwrap().unwrap() == bytes);
}

async fn reasons(store: &RedisStore) -> (&'static str, &'static str) {
    let load = store.load(ANY_SIZE).await.unwrap_err();
    let save = store.save(writes(&some(0))).await.unwrap_err();
    for text in [load.to_string(), save.to_string()] {
        assert!(!text.contains(PASSWORD) && !text.contains('\n'), "{text}");
    }
    (load.reason(), save.reason())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_server_takes_those_who_have_certificate_and_password() {
    let certificates = Certificates::new();
    let Some(server) = TlsServer::start(&certificates).await else { return };
    let with = |access| RedisStore::new(tls_location(&server), access);
    round_trip(&with(tls_access(&certificates))).await;

    let no_certificate = StoreAccess { client_identity: None, ..tls_access(&certificates) };
    assert_eq!(reasons(&with(no_certificate)).await, ("unreachable", "unreachable"));
    let no_password = StoreAccess { password: Password::None, ..tls_access(&certificates) };
    assert_eq!(reasons(&with(no_password)).await, ("unauthorized", "unauthorized"));
    let other_authority =
        StoreAccess { ca_file: Some(Certificates::new().ca_file()), ..tls_access(&certificates) };
    assert_eq!(
        reasons(&with(other_authority)).await,
        ("secret", "secret"),
        "the folder is gone with its value"
    );
    let others = Certificates::new();
    let other_authority = StoreAccess { ca_file: Some(others.ca_file()), ..tls_access(&certificates) };
    assert_eq!(reasons(&with(other_authority)).await, ("unreachable", "unreachable"));
    let in_the_clear = redis_location(&format!("redis://{}", server.address()));
    assert_eq!(reasons(&RedisStore::new(in_the_clear, access())).await, ("unreachable", "unreachable"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_cluster_is_reached_at_all_its_nodes() {
    let certificates = Certificates::new();
    let Some(cluster) = ValkeyCluster::start_tls(&certificates).await else { return };
    let location = redis_location(&format!("redis-cluster+tls://{}", cluster.hosts()));
    round_trip(&RedisStore::new(location.clone(), tls_access(&certificates))).await;
    let no_password = StoreAccess { password: Password::None, ..tls_access(&certificates) };
    assert_eq!(reasons(&RedisStore::new(location, no_password)).await, ("unauthorized", "unauthorized"));
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_are_spread_over_the_nodes_of_a_cluster() {
    let Some(cluster) = ValkeyCluster::start() else { return };
    let location = redis_location(&format!("redis-cluster://{}", cluster.hosts()));
    let store = RedisStore::new(location, access());
    let bytes = some(24);
    store.save(writes(&bytes)).await.unwrap();
    // 26 keys whose places are as good as random: that a third of the slots gets none is one in 30,000.
    let each: Vec<usize> = cluster.nodes().iter().map(|node| keys(node, 0).len()).collect();
    assert!(each.iter().sum::<usize>() == 27 && each.iter().all(|keys| *keys > 0), "{each:?}");
    assert!(store.load(ANY_SIZE).await.unwrap().unwrap() == bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_was_replaced_on_disk_is_used_the_next_time() {
    let Some(server) = ValkeyServer::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("password");
    let access = StoreAccess { password: Password::File(path.clone()), ..StoreAccess::default() };
    let store = RedisStore::new(redis_location(&format!("redis://{}", server.address())), access);
    assert_eq!(reasons(&store).await, ("secret", "secret"));
    fs::write(&path, "wrong").unwrap();
    assert_eq!(reasons(&store).await, ("unauthorized", "unauthorized"));
    fs::write(&path, format!("{PASSWORD}\n")).unwrap();
    round_trip(&store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_may_be_limited_to_its_own_keys_and_the_commands_that_are_needed() {
    let Some(server) = ValkeyServer::start() else { return };
    let rules = ["SETUSER", "atlas", "on", ">pw", "~kvatlas:*", "+get", "+set", "+unlink", "+client"];
    let made: RedisResult<()> = cmd("ACL").arg(&rules).query(&mut server.connect());
    made.unwrap();
    let access = || StoreAccess {
        user: Some("atlas".to_owned()),
        password: Password::Given("pw".to_owned()),
        ..StoreAccess::default()
    };
    let at = |query: &str| redis_location(&format!("redis://{}{query}", server.address()));
    round_trip(&RedisStore::new(at(""), access())).await;
    let elsewhere = RedisStore::new(at("?prefix=other"), access());
    assert_eq!(reasons(&elsewhere).await, ("unauthorized", "unauthorized"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_key_expires_and_pieces_not_before_their_manifest() {
    let Some(server) = ValkeyServer::start() else { return };
    let store = RedisStore::new(redis_location(&format!("redis://{}?ttl-s=600", server.address())), access());
    round_trip(&store).await;
    assert_eq!(store.keeps_for(), Some(Duration::from_secs(600)));
    let left = |key: &String| seconds_left(&server, key);
    let (manifest, pieces): (Vec<_>, Vec<_>) =
        keys(&server, 0).into_iter().partition(|key| key == "kvatlas:index");
    assert_eq!((manifest.len(), pieces.len()), (1, 5));
    assert!(left(&manifest[0]) <= Duration::from_secs(600));
    for key in &pieces {
        assert!(left(key) > left(&manifest[0]) && left(key) <= Duration::from_secs(900), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_keeps_the_old_checkpoint_and_the_next_save_clears_up() {
    let Some(server) = ValkeyServer::start_with(&["--maxmemory", "30mb", "--maxmemory-policy", "noeviction"])
    else {
        return;
    };
    let store = RedisStore::new(redis_location(&format!("redis://{}", server.address())), access());
    let old = some(1);
    store.save(writes(&old)).await.unwrap();
    let error = store.save(writes(&some(12))).await.unwrap_err();
    assert!(error.reason() == "refused" && error.to_string().contains("memory"), "{error}");
    assert!(store.load(ANY_SIZE).await.unwrap().unwrap() == old);
    assert!(keys(&server, 0).len() > 4, "what the failed save wrote is still there");
    store.save(writes(&some(1))).await.unwrap();
    assert_eq!(keys(&server, 0).len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_with_one_name_share_the_last_checkpoint_and_leave_nothing() {
    let Some(server) = ValkeyServer::start() else { return };
    let location = || redis_location(&format!("redis://{}", server.address()));
    let (one, two) = (RedisStore::new(location(), access()), RedisStore::new(location(), access()));
    for (store, pieces) in [(&one, 1), (&two, 3), (&two, 2), (&one, 0)] {
        store.save(writes(&some(pieces))).await.unwrap();
        assert!(one.load(ANY_SIZE).await.unwrap().unwrap() == some(pieces));
    }
    let apart = redis_location(&format!("redis://{}?name=other", server.address()));
    RedisStore::new(apart, access()).save(writes(&some(0))).await.unwrap();
    assert!(two.load(ANY_SIZE).await.unwrap().unwrap() == some(0));
    assert_eq!(keys(&server, 0).len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_is_no_manifest_is_torn_and_replaced() {
    let Some(server) = ValkeyServer::start() else { return };
    let store = RedisStore::new(redis_location(&format!("redis://{}", server.address())), access());
    for value in ["something else", "kvatlas-checkpoint 2 a 1 1 a"] {
        let set: RedisResult<()> = cmd("SET").arg("kvatlas:index").arg(value).query(&mut server.connect());
        set.unwrap();
        assert_eq!(store.load(ANY_SIZE).await.unwrap_err().reason(), "torn");
        round_trip(&store).await;
    }
    // A piece that was exchanged does not fit its checksum, and one that grew is not read to its end.
    let manifest: String = cmd("GET").arg("kvatlas:index").query(&mut server.connect()).unwrap();
    let piece = format!("kvatlas:index:{}:1", manifest.split(' ').nth(2).unwrap());
    let changed: RedisResult<()> = cmd("SETRANGE").arg(&piece).arg(5).arg("x").query(&mut server.connect());
    changed.unwrap();
    assert_eq!(store.load(ANY_SIZE).await.unwrap_err().reason(), "torn");
    let grown: RedisResult<()> = cmd("APPEND").arg(&piece).arg("more").query(&mut server.connect());
    grown.unwrap();
    assert_eq!(store.load(ANY_SIZE).await.unwrap_err().reason(), "torn");
}
