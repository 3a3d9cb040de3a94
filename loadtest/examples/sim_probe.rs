#![allow(missing_docs, clippy::print_stdout)]
use kvatlas_loadtest::sim::*;
fn main() {
    let args: Vec<u64> = std::env::args().skip(1).map(|a| a.parse().unwrap()).collect();
    let t = std::time::Instant::now();
    let totals = run_seeds(args[0], 2, Sabotage::None, |n| n < args[1], || t.elapsed().as_secs() < 120);
    println!("{:?} {:?}", totals.counts, t.elapsed());
    println!(
        "seeds {} max {} at {} hash {:x}",
        totals.seeds, totals.slowest.exact_ms, totals.slowest.seed, totals.log_hash
    );
    if let Some(r) = totals.failed {
        println!("{r}");
    }
}
