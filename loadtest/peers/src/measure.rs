//! What is measured, the same for every structure.

use std::hint::black_box;
use std::time::Instant;

use crate::ours;
use crate::structures::{REFUSED, Reader, Structure};
use crate::system;
use crate::workload::{Log, Shape, Tree, Workload};

/// One number.
pub struct Figure {
    pub line: String,
    pub value: f64,
    pub unit: &'static str,
}

/// The figures of one run.
#[derive(Default)]
pub struct Report(Vec<Figure>);

impl Report {
    pub fn add(&mut self, line: impl Into<String>, value: f64, unit: &'static str) {
        self.0.push(Figure { line: line.into(), value, unit });
    }
}

/// What can be measured. The last four are of one process for all structures, or of ours alone.
pub const SCENARIOS: [&str; 8] =
    ["speed", "memory", "holes", "mixed", "hashing", "tiers", "removal", "agentic"];
/// Blocks a second that the writer of "mixed" is offered.
const OFFERED: f64 = 1e6;

/// Events converted and applied at a time; only the applying is measured.
const CHUNK: usize = 2_048;
pub const LENGTHS: [usize; 3] = [128, 512, 2_048];
/// Look-ups per measured group. A group in which the thread was scheduled out is dropped.
const GROUP: usize = 16;
const SCHEDULED_OUT_NS: u64 = 20_000;

#[derive(Default)]
struct Spent {
    cpu: u64,
    single: (u64, usize),
    longest_ns: u64,
}

pub fn run<S: Structure>(scenario: &str, shape: Shape) -> Vec<Figure> {
    let mut report = Report::default();
    match scenario {
        "speed" => speed::<S>(shape, &mut report),
        "memory" => memory::<S>(shape, &mut report),
        "holes" => holes::<S>(shape, &mut report),
        "hashing" => hashing(&mut report),
        "mixed" => mixed::<S>(shape, &mut report),
        "tiers" => ours::tiers(shape, &mut report),
        "removal" => ours::removal(&mut report),
        "agentic" => ours::agentic(&mut report),
        other => panic!("unknown scenario {other:?}: {SCENARIOS:?}"),
    }
    let refused = REFUSED.load(std::sync::atomic::Ordering::Relaxed);
    report.add("refused", refused as f64, "events");
    report.0
}

fn apply<S: Structure>(structure: &mut S, tree: &Tree, log: &Log) -> Spent {
    let mut spent = Spent::default();
    for chunk in log.events.chunks(CHUNK) {
        let mut events: Vec<_> = chunk.iter().map(|event| S::event(tree, log, event)).collect();
        let (cpu, begun) = (structure.cpu(), Instant::now());
        structure.apply(&mut events);
        let (cpu, wall) = (structure.cpu() - cpu, begun.elapsed().as_nanos() as u64);
        spent.cpu += cpu;
        spent.longest_ns = spent.longest_ns.max(wall.min(cpu));
        if chunk.iter().all(|event| log.nodes(event).len() == 1) {
            spent.single.0 += cpu;
            spent.single.1 += chunk.len();
        }
    }
    spent
}

