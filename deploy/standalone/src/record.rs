//! `kvatlas record`: what live engines publish, into a file that `kvatlas replay` plays.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use clap::builder::RangedU64ValueParser;
use kvatlas_loadtest::record::{
    DEFAULT_MAX_BYTES, DEFAULT_MAX_MESSAGES, Ended, RecordConfig, RecordLimits, RecordSummary, Recorder,
    StreamConfig,
};

use crate::failure::Failure;
use crate::output;
use crate::serve::stop_signal;

/// Arguments of `record`.
#[derive(Args)]
pub struct RecordArgs {
    /// Event socket of an engine, for example tcp://127.0.0.1:5557; tcp://*:5557 if the engine is the one that connects.
    /// Give it once per data-parallel rank, in order.
    #[arg(long, required = true, value_name = "ENDPOINT")]
    zmq: Vec<String>,
    /// Replay socket of the engine, for example tcp://127.0.0.1:5558: also records what was published before. Give it
    /// once per --zmq, in the same order.
    #[arg(long, value_name = "ENDPOINT")]
    replay: Vec<String>,
    /// File to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Overwrite the file if it exists.
    #[arg(long)]
    force: bool,
    /// Record only messages whose topic starts with this. Default: all.
    #[arg(long, default_value = "", value_name = "TOPIC")]
    topic: String,
    /// Replace token ids, block hashes and names by stand-ins that keep prefixes comparable. The key is random and
    /// forgotten. Lengths, times and frequencies stay: this hides what was said, not how often.
    #[arg(long)]
    redact: bool,
    /// Stop after this many seconds. Default: at Ctrl-C, SIGTERM or a limit.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    seconds: Option<u64>,
    /// Stop after this many messages, replayed ones included.
    #[arg(long, default_value_t = DEFAULT_MAX_MESSAGES, value_name = "N",
        value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    max_messages: u64,
    /// Stop before the file exceeds this many bytes.
    #[arg(long, default_value_t = DEFAULT_MAX_BYTES, value_name = "N",
        value_parser = RangedU64ValueParser::<u64>::new().range(1..=DEFAULT_MAX_BYTES))]
    max_bytes: u64,
    /// Name of the engine, for the file's header.
    #[arg(long, default_value = "vllm", value_name = "NAME")]
    engine_name: String,
    /// Version of the engine, for the file's header.
    #[arg(long, default_value = "unknown", value_name = "VERSION")]
    engine_version: String,
}

/// Runs `record`.
pub async fn run(args: RecordArgs) -> Result<ExitCode, Failure> {
    let stop = stop_signal()?;
    let recorder = Recorder::new(args.config()?).map_err(|error| Failure::usage(error.to_string()))?;
    let file = create(&args.out, args.force)?;
    tracing::info!(engines = ?args.zmq, out = %args.out.display(), "recording");
    let summary = recorder.run(file, stop).await.map_err(Failure::run)?;
    output::line(&describe(&summary, &args));
    Ok(ExitCode::SUCCESS)
}

/// A recording may be the only one of a rare event: nothing is overwritten by accident.
fn create(path: &Path, force: bool) -> Result<File, Failure> {
    let mut options = OpenOptions::new();
    options.write(true);
    if force {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    options.open(path).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => Failure::usage(format!(
            "{} exists: choose another name, or overwrite it with --force",
            path.display()
        )),
        _ => Failure::usage(format!("cannot create {}: {error}", path.display())),
    })
}

fn describe(summary: &RecordSummary, args: &RecordArgs) -> String {
    let rare = [
        (summary.refused, "too large for the format"),
        (summary.blanked, "blanked because they could not be read"),
        ((summary.streams - summary.connected) as u64, "streams never connected"),
    ];
    let rare = rare.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!(", {count} {what}"));
    format!(
        "{}: {} live and {} replayed messages, {} bytes, {} streams, {} dropped{}; {}",
        args.out.display(),
        summary.messages,
        summary.replayed,
        summary.bytes,
        summary.streams,
        summary.dropped,
        rare.collect::<String>(),
        match summary.ended {
            Ended::Stopped => "stopped by a signal",
            Ended::Duration => "--seconds passed",
            Ended::Messages => "--max-messages reached",
            Ended::Bytes => "--max-bytes reached",
        },
    )
}

// === impl RecordArgs ===

impl RecordArgs {
    fn config(&self) -> Result<RecordConfig, Failure> {
        if !self.replay.is_empty() && self.replay.len() != self.zmq.len() {
            return Err(Failure::usage(format!(
                "{} --replay for {} --zmq: give one for each, in the same order, or none",
                self.replay.len(),
                self.zmq.len()
            )));
        }
        let replays = self.replay.iter().cloned().map(Some).chain(std::iter::repeat(None));
        let streams = self.zmq.iter().cloned().zip(replays);
        Ok(RecordConfig {
            streams: streams.map(|(events, replay)| StreamConfig { events, replay }).collect(),
            topic: self.topic.clone(),
            engine: self.engine_name.clone(),
            engine_version: self.engine_version.clone(),
            redact: self.redact,
            limits: RecordLimits { messages: self.max_messages, bytes: self.max_bytes },
            duration: self.seconds.map(Duration::from_secs),
        })
    }
}
