//! TEMPORARY until moesaic_node::handshake is in.
use moesaic_proto::v1;
pub fn check(own: &v1::Hello, peer: &v1::Hello, _role: v1::Role) -> Result<(), String> {
    if own.fingerprint == peer.fingerprint { Ok(()) } else { Err("fingerprint".into()) }
}