pub fn percentile(sorted: &[u64], part: f64) -> f64 {
    sorted[((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len()) - 1] as f64
}

fn lookups<S: Structure>(phase: &str, structure: &S, workload: &Workload, report: &mut Report) {
    lookups_of::<S>(phase, false, structure, workload, report);
    lookups_of::<S>(&format!("{phase} keys in cache"), true, structure, workload, report);
}

fn lookups_of<S: Structure>(
    phase: &str,
    warm: bool,
    structure: &S,
    workload: &Workload,
    report: &mut Report,
) {
    let mut reader = structure.reader();
    let mut out = vec![0; workload.shape.workers];
    for blocks in LENGTHS {
        let queries = workload.queries(blocks, 20_000, 11 + blocks as u64);
        let prepared: Vec<_> = queries.iter().map(S::query).collect();
        drop(queries);
        let mut times = Vec::with_capacity(prepared.len());
        for group in prepared.chunks(GROUP) {
            let mut spent = [0; GROUP];
            let (cpu, begun) = (system::cpu(), Instant::now());
            for (query, spent) in group.iter().zip(&mut spent) {
                if warm {
                    S::warm(query);
                }
                let start = Instant::now();
                reader.depths(black_box(query), &mut out);
                black_box(&out);
                *spent = start.elapsed().as_nanos() as u64;
            }
            if (begun.elapsed().as_nanos() as u64) < system::cpu() - cpu + SCHEDULED_OUT_NS {
                times.extend_from_slice(&spent[..group.len()]);
            }
        }
        times.sort_unstable();
        report.add(format!("match {blocks} p50 {phase}"), percentile(&times, 0.5), "ns");
        report.add(format!("match {blocks} p99 {phase}"), percentile(&times, 0.99), "ns");
    }
}

fn exactness<S: Structure>(phase: &str, structure: &S, workload: &Workload, report: &mut Report) {
    let mut reader = structure.reader();
    let (mut truth, mut out) = (Vec::new(), vec![0; workload.shape.workers]);
    let (mut wrong, mut holders, mut asked) = (0, 0, 0);
    for blocks in LENGTHS {
        for query in workload.queries(blocks, 2_000, 99 + blocks as u64) {
            workload.truth(&query, &mut truth);
            reader.depths(&S::query(&query), &mut out);
            wrong += usize::from(truth != out);
            holders += truth.iter().filter(|depth| **depth > 0).count();
            asked += 1;
        }
    }
    report.add(format!("wrong answers {phase}"), wrong as f64, "of 6000");
    report.add(format!("mean holders {phase}"), holders as f64 / asked as f64, "holders");
}

fn rate(phase: &str, log: &Log, spent: &Spent, report: &mut Report) {
    report.add(format!("{phase} per block"), spent.cpu as f64 / log.blocks() as f64, "ns");
    report.add(format!("{phase} per event"), spent.cpu as f64 / log.events.len() as f64, "ns");
    if spent.single.1 > 0 {
        let each = spent.single.0 as f64 / spent.single.1 as f64;
        report.add(format!("{phase} per single-block event"), each, "ns");
    }
    report.add(format!("{phase} longest of {CHUNK} events"), spent.longest_ns as f64 / 1e3, "us");
}

fn speed<S: Structure>(shape: Shape, report: &mut Report) {
    let mut workload = Workload::new(shape);
    let fill = workload.fill();
    let mut structure = S::new(shape.workers);
    let spent = apply(&mut structure, &workload.tree, &fill);
    rate("fill", &fill, &spent, report);
    drop(fill);
    lookups("", &structure, &workload, report);
    exactness("filled", &structure, &workload, report);
    let churn = workload.churn(shape.resident / 4);
    let spent = apply(&mut structure, &workload.tree, &churn);
    rate("churn", &churn, &spent, report);
    lookups("churned", &structure, &workload, report);
    exactness("churned", &structure, &workload, report);
    // Decode only: one block per event, many conversations in turn.
    let (log, spent) = decode(&mut structure, &mut workload);
    report.add("single-block event", spent.cpu as f64 / log.events.len() as f64, "ns");
    eprintln!("{}", structure.shape());
}

/// 300,000 single-block stores: new blocks at the ends of conversations, in turn.
fn decode<S: Structure>(structure: &mut S, workload: &mut Workload) -> (Log, Spent) {
    let log = workload.decode(300_000);
    let spent = apply(structure, &workload.tree, &log);
    (log, spent)
}

fn memory<S: Structure>(shape: Shape, report: &mut Report) {
    let mut workload = Workload::new(shape);
    let fill = workload.fill();
    let mut structure = S::new(shape.workers);
    let mut base = (system::live(), system::resident());
    // The converted events of one chunk are freed before memory is read.
    count(true);
    apply(&mut structure, &workload.tree, &fill);
    let line = |phase: &str, workload: &Workload, base: (isize, usize), report: &mut Report| {
        let entries = workload.resident as f64;
        let live = (system::live() - base.0) as f64;
        report.add(format!("live bytes per entry {phase}"), live / entries, "B");
        let grown = system::resident().saturating_sub(base.1) as f64;
        report.add(format!("resident bytes per entry {phase}"), grown / entries, "B");
        report.add(format!("distinct {phase}"), workload.distinct() as f64, "blocks");
    };
    count(false);
    drop(fill);
    base.1 = base.1.min(system::resident());
    line("filled", &workload, base, report);
    eprintln!("{}", structure.shape());
    for quarter in 1..=16 {
        let churn = workload.churn(shape.resident / 4);
        count(true);
        apply(&mut structure, &workload.tree, &churn);
        structure.settle();
        count(false);
        drop(churn);
        if [1, 4, 16].contains(&quarter) {
            line(&format!("after {quarter} quarters churned"), &workload, base, report);
            eprintln!("{}", structure.shape());
        }
    }
}

fn count(on: bool) {
    system::COUNTING.store(on, std::sync::atomic::Ordering::Relaxed);
}

fn holes<S: Structure>(shape: Shape, report: &mut Report) {
    let mut workload = Workload::new(shape);
    let fill = workload.fill();
    let mut structure = S::new(shape.workers);
    apply(&mut structure, &workload.tree, &fill);
    drop(fill);
    lookups("before holes", &structure, &workload, report);
    let (punched, holes) = workload.punch(0.02);
    let spent = apply(&mut structure, &workload.tree, &punched);
    rate("punch", &punched, &spent, report);
    exactness("with holes", &structure, &workload, report);
    lookups("with holes", &structure, &workload, report);
    let healed = workload.heal(&holes);
    let spent = apply(&mut structure, &workload.tree, &healed);
    rate("heal", &healed, &spent, report);
    exactness("healed", &structure, &workload, report);
    lookups("healed", &structure, &workload, report);
}

/// What a caller pays before any look-up: from token ids to what the structure is asked with. Mean of many runs.
fn hashing(report: &mut Report) {
    use dynamo_kv_router::protocols::{
        BlockHashOptions, compute_block_hash_for_seq, compute_seq_hash_for_block,
    };
    let hasher = kvatlas_proto::KeyHasher::default();
    for blocks in LENGTHS {
        let mut rng = crate::workload::Rng::new(9);
        let tokens: Vec<u32> = (0..blocks * 16).map(|_| rng.below(150_000) as u32).collect();
        let time = |work: &mut dyn FnMut()| {
            (0..10)
                .map(|_| {
                    let cpu = system::cpu();
                    (0..100).for_each(|_| work());
                    (system::cpu() - cpu) as f64 / 100.0
                })
                .fold(f64::INFINITY, f64::min)
        };
        let mut keys = Vec::new();
        let ours = time(&mut || {
            keys.clear();
            hasher.chain_into(black_box(&tokens), 16, &Default::default(), Default::default(), &mut keys);
            black_box(&keys);
        });
        report.add(format!("hash {blocks} kvatlas, chained keys"), ours, "ns");
        let smg =
            time(&mut || drop(black_box(kv_index::compute_request_content_hashes(black_box(&tokens), 16))));
        report.add(format!("hash {blocks} smg, contents only"), smg, "ns");
        let dynamo = || compute_block_hash_for_seq(black_box(&tokens), 16, BlockHashOptions::default());
        report.add(
            format!("hash {blocks} dynamo, contents only"),
            time(&mut || drop(black_box(dynamo()))),
            "ns",
        );
        let chain = time(&mut || drop(black_box(compute_seq_hash_for_block(&dynamo()))));
        report.add(format!("hash {blocks} dynamo, chained"), chain, "ns");
    }
}

/// Look-ups of 512 blocks: alone, alone again (what differs between these two is noise), and beside a writer that is
/// offered a fixed number of blocks a second and, if it falls behind, catches up.
fn mixed<S: Structure>(shape: Shape, report: &mut Report) {
    let mut workload = Workload::new(shape);
    let fill = workload.fill();
    let mut structure = S::new(shape.workers);
    apply(&mut structure, &workload.tree, &fill);
    drop(fill);
    let queries: Vec<_> = workload.queries(512, 20_000, 5).iter().map(S::query).collect();
    let look = |reader: &mut S::Reader, stop: &dyn Fn(usize) -> bool| {
        let (mut times, mut out, mut asked) = (Vec::new(), vec![0; shape.workers], 0);
        while !stop(asked) {
            let query = &queries[asked % queries.len()];
            let start = Instant::now();
            reader.depths(query, &mut out);
            times.push(start.elapsed().as_nanos() as u64);
            asked += 1;
        }
        times.sort_unstable();
        times
    };
    let note = |phase: &str, times: &[u64], report: &mut Report| {
        for (name, part) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
            report.add(format!("reader {name} {phase}"), percentile(times, part), "ns");
        }
    };
    for phase in ["alone", "alone again"] {
        let times = look(&mut structure.reader(), &|asked| asked == 300_000);
        note(phase, &times, report);
    }
    let churn = workload.churn(shape.resident / 2);
    let mut events: Vec<_> =
        churn.events.iter().map(|event| S::event(&workload.tree, &churn, event)).collect();
    let mut reader = structure.reader();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let per_event = churn.blocks() as f64 / churn.events.len() as f64;
    let times = std::thread::scope(|scope| {
        let reading = scope.spawn(|| look(&mut reader, &|_| stop.load(std::sync::atomic::Ordering::Relaxed)));
        let begun = Instant::now();
        let mut done = 0.0;
        while !events.is_empty() {
            let rest = events.split_off(events.len().min(64));
            let mut batch = std::mem::replace(&mut events, rest);
            done += batch.len() as f64 * per_event;
            structure.apply(&mut batch);
            let due = done / OFFERED - begun.elapsed().as_secs_f64();
            if due > 0.0 {
                std::thread::sleep(std::time::Duration::from_secs_f64(due));
            }
        }
        report.add("writer blocks per second", done / begun.elapsed().as_secs_f64(), "blocks/s");
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        reading.join().expect("the reader ended")
    });
    note("beside the writer", &times, report);
}
