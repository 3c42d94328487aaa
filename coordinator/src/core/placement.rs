//! Which expert worker holds which experts: `planner` decides, `eplb` is DeepSeek's algorithm, which it is measured against.

mod balance;
mod draft;
pub mod eplb;
mod fill;
pub mod planner;
mod turns;
