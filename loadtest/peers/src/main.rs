//! `kvatlas-peers`: the index engine beside the strongest public prefix indexes. See README.md.

#[allow(dead_code, unused_imports)]
#[path = "../../../indexer/src/engine/mod.rs"]
mod engine;
mod measure;
mod ours;
mod structures;
mod system;
mod workload;

use measure::Figure;
use structures::{Crtc, Ours, SmgChain, SmgRadix, Structure};

#[global_allocator]
static ALLOCATOR: system::Counting = system::Counting;

const STRUCTURES: [&str; 4] = [Ours::NAME, SmgChain::NAME, SmgRadix::NAME, Crtc::NAME];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["one", structure, scenario, workers, resident] => {
            let number = |text: &str| text.replace('_', "").parse().expect("a number");
            let shape = workload::Shape {
                workers: number(workers),
                resident: number(resident),
                ..Default::default()
            };
            let figures = match *structure {
                Ours::NAME => measure::run::<Ours>(scenario, shape),
                SmgChain::NAME => measure::run::<SmgChain>(scenario, shape),
                SmgRadix::NAME => measure::run::<SmgRadix>(scenario, shape),
                Crtc::NAME => measure::run::<Crtc>(scenario, shape),
                other => panic!("unknown structure {other:?}: {STRUCTURES:?}"),
            };
            for Figure { line, value, unit } in figures {
                println!("{line}\t{value:.3}\t{unit}");
            }
        }
        ["compare", rest @ ..] => compare(rest.contains(&"--json"), rest.contains(&"--quick")),
        _ => panic!(
            "usage: kvatlas-peers compare [--json] [--quick] | one STRUCTURE SCENARIO WORKERS ENTRIES; scenarios: {:?}",
            measure::SCENARIOS
        ),
    }
}

/// One process per structure and scenario, in turn and several times; medians.
fn compare(json: bool, quick: bool) {
    let (runs, entries) = if quick { (1, "1_000_000") } else { (3, "4_000_000") };
    let program = std::env::current_exe().expect("the program knows where it is");
    for scenario in measure::SCENARIOS {
        let alone = matches!(scenario, "hashing" | "tiers" | "removal" | "agentic");
        let structures = if alone { &STRUCTURES[..1] } else { &STRUCTURES[..] };
        // By line, then by structure: all runs.
        let mut lines: Vec<(String, String, Vec<Vec<f64>>)> = Vec::new();
        for _ in 0..runs {
            for (which, structure) in structures.iter().enumerate() {
                let run = std::process::Command::new(&program)
                    .args(["one", structure, scenario, "64", entries])
                    .stderr(std::process::Stdio::null())
                    .output()
                    .expect("the program starts");
                assert!(run.status.success(), "{structure} {scenario} failed: run it alone to see why");
                for figure in String::from_utf8_lossy(&run.stdout).lines() {
                    let mut parts = figure.split('\t');
                    let (Some(line), Some(Ok(value)), Some(unit)) =
                        (parts.next(), parts.next().map(str::parse::<f64>), parts.next())
                    else {
                        continue;
                    };
                    let at = lines.iter().position(|(known, ..)| known == line).unwrap_or_else(|| {
                        lines.push((line.into(), unit.into(), vec![Vec::new(); structures.len()]));
                        lines.len() - 1
                    });
                    lines[at].2[which].push(value);
                }
            }
        }
        for (line, unit, mut values) in lines {
            let medians: Vec<Option<f64>> = values
                .iter_mut()
                .map(|values| {
                    values.sort_unstable_by(f64::total_cmp);
                    values.get(values.len() / 2).copied()
                })
                .collect();
            let best = medians[1..].iter().flatten().copied().reduce(f64::min);
            for (structure, value) in structures.iter().zip(medians) {
                let Some(value) = value else { continue };
                let ratio = best.filter(|best| *best > 0.0).map(|best| value / best);
                if json {
                    let figure = serde_json::json!({
                        "line": format!("{scenario}: {line}"), "structure": structure, "value": value, "unit": unit,
                        "ratio_to_best_peer": ratio,
                    });
                    println!("{figure}");
                } else {
                    let ratio = ratio.map_or(String::new(), |ratio| format!("{ratio:.2} of the best peer"));
                    println!("{scenario:<9} {line:<48} {structure:<15} {value:>12.1} {unit:<9} {ratio}");
                }
            }
        }
    }
}
