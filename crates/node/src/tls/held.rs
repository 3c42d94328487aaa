//! A connection that lasts for as long as the other side's certificate is believed: when the folder changes it is looked at
//! again, at the next byte that passes. Connections between nodes are never quiet for long (pings).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;

use super::Material;
use super::trust::Side;

pub struct Held<S> {
    stream: S,
    /// What the other side has shown, if anything; and which side it is.
    chain: Option<Vec<CertificateDer<'static>>>,
    side: Side,
    material: watch::Receiver<Arc<Material>>,
}

impl<S: Unpin> Held<S> {
    /// `material` as of before the handshake.
    pub(super) fn new(
        stream: S,
        chain: Option<Vec<CertificateDer<'static>>>,
        side: Side,
        material: watch::Receiver<Arc<Material>>,
    ) -> Self {
        Self { stream, chain, side, material }
    }

    pub fn get_ref(&self) -> &S {
        &self.stream
    }

    /// The stream, while the certificate is believed.
    fn held(self: Pin<&mut Self>) -> io::Result<Pin<&mut S>> {
        let this = self.get_mut();
        if let Some(chain) = &this.chain
            && this.material.has_changed().unwrap_or(false)
        {
            let trust = this.material.borrow_and_update().trust.clone();
            trust.check(chain, this.side).map_err(|error| io::Error::new(io::ErrorKind::PermissionDenied, error))?;
        }
        Ok(Pin::new(&mut this.stream))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Held<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.held()?.poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Held<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.held()?.poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.held()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.held()?.poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
