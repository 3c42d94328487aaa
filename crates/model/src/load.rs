//! Loading many blocks at once on all cores, with a progress bar for a person and one log line for everybody.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rayon::prelude::*;

const REDRAWS_PER_SECOND: u8 = 10;

/// Packs every item and returns the results in the order of the items. `pack` says how many bytes of the checkpoint it
/// took. The first error stops the rest. `what` is for the reader of the bar and the log: "layers", "experts".
pub fn all<I, T, E>(what: &str, items: Vec<I>, pack: impl Fn(I) -> Result<(T, u64), E> + Sync) -> Result<Vec<T>, E>
where
    I: Send,
    T: Send,
    E: Send,
{
    let start = Instant::now();
    let count = items.len();
    let bar = bar(what, count);
    let bytes = AtomicU64::new(0);
    let packed: Result<Vec<T>, E> = items
        .into_par_iter()
        .map(|item| {
            let (packed, read) = pack(item)?;
            bytes.fetch_add(read, Ordering::Relaxed);
            bar.inc(1);
            Ok(packed)
        })
        .collect();
    bar.finish_and_clear();
    let packed = packed?;
    let (bytes, seconds) = (bytes.into_inner(), start.elapsed().as_secs_f64());
    let gigabytes_per_second = bytes as f64 / 1e9 / seconds.max(1e-9);
    tracing::info!(what, items = count, bytes, seconds, gigabytes_per_second, "loaded");
    Ok(packed)
}

/// Draws on stderr, and only for a terminal.
fn bar(what: &str, count: usize) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr_with_hz(REDRAWS_PER_SECOND)
    } else {
        ProgressDrawTarget::hidden()
    };
    let style = ProgressStyle::with_template("{prefix:>10} {bar:40} {pos}/{len} {elapsed}")
        .expect("the template has known keys only");
    ProgressBar::with_draw_target(Some(count as u64), target).with_style(style).with_prefix(what.to_owned())
}
