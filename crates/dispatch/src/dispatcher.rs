//! The attention worker's side.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use moesaic_proto::{ExpertId, LayerId, Placement, WorkerId, v1};
use crate::combine::CombineOps;
use crate::frame::Rows;
use crate::local::Hub;

/// One chosen expert of a row and its weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Route {
    pub expert: ExpertId,
    pub weight: f32,
}

#[derive(Clone)]
pub struct DispatchConfig {
    pub hidden: usize,
    pub experts: usize,
    /// Logical groups of rule 1(c).
    pub groups: usize,
    /// This attention worker's number in frame headers; equal to `hello.source`.
    pub source: u16,
    pub layer_deadline: Duration,
    pub hello: v1::Hello,
    pub ops: CombineOps,
}

#[derive(Clone, Debug, thiserror::Error)]
#[error("dispatch")]
pub struct DispatchError;

/// Clones share everything. Must be made inside a tokio runtime, which carries its background tasks; `dispatch` and
/// `combine` work on any thread and any executor.
#[derive(Clone)]
pub struct Dispatcher;
impl Dispatcher {
    pub fn new(_config: DispatchConfig, _hub: Option<Hub>) -> Self { unimplemented!() }
    /// `addresses`: the expert workers that may be used, those that have the placement's epoch loaded.
    pub fn set_view(&self, _placement: Arc<Placement>, _addresses: &BTreeMap<WorkerId, String>) { unimplemented!() }
    /// Whether every expert of every layer has a holder with a live edge.
    pub fn reachable(&self) -> bool { unimplemented!() }
    pub fn dispatch(&self, _layer: LayerId, _micro_batch: u8, _rows: Rows, _top_k: usize, _routes: &[Route]) -> Result<Pending, DispatchError> { unimplemented!() }
}
pub struct Pending;
impl Pending {
    /// Waits for all answers and adds them up into `y` [rows, hidden], overwriting it.
    pub async fn combine(self, _y: &mut [f32]) -> Result<(), DispatchError> { unimplemented!() }
}
