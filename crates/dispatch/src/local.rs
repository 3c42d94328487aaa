//! The same process.
use std::sync::Arc;
use moesaic_proto::WorkerId;
use crate::frame::{RequestFrame, Shape};

/// An expert worker as its transports see it.
pub trait ExpertHost: Send + Sync {
    fn shape(&self) -> Shape;
    fn submit(&self, frame: RequestFrame, reply: ReplySender);
}
pub struct ReplySender;
/// The expert workers of this process, by id. Clones share one table.
#[derive(Clone, Default)]
pub struct Hub;
impl Hub {
    pub fn insert(&self, _id: WorkerId, _host: Arc<dyn ExpertHost>) { unimplemented!() }
    pub fn remove(&self, _id: &WorkerId) { unimplemented!() }
}
