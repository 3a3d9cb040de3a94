//! `ReportOutcome`: what an engine says of a request is compared with what was predicted for it, over a real connection.

mod common;

use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;
use common::frames::{Op, Publisher};
use common::{Stage, ask, ask_keys, prompt, tokens};
use kvatlas_bus::Bus;
use kvatlas_client::{CallError, Client, ClientConfig};
use kvatlas_index::{MAX_REQUEST_NAME_BYTES, OwnerFilter, REMEMBERED_REQUESTS};
use kvatlas_proto::KeyHasher;
use kvatlas_proto::ShardId;
use kvatlas_proto::grpc as pb;
use kvatlas_proto::grpc::PredictionSource::{Given, LookedUp, Remembered};
use kvatlas_proto::subject::Subjects;
use parking_lot::Mutex;
use tonic::Code;

/// 70 tokens: four blocks of 16 and a rest, so that all four can be cached.
fn ids() -> Vec<u32> {
    (0..70).collect()
}

fn of_ids() -> Vec<u64> {
    KeyHasher::default().chain(&ids(), 16).iter().map(|key| key.0).collect()
}

fn scored_as(request_id: u64) -> pb::ScoreRequest {
    pb::ScoreRequest { request_id, ..ask(prompt("m", tokens(ids()))) }
}

fn report(request_id: u64, instance: &str, cached_tokens: u32) -> pb::ReportOutcomeRequest {
    pb::ReportOutcomeRequest {
        request_id,
        instance: instance.into(),
        cached_tokens: Some(cached_tokens),
        ..pb::ReportOutcomeRequest::default()
    }
}

fn answer(error: i64, predicted: u32, source: pb::PredictionSource) -> pb::ReportOutcomeResponse {
    pb::ReportOutcomeResponse {
        error_tokens: error,
        predicted_tokens: predicted,
        prediction_source: source.into(),
    }
}

fn client(stage: &Stage) -> Client {
    Client::connect(ClientConfig::new(stage.server.grpc_addr().to_string())).unwrap()
}

async fn refused(client: &Client, request: pb::ReportOutcomeRequest) -> (Code, String) {
    match client.report_outcome(request).await.unwrap_err() {
        CallError::Refused { call: "ReportOutcome", code, message, .. } => (code, message),
        other => panic!("{other:?}"),
    }
}

/// The metrics page.
async fn metrics(stage: &Stage) -> String {
    stage.get("/metrics").await.1
}

/// A stage on which a:1 holds the first two blocks of the prompt on the GPU and all four on the CPU.
async fn stage() -> (Stage, Publisher) {
    let stage = Stage::start().await;
    let (mut a, of) = (Publisher::new("m", "a:1"), of_ids());
    stage.publish(&mut a, &[Op::Stored(0, of[..2].to_vec()), Op::Stored(1, of)]).await;
    (stage, a)
}

async fn verify(stage: &Stage, publisher: &mut Publisher) {
    let header = &publisher.header;
    let subject = Subjects::default().events(header.scope.token(), ShardId::WHOLE, &header.source);
    stage.bus.publish(subject, Bytes::from(publisher.heartbeat())).await.unwrap();
    stage
        .until("the digests are compared", || {
            let sources = stage.server.index().sources(&OwnerFilter::default(), 0);
            sources.iter().any(|info| info.verified_age_ms.is_some())
        })
        .await;
}

