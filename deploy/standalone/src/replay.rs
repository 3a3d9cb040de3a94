//! `kvatlas replay`: recorded engine streams through the real path.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use kvatlas_loadtest::check::{self, CheckConfig, CheckError, FileReport};
use serde_json::json;

use crate::failure::Failure;
use crate::output::{self, note};

/// Arguments of `replay`.
#[derive(Args)]
pub struct ReplayArgs {
    /// Recordings (.kvrec, .kvrec.gz, .kvrec.zst) or folders of them.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Compare with the .truth.json beside each file at every checkpoint; exit code 1 if something differs that is
    /// not listed as unavoidable.
    #[arg(long)]
    check: bool,
    /// Broker to use, for example nats://127.0.0.1:4222. Default: the in-process bus.
    #[arg(long, value_name = "URL")]
    nats: Option<String>,
    /// Print one JSON object a file instead of a line for people.
    #[arg(long)]
    json: bool,
}

/// Runs `replay`.
pub async fn run(args: ReplayArgs) -> Result<ExitCode, Failure> {
    let mut files = Vec::new();
    for path in &args.files {
        let found = check::recordings(path).map_err(|error| Failure::unreadable(path, &error))?;
        if found.is_empty() {
            return Err(Failure::usage(format!("no recordings (.kvrec) in {}", path.display())));
        }
        files.extend(found);
    }
    let config = CheckConfig { nats: args.nats.clone() };
    let mut all_ok = true;
    for file in files {
        // A file that cannot be played costs itself, and the exit code.
        match replay(&file, &args, &config).await {
            Ok(ok) => all_ok &= ok,
            Err(error) => {
                all_ok = false;
                note(&format!("kvatlas: {error}"));
            }
        }
    }
    Ok(if all_ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn replay(file: &Path, args: &ReplayArgs, config: &CheckConfig) -> Result<bool, CheckError> {
    if args.check {
        let report = check::check(file, config).await?;
        if args.json {
            output::json(&report);
        } else {
            print(&report);
        }
        return Ok(report.ok);
    }
    let messages = check::play(file, config).await?;
    if args.json {
        output::json(&json!({ "file": file.display().to_string(), "messages": messages }));
    } else {
        output::line(&format!("{}: {messages} messages", file.display()));
    }
    Ok(true)
}

fn print(report: &FileReport) {
    let verdict = match (report.ok, report.unavoidable) {
        (true, None) => "exact".to_owned(),
        (true, Some(reason)) => format!("as expected: {reason}"),
        (false, _) => "DIFFERS".to_owned(),
    };
    output::line(&format!(
        "{}: {}/{} checkpoints exact, {}/{} probes equal, {} over, {} under: {verdict}",
        report.file,
        report.checkpoints_exact,
        report.checkpoints,
        report.equal,
        report.probes,
        report.over,
        report.under,
    ));
    if !report.ok {
        report.notes.iter().for_each(|note| output::line(&format!("    {note}")));
    }
}
