//! A connection that carries who is at its other end into each request's extensions.
//!
//! In: a stream whose handshake is done. Out: the same bytes, and through tonic's `Connected` the address and the
//! leaf certificate that TLS verified. It also holds the connection's places: one in the listener's bound, and one
//! among the few that each key has. To whoever reads from it, a connection that was hung up has come to its end.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use crate::platform::tls::Stream;

/// Connections that one key may have at once; an agent needs one, and a second while it changes over.
pub(super) const CONNECTIONS_OF_KEY_MAX: usize = 8;

/// The other end of a connection.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// Its address.
    pub(super) address: SocketAddr,
    /// The leaf certificate that TLS verified; none on a listener that asks for none.
    pub(super) certificate: Option<Arc<[u8]>>,
    hang_up: CancellationToken,
}

impl Peer {
    /// Ends the connection, whatever else is open on it.
    pub(super) fn hang_up(&self) {
        self.hang_up.cancel();
    }
}

/// Counts connections by the key of their certificate, so that one agent cannot take the places of all.
#[derive(Clone, Debug, Default)]
pub(super) struct KeyPlaces(Arc<Mutex<HashMap<String, usize>>>);

/// A place among those of a key; free again when dropped.
#[derive(Debug)]
pub(super) struct KeyPlace {
    places: KeyPlaces,
    key: String,
}

impl KeyPlaces {
    /// A place for a connection with this key, or none if it has [`CONNECTIONS_OF_KEY_MAX`].
    pub(super) fn take(&self, key: String) -> Option<KeyPlace> {
        let mut counts = self.counts();
        let count = counts.entry(key.clone()).or_default();
        if *count >= CONNECTIONS_OF_KEY_MAX {
            return None;
        }
        *count += 1;
        Some(KeyPlace { places: self.clone(), key })
    }

    /// A panic elsewhere cannot leave a count half changed.
    fn counts(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for KeyPlace {
    fn drop(&mut self) {
        let mut counts = self.places.counts();
        if let Some(count) = counts.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.key);
            }
        }
    }
}

/// See the module.
pub(super) struct PeerStream {
    stream: Stream,
    peer: Peer,
    hung_up: Pin<Box<WaitForCancellationFutureOwned>>,
    // Held for as long as the connection lives.
    _places: (OwnedSemaphorePermit, Option<KeyPlace>),
}

impl PeerStream {
    pub(super) fn new(
        stream: Stream,
        address: SocketAddr,
        place: OwnedSemaphorePermit,
        key_place: Option<KeyPlace>,
    ) -> Self {
        let certificate = stream.peer_certificates().into_iter().next().map(Arc::from);
        let hang_up = CancellationToken::new();
        let hung_up = Box::pin(hang_up.clone().cancelled_owned());
        Self { stream, peer: Peer { address, certificate, hang_up }, hung_up, _places: (place, key_place) }
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
        let own = self.get_mut();
        if own.hung_up.as_mut().poll(cx).is_ready() {
            // Nothing read is the end of the stream.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut own.stream).poll_read(cx, buf)
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