#[tokio::test]
async fn a_report_is_compared_with_what_the_score_of_the_same_id_said() {
    let (stage, mut a) = stage().await;
    let client = client(&stage);
    assert_eq!(client.score(scored_as(7)).await.unwrap().instances[0].engine_cached_tokens, 64);
    // What happens afterwards makes no difference.
    stage.publish(&mut a, &[Op::Cleared(0), Op::Cleared(1)]).await;
    for (reported, error) in [(64, 0), (48, 16), (80, -16), (0, 64)] {
        let answered = client.report_outcome(report(7, "a:1", reported)).await.unwrap();
        assert_eq!(answered, answer(error, 64, Remembered));
    }
    let text = metrics(&stage).await;
    for line in [
        "kvatlas_index_outcomes_total{kind=\"remembered\"} 4\n",
        "kvatlas_index_outcome_error_tokens_count{direction=\"over\",tier=\"cpu\",age=\"never\"} 2\n",
        "kvatlas_index_outcome_error_tokens_sum{direction=\"over\",tier=\"cpu\",age=\"never\"} 80.0\n",
        "kvatlas_index_outcome_error_tokens_bucket{le=\"1.0\",direction=\"over\",tier=\"cpu\",age=\"never\"} 0\n",
        "kvatlas_index_outcome_error_tokens_bucket{le=\"16.0\",direction=\"over\",tier=\"cpu\",age=\"never\"} 1\n",
        "kvatlas_index_outcome_error_tokens_bucket{le=\"131072.0\",direction=\"over\",tier=\"cpu\",age=\"never\"} 2\n",
        "kvatlas_index_outcome_error_tokens_count{direction=\"under\",tier=\"cpu\",age=\"never\"} 1\n",
        "kvatlas_index_outcome_error_tokens_bucket{le=\"0.0\",direction=\"equal\",tier=\"cpu\",age=\"never\"} 1\n",
        "kvatlas_index_outcome_predicted_tokens_total 256\n",
        "kvatlas_index_outcome_reported_tokens_total 192\n",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[tokio::test]
async fn scores_in_a_stream_are_remembered_too() {
    let (stage, _) = stage().await;
    let requests = futures_util::stream::iter([scored_as(1), scored_as(2)]);
    let mut answers = stage.atlas.clone().score_stream(requests).await.unwrap().into_inner();
    while answers.message().await.unwrap().is_some() {}
    for id in [1, 2] {
        let answered = client(&stage).report_outcome(report(id, "a:1", 64)).await.unwrap();
        assert_eq!(answered, answer(0, 64, Remembered));
    }
}

#[tokio::test]
async fn ranks_are_compared_one_by_one() {
    let (stage, _) = stage().await;
    let client = client(&stage);
    stage.publish(&mut Publisher::new("m", "a:1").rank(1), &[Op::Stored(0, of_ids()[..1].to_vec())]).await;
    client.score(scored_as(7)).await.unwrap();
    let of_rank = pb::ReportOutcomeRequest { data_parallel_rank: 1, ..report(7, "a:1", 16) };
    assert_eq!(client.report_outcome(of_rank).await.unwrap(), answer(0, 16, Remembered));
    assert_eq!(client.report_outcome(report(7, "a:1", 64)).await.unwrap(), answer(0, 64, Remembered));
}

#[tokio::test]
async fn the_age_in_metrics_is_that_at_the_time_of_the_score() {
    let (stage, mut a) = stage().await;
    let client = client(&stage);
    verify(&stage, &mut a).await;
    client.score(scored_as(7)).await.unwrap();
    client.report_outcome(report(7, "a:1", 64)).await.unwrap();
    let text = metrics(&stage).await;
    // Which step it is depends on how busy the machine is; that there is one does not.
    let aged = "kvatlas_index_outcome_error_tokens_count{direction=\"equal\",tier=\"cpu\",age=\"le_";
    assert!(text.contains(aged), "{text}");
}

#[tokio::test]
async fn the_remembered_prediction_comes_before_the_given_one_and_that_before_a_look_up() {
    let (stage, _) = stage().await;
    let client = client(&stage);
    client.score(scored_as(7)).await.unwrap();
    let everything = pb::ReportOutcomeRequest {
        predicted_tokens: Some(10),
        prompt: Some(prompt("m", tokens(ids()))),
        ..report(7, "a:1", 60)
    };
    assert_eq!(client.report_outcome(everything.clone()).await.unwrap(), answer(4, 64, Remembered));
    for request_id in [0, 8] {
        let known_to_the_caller = pb::ReportOutcomeRequest { request_id, ..everything.clone() };
        assert_eq!(client.report_outcome(known_to_the_caller.clone()).await.unwrap(), answer(-50, 10, Given));
        let by_prompt = pb::ReportOutcomeRequest { predicted_tokens: None, ..known_to_the_caller };
        assert_eq!(client.report_outcome(by_prompt).await.unwrap(), answer(4, 64, LookedUp));
    }
}

#[tokio::test]
async fn a_given_prediction_counts_without_tier_and_age() {
    let (stage, _) = stage().await;
    let given = |predicted| pb::ReportOutcomeRequest {
        predicted_tokens: Some(predicted),
        ..report(0, "somewhere:1", 16)
    };
    let client = client(&stage);
    assert_eq!(client.report_outcome(given(48)).await.unwrap(), answer(32, 48, Given));
    assert_eq!(client.report_outcome(given(0)).await.unwrap(), answer(-16, 0, Given));
    let text = metrics(&stage).await;
    for line in [
        "outcome_error_tokens_sum{direction=\"over\",tier=\"unstated\",age=\"unstated\"} 32.0\n",
        "outcome_error_tokens_sum{direction=\"under\",tier=\"none\",age=\"unstated\"} 16.0\n",
        "outcomes_total{kind=\"given\"} 2\n",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[tokio::test]
async fn what_is_looked_up_after_the_fact_is_answered_but_is_no_error() {
    let (stage, mut a) = stage().await;
    verify(&stage, &mut a).await;
    let by_prompt =
        pb::ReportOutcomeRequest { prompt: Some(prompt("m", tokens(ids()))), ..report(0, "a:1", 0) };
    let client = client(&stage);
    assert_eq!(client.report_outcome(by_prompt.clone()).await.unwrap(), answer(64, 64, LookedUp));
    let other_rank = pb::ReportOutcomeRequest { data_parallel_rank: 9, ..by_prompt.clone() };
    assert_eq!(client.report_outcome(other_rank).await.unwrap(), answer(0, 0, LookedUp));
    let nobody = pb::ReportOutcomeRequest { instance: "nobody:1".into(), ..by_prompt };
    assert_eq!(client.report_outcome(nobody).await.unwrap(), answer(0, 0, LookedUp));
    let text = metrics(&stage).await;
    assert!(text.contains("kvatlas_index_outcomes_total{kind=\"looked_up\"} 3\n"), "{text}");
    assert!(text.contains("kvatlas_index_outcome_predicted_tokens_total 0\n"), "{text}");
    assert!(!text.contains("kvatlas_index_outcome_error_tokens_count"), "{text}");
}

#[tokio::test]
async fn without_anything_to_compare_with_a_report_says_what_to_give() {
    let (stage, _) = stage().await;
    let client = client(&stage);
    let by = |prompt| pb::ReportOutcomeRequest { prompt: Some(prompt), ..report(0, "a:1", 0) };
    let keys = ask_keys("m", of_ids()).prompt.unwrap();
    let requests = [
        (report(0, "a:1", 0), "request_id"),
        (pb::ReportOutcomeRequest { cached_tokens: None, ..report(1, "a:1", 0) }, "cached_tokens"),
        (report(1, "", 0), "10.0.0.7:8000"),
        (report(1, "a 1", 0), "without spaces"),
        (report(1, &"a".repeat(129), 0), "128"),
        (
            pb::ReportOutcomeRequest {
                request: "r".repeat(MAX_REQUEST_NAME_BYTES + 1),
                ..report(1, "a:1", 0)
            },
            "128",
        ),
        (by(pb::Prompt { input: None, ..prompt("m", tokens([])) }), "token_ids"),
        (by(prompt("", tokens([]))), "1 to 256"),
        (by(pb::Prompt { block_size: 0, ..keys.clone() }), "block_size"),
        (by(keys.clone()), "prompt_tokens"),
    ];
    for (request, what) in requests {
        let (code, message) = refused(&client, request).await;
        assert_eq!(code, Code::InvalidArgument, "{message}");
        assert!(message.contains(what), "{message}");
    }
    let with_length = by(pb::Prompt { prompt_tokens: 70, ..keys });
    assert_eq!(client.report_outcome(with_length).await.unwrap(), answer(64, 64, LookedUp));
    let other_size = by(pb::Prompt { block_size: 32, ..prompt("m", tokens(ids())) });
    let (code, message) = refused(&client, other_size).await;
    assert_eq!((code, message.contains("16")), (Code::FailedPrecondition, true), "{message}");
}

#[tokio::test]
async fn an_id_without_a_prediction_is_not_found() {
    let (stage, _) = stage().await;
    let client = client(&stage);
    // Never scored; scored without an id; scored by keys of an unknown length, which also ends what was said before.
    client.score(scored_as(0)).await.unwrap();
    client.score(scored_as(2)).await.unwrap();
    client.score(pb::ScoreRequest { request_id: 2, ..ask_keys("m", of_ids()) }).await.unwrap();
    for id in [1, 2] {
        let (code, message) = refused(&client, report(id, "a:1", 0)).await;
        assert_eq!(code, Code::NotFound, "{message}");
        for word in [&id.to_string(), "a:1", "predicted_tokens", "prompt"] {
            assert!(message.contains(word), "{message}");
        }
    }
    let text = metrics(&stage).await;
    for line in [
        "kvatlas_index_calls_total{call=\"ReportOutcome\",result=\"not_found\"} 2\n",
        "kvatlas_index_outcome_unreported_total{reason=\"replaced\"} 1\n",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[tokio::test]
async fn who_was_not_among_the_rows_was_promised_nothing_if_all_were_asked() {
    let (stage, _) = stage().await;
    let client = client(&stage);
    client.score(scored_as(1)).await.unwrap();
    client.score(pb::ScoreRequest { limit: 1, ..scored_as(2) }).await.unwrap();
    client.score(pb::ScoreRequest { limit: 2, ..scored_as(3) }).await.unwrap();
    let candidates = vec!["a:1".to_owned(), "unknown:1".to_owned()];
    client.score(pb::ScoreRequest { candidates, ..scored_as(4) }).await.unwrap();
    for id in [1, 3] {
        let answered = client.report_outcome(report(id, "b:1", 16)).await.unwrap();
        assert_eq!(answered, answer(-16, 0, Remembered));
    }
    for id in [2, 4] {
        assert_eq!(refused(&client, report(id, "b:1", 16)).await.0, Code::NotFound);
    }
    // An instance that no event ever named is a row like any other.
    let answered = client.report_outcome(report(4, "unknown:1", 16)).await.unwrap();
    assert_eq!(answered, answer(-16, 0, Remembered));
    let text = metrics(&stage).await;
    let line = "outcome_error_tokens_count{direction=\"under\",tier=\"none\",age=\"never\"} 1\n";
    assert!(text.contains(line), "{line} in {text}");
}

#[tokio::test]
async fn what_is_forgotten_before_it_was_reported_is_counted() {
    let (stage, _) = stage().await;
    let client = client(&stage);
    let short = |request_id| pb::ScoreRequest { request_id, ..ask(prompt("m", tokens([1; 15]))) };
    client.score(short(1)).await.unwrap();
    client.report_outcome(report(1, "a:1", 0)).await.unwrap();
    let others: Vec<_> = (2..=REMEMBERED_REQUESTS as u64 + 3).map(short).collect();
    let others = futures_util::stream::iter(others);
    let mut answers = stage.atlas.clone().score_stream(others).await.unwrap().into_inner();
    while answers.message().await.unwrap().is_some() {}
    for id in 1..=3 {
        assert_eq!(refused(&client, report(id, "a:1", 0)).await.0, Code::NotFound);
    }
    assert_eq!(client.report_outcome(report(4, "a:1", 0)).await.unwrap(), answer(0, 0, Remembered));
    // The first one was reported.
    let text = metrics(&stage).await;
    let line = "kvatlas_index_outcome_unreported_total{reason=\"evicted\"} 2\n";
    assert!(text.contains(line), "{line} in {text}");
}

/// What is logged on this thread, on which the test's runtime runs everything.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Lines about promises that were not kept.
    fn promises(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().clone()).unwrap();
        text.lines().filter(|line| line.contains("promised")).map(str::to_owned).collect()
    }
}

#[tokio::test]
async fn a_verified_source_that_promised_too_much_is_logged_once_in_a_burst() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let _logging = tracing::subscriber::set_default(subscriber);
    let (stage, mut a) = stage().await;
    let client = client(&stage);
    client.score(scored_as(1)).await.unwrap();
    verify(&stage, &mut a).await;
    client.score(scored_as(2)).await.unwrap();
    // Not verified when it was predicted; one block; too little; not what was said then.
    client.report_outcome(report(1, "a:1", 0)).await.unwrap();
    client.report_outcome(report(2, "a:1", 48)).await.unwrap();
    client.report_outcome(report(2, "a:1", 70)).await.unwrap();
    let looked_up =
        pb::ReportOutcomeRequest { prompt: Some(prompt("m", tokens(ids()))), ..report(0, "a:1", 0) };
    client.report_outcome(looked_up).await.unwrap();
    assert_eq!(log.promises(), Vec::<String>::new());
    for _ in 0..3 {
        let named = pb::ReportOutcomeRequest { request: "chat-17\n".into(), ..report(2, "a:1", 47) };
        client.report_outcome(named).await.unwrap();
    }
    let lines = log.promises();
    assert_eq!(lines.len(), 1, "{lines:?}");
    for word in ["a:1", "predicted=64", "reported=47", "chat-17\\n", "WARN"] {
        assert!(lines[0].contains(word), "{word} in {lines:?}");
    }
}
