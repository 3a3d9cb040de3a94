//! Traces of a few lines, one per form.

use std::io::Write as _;

use super::*;

fn read(lines: &str, options: TraceOptions) -> Result<Trace, ReadTraceError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(lines.as_bytes()).unwrap();
    read_trace(file.path(), options)
}

const MOONCAKE: &str = "{\"timestamp\":0,\"input_length\":1060,\"output_length\":40,\"hash_ids\":[0,7,9]}\n\
                        {\"timestamp\":1500,\"input_length\":1024,\"output_length\":0,\"hash_ids\":[0,7]}\n";

#[test]
fn only_full_blocks_of_a_mooncake_prompt_can_be_found_again() {
    let trace = read(MOONCAKE, TraceOptions::default()).unwrap();
    assert_eq!((trace.block_tokens, trace.tree.len()), (512, 3));
    let blocks: Vec<_> = trace.requests.iter().map(|r| (trace.full_path(r), r.offset_us)).collect();
    assert_eq!(blocks, [(vec![0, 1], 0), (vec![0, 1], 1_500_000)]);
    assert_eq!(trace.requests[1].output_tokens, 1, "something is always generated");
    // At least one token is computed, so the second block of the second prompt is not taken.
    assert_eq!(trace.ideal_hit_tokens(), 512);
}

#[test]
fn ids_are_cut_into_smaller_blocks_if_they_can_be() {
    let cut = |block_tokens| read(MOONCAKE, TraceOptions { limit: None, block_tokens: Some(block_tokens) });
    assert_eq!(cut(16).unwrap().requests[0].full_blocks, 66);
    assert!(matches!(cut(100), Err(ReadTraceError::BlockTokens { asked: 100, id_tokens: 512 })));
}

#[test]
fn whoever_goes_on_from_a_prompts_end_is_of_its_session() {
    let line = |t: u32, ids: &str, blocks: u32| {
        let tokens = blocks * 512;
        format!("{{\"timestamp\":{t},\"input_length\":{tokens},\"output_length\":1,\"hash_ids\":[{ids}]}}\n")
    };
    let lines = line(0, "0,1", 2)
        + &line(1, "0,2,3", 3)
        + &line(2, "0,1,4,5", 4)
        + &line(3, "0,6", 2)
        + &line(4, "0,1,4,5,7", 5);
    let trace = read(&lines, TraceOptions::default()).unwrap();
    assert_eq!(trace.requests.iter().map(|r| r.session).collect::<Vec<_>>(), [0, 1, 0, 2, 0]);
}

#[test]
fn requests_of_a_conversation_follow_each_other_and_sub_agents_run_beside() {
    let lines = "{\"block_size\":64,\"hash_id_scope\":\"local\",\"requests\":[\
                 {\"t\":0,\"in\":200,\"out\":5,\"hash_ids\":[1,2,3]},\
                 {\"t\":9.5,\"requests\":[{\"t\":0,\"in\":64,\"out\":1,\"hash_ids\":[1]},{\"t\":2,\"in\":64,\"out\":1,\"hash_ids\":[1]}]},\
                 {\"t\":20,\"in\":256,\"out\":5,\"think_time\":3,\"hash_ids\":[1,2,3,4]}]}\n\
                 {\"block_size\":64,\"hash_id_scope\":\"local\",\"requests\":[{\"t\":0,\"in\":64,\"out\":5,\"hash_ids\":[1]}]}\n";
    let trace = read(lines, TraceOptions::default()).unwrap();
    let shape: Vec<_> = (trace.requests.iter())
        .map(|r| (r.conversation, r.session, r.offset_us / 500_000, r.after))
        .collect();
    assert_eq!(
        shape,
        [(0, 0, 0, None), (0, 1, 19, Some(0)), (0, 1, 23, Some(1)), (0, 0, 40, Some(0)), (1, 2, 0, None)]
    );
    assert_eq!(trace.requests[3].think_us, 3_000_000);
    // Ids of another conversation are other blocks.
    assert_eq!(trace.requests[4].last, 4);
    assert_eq!(read(lines, TraceOptions { limit: Some(2), block_tokens: None }).unwrap().requests.len(), 4);
}

#[test]
fn content_ids_are_chained_over_conversations() {
    let line = |ids: &str| {
        format!(
            "{{\"block_size\":64,\"hash_id_scope\":\"global\",\"requests\":[{{\"in\":128,\"out\":5,\"hash_ids\":[{ids}]}}]}}\n"
        )
    };
    let trace = read(&(line("1,2") + &line("2,2") + &line("1,2")), TraceOptions::default()).unwrap();
    assert_eq!(trace.requests.iter().map(|r| r.last).collect::<Vec<_>>(), [1, 3, 1]);
}

#[test]
fn a_trace_of_lengths_has_only_new_blocks() {
    let lines = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 23:59:59.5000000,130,10\r\n\
                 2023-11-17 00:00:00.2500000,64,8\r\n";
    let trace = read(lines, TraceOptions::default()).unwrap();
    assert_eq!(
        trace.requests.iter().map(|r| (r.offset_us, r.full_blocks)).collect::<Vec<_>>(),
        [(0, 2), (750_000, 1)]
    );
    assert_eq!((trace.tree.len(), trace.ideal_hit_tokens()), (3, 0));
}

#[test]
fn what_is_no_trace_is_named_with_its_line() {
    let error = read("{\"timestamp\":0}\n", TraceOptions::default()).unwrap_err().to_string();
    assert!(error.contains("line 1"), "{error}");
    assert!(matches!(read("", TraceOptions::default()), Err(ReadTraceError::Empty { .. })));
}
