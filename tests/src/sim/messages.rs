//! What processes say to each other: the product's own values, with gRPC's words around them.

use moesaic_coordinator::core::ApiError;
use moesaic_dispatch::{AnswerFrame, RequestFrame};
use moesaic_node::Member;
use moesaic_proto::v1::{Cordon, ExpertLoadResponse, LoadResponse, Role, RunEvent, RunRequest};
use moesaic_proto::{Placement, WorkerId};
use tonic::Code;

use super::lane::Slot;
use super::net::StreamId;

#[derive(Clone, Debug)]
pub enum Message {
    // Attention worker and expert worker, on one stream.
    Hello,
    Frame(RequestFrame),
    Answer(AnswerFrame),
    Ping,

    // The same, of a lane: its first message on a stream of its own beside that of the edge, its slots there; and what is
    // said of it over the edge's.
    LaneHello {
        generation: u32,
        beside: StreamId,
    },
    Slot(Box<Slot>),
    LaneWake {
        generation: u32,
        sequence: u32,
    },
    LaneFailed {
        generation: u32,
    },

    // Coordinator and attention worker, a stream for each call.
    Run(Box<RunRequest>),
    /// The call is taken: its events follow.
    Accepted,
    Event(RunEvent),
    Failed(Code),
    Abort {
        request_id: String,
        call: u64,
    },
    Load,
    LoadAnswer(Box<LoadResponse>),
    ExpertLoad,
    ExpertLoadAnswer(ExpertLoadResponse),

    // Client and coordinator, a stream for each call.
    Generate(Box<Generate>),
    Token {
        position: usize,
        token: u32,
        is_last: bool,
    },
    Error(ApiError),

    // Anybody and etcd.
    Ask(Ask),
    Told(Told),
}

/// What a client asks for.
#[derive(Clone, Debug)]
pub struct Generate {
    pub request_id: String,
    pub prompt: Vec<u32>,
    pub seed: u64,
    pub tokens: usize,
    /// Tokens that the client has from an earlier stream.
    pub known: Option<usize>,
}

/// What etcd is asked, each on a stream of its own kind.
#[derive(Clone, Debug)]
pub enum Ask {
    /// A snapshot, and then to follow it.
    List,
    Watch {
        from: u64,
    },
    /// A lease with a member's entry under it.
    Register(Box<Member>),
    Update {
        lease: u64,
        member: Box<Member>,
    },
    KeepAlive {
        lease: u64,
    },
    Revoke {
        lease: u64,
    },
    Campaign {
        id: WorkerId,
    },
    Publish(Placement),
}

#[derive(Clone, Debug)]
pub enum Told {
    Listed {
        changes: Vec<Change>,
        revision: u64,
    },
    Changed(Vec<Change>),
    /// What was to be watched has been compacted.
    Cancelled,
    Granted {
        lease: u64,
    },
    Alive(bool),
    /// The term, for who was first.
    Elected(Option<(u64, u64)>),
    Published(bool),
}

/// One key's news.
#[derive(Clone, Debug)]
pub enum Change {
    Member(Box<Member>),
    MemberGone(Role, WorkerId),
    Placement(Placement),
    Leader(Option<(WorkerId, u64)>),
    Cordon(Role, WorkerId, Option<Cordon>),
}

impl Message {
    /// Those that a receiver must be able to take twice, at any time.
    pub fn may_come_twice(&self) -> bool {
        matches!(self, Self::Frame(_) | Self::Answer(_))
    }
}
