//! A connection that carries who is at its other end into each request's extensions.
//!
//! In: a stream whose handshake is done. Out: the same bytes, and through tonic's `Connected` the address and the
//! leaf certificate that TLS verified. It also holds the connection's place in the listener's bound. It does not
//! read the certificate; that is admission's work.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tonic::transport::server::Connected;

use crate::platform::tls::Stream;

/// The other end of a connection.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// Its address.
    pub(super) address: SocketAddr,
    /// The leaf certificate that TLS verified; none on a listener that asks for none.
    pub(super) certificate: Option<Arc<[u8]>>,
}

/// See the module.
pub(super) struct PeerStream {
    stream: Stream,
    peer: Peer,
    // Held for as long as the connection lives.
    _place: OwnedSemaphorePermit,
}

impl PeerStream {
    pub(super) fn new(stream: Stream, address: SocketAddr, place: OwnedSemaphorePermit) -> Self {
        let certificate = stream.peer_certificates().into_iter().next().map(Arc::from);
        Self { stream, peer: Peer { address, certificate }, _place: place }
    }
}

impl Connected for PeerStream {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
