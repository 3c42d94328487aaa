//! Fault injection: a cluster of real processes under load, one thing that goes wrong, and a judgement of what clients
//! saw. No request may be lost, no token changed, and nobody may wait longer than the fault's bar.
//!
//! ```text
//! list        the faults, one line each; what they do is in deaths, slowness, network, operations, pressure
//! bench       a whole cluster, the undisturbed runs, the load, one fault after the other
//! cluster     processes by name (process), what they say of themselves (view), their network (net) and memory (cgroup)
//! load        clients (client, sse) that ask (requests) again and again
//! judge       what clients saw, against the undisturbed run; report makes the table
//! ```

pub mod bench;
pub mod cgroup;
pub mod client;
pub mod cluster;
pub mod deaths;
pub mod dice;
pub mod guard;
pub mod judge;
pub mod list;
pub mod load;
pub mod net;
pub mod network;
pub mod operations;
pub mod options;
pub mod pressure;
pub mod process;
pub mod programs;
pub mod report;
pub mod requests;
pub mod slowness;
pub mod sse;
pub mod view;

use anyhow::{Result, ensure};

use bench::Bench;
use options::Options;
use report::Row;

/// Injects what is asked for, and prints what came of it. True if all is within its bars.
pub async fn run(options: Options) -> Result<bool> {
    if options.list {
        list::ALL.iter().for_each(|fault| println!("{:4} {}", fault.id, fault.what));
        return Ok(true);
    }
    for id in &options.faults {
        ensure!(list::ALL.iter().any(|fault| fault.id == id), "there is no fault {id}; --list says which there are");
    }
    let asked = |id: &str| options.faults.is_empty() || options.faults.iter().any(|fault| fault == id);
    let json = options.json;
    let mut rest: Vec<&bench::Fault> = list::ALL.iter().filter(|fault| asked(fault.id)).collect();
    let mut bench = Bench::new(options.clone()).await?;
    let mut rows: Vec<Row> = Vec::new();
    // Those of one shape follow each other, so that a cluster serves many.
    while let Some(shape) = rest.first().map(|fault| fault.shape.clone()) {
        let (now, later): (Vec<_>, Vec<_>) = rest.into_iter().partition(|fault| fault.shape == shape);
        for fault in now {
            let row = bench.row(fault).await;
            eprintln!("  {}", row.told());
            rows.push(row);
        }
        rest = later;
    }
    let place = |id: &str| list::ALL.iter().position(|fault| fault.id == id);
    rows.sort_by_key(|row| place(row.fault));
    bench.end(&rows).await?;
    match json {
        true => println!("{:#}", report::json(&rows)),
        false => print!("{}", report::table(&rows)),
    }
    Ok(report::all_within_bars(&rows))
}
