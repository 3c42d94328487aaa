//! One running sequence: the worker's events through `core::output`, until its end, an abort or a drop.
//!
//! Dropping a generation drops the worker's call at once, which frees the sequence's pages there.

use std::sync::Arc;

use futures::stream::{self, Stream};
use moesaic_proto::v1::RunEvent;
use tonic::{Code, Status, Streaming};

use super::service::Ticket;
use super::workers::Place;
use crate::core::{ApiError, Delta, Output};

pub struct Generation {
    /// None after the end.
    running: Option<Running>,
}

struct Running {
    events: Streaming<RunEvent>,
    output: Output,
    ticket: Arc<Ticket>,
    _place: Place,
}

impl Generation {
    pub(super) fn new(events: Streaming<RunEvent>, output: Output, ticket: Arc<Ticket>, place: Place) -> Self {
        Self { running: Some(Running { events, output, ticket, _place: place }) }
    }

    /// The next news; None after the last one or an error.
    pub async fn next(&mut self) -> Option<Result<Delta, ApiError>> {
        let news = self.running.as_mut()?.next().await;
        if !matches!(&news, Ok(delta) if delta.ending.is_none()) {
            self.running = None;
        }
        Some(news)
    }

    pub fn into_stream(self) -> impl Stream<Item = Result<Delta, ApiError>> + Send {
        stream::unfold(self, |mut generation| async move { generation.next().await.map(|news| (news, generation)) })
    }
}

impl Running {
    async fn next(&mut self) -> Result<Delta, ApiError> {
        loop {
            let event = tokio::select! {
                biased;
                () = self.ticket.aborted() => return Ok(self.output.abort()),
                event = self.events.message() => event,
            };
            match event {
                Ok(Some(event)) => {
                    if let Some(delta) = self.output.push(event) {
                        return Ok(delta);
                    }
                }
                Ok(None) => {
                    let reason = "the attention worker ended its answer without a finish".to_owned();
                    return Err(ApiError::Failed { reason });
                }
                Err(status) => return Err(failure(&status)),
            }
        }
    }
}

/// A worker's status after it had accepted, as the client sees it.
fn failure(status: &Status) -> ApiError {
    let reason = status.message().to_owned();
    match status.code() {
        Code::Unavailable => ApiError::Unavailable { reason },
        Code::Unknown | Code::Internal | Code::Cancelled if reason.is_empty() || reason.contains("h2") => {
            ApiError::Unavailable { reason: "the connection to the attention worker broke".into() }
        }
        _ => ApiError::Failed { reason },
    }
}
