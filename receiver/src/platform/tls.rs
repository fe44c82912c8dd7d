//! A listener that hands out connections whose TLS handshake is done.
//!
//! In: a bound socket and a rustls configuration, or none for plain TCP. Out: streams, one a call of
//! [`Listener::accept`], with the peer's address. Handshakes run side by side under a bound and a
//! deadline, so a few clients that say nothing delay nobody; as many as the bound delay others until the deadline.
//! It never looks into certificates.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// A handshake that takes longer is given up.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// Handshakes going on at once. Each holds a socket and about 40 KiB; more wait in the kernel's backlog.
const HANDSHAKES_MAX: usize = 256;
/// Pause after a failed `accept`, which mostly means that descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Address of the other end, as handlers see it in a request's extensions.
#[derive(Clone, Copy, Debug)]
pub struct PeerAddr(pub SocketAddr);

/// A connection, with TLS or without.
#[derive(Debug)]
pub enum Stream {
    /// TLS; boxed because its state is much larger than a socket.
    Tls(Box<TlsStream<TcpStream>>),
    /// Plain TCP, on loopback only.
    Plain(TcpStream),
}

impl Stream {
    /// The certificates that the client showed, leaf first, in DER; none without client authentication.
    pub fn peer_certificates(&self) -> Vec<Vec<u8>> {
        match self {
            Self::Tls(tls) => {
                let certificates = tls.get_ref().1.peer_certificates().unwrap_or_default();
                certificates.iter().map(|certificate| certificate.to_vec()).collect()
            }
            Self::Plain(_) => Vec::new(),
        }
    }
}

/// See the module.
// No `Debug`: the acceptor has none.
pub struct Listener {
    socket: TcpListener,
    tls: Option<TlsAcceptor>,
    // Dropped with the listener: handshakes in flight end with it.
    handshakes: JoinSet<io::Result<(Stream, SocketAddr)>>,
}

impl Listener {
    /// A listener on `socket`; `config` is `None` for plain TCP.
    pub fn new(socket: TcpListener, config: Option<Arc<rustls::ServerConfig>>) -> Self {
        Self { socket, tls: config.map(TlsAcceptor::from), handshakes: JoinSet::new() }
    }

    /// The next connection that is ready for bytes.
    ///
    /// Cancel-safe: handshakes live in the set and go on with the next call.
    pub async fn accept(&mut self) -> (Stream, SocketAddr) {
        loop {
            tokio::select! {
                accepted = self.socket.accept(), if self.handshakes.len() < HANDSHAKES_MAX => match accepted {
                    Ok((tcp, peer)) => self.begin(tcp, peer),
                    Err(error) => {
                        tracing::warn!(event = "accept_failed", component = "listener", error = %error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(ended) = self.handshakes.join_next() => match ended {
                    Ok(Ok(ready)) => return ready,
                    Ok(Err(error)) => tracing::debug!(event = "handshake_failed", component = "listener", error = %error, "handshake failed"),
                    Err(error) => tracing::error!(event = "handshake_panicked", component = "listener", error = %error, "handshake panicked"),
                },
            }
        }
    }

    fn begin(&mut self, tcp: TcpStream, peer: SocketAddr) {
        let tls = self.tls.clone();
        self.handshakes.spawn(async move {
            // Small messages both ways: waiting for more bytes only adds latency.
            tcp.set_nodelay(true)?;
            let Some(tls) = tls else { return Ok((Stream::Plain(tcp), peer)) };
            match tokio::time::timeout(HANDSHAKE_TIME_MAX, tls.accept(tcp)).await {
                Ok(done) => Ok((Stream::Tls(Box::new(done?)), peer)),
                Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long")),
            }
        });
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
