//! HTTP for opendal: bytes go out piece by piece, so that the bandwidth is kept and a request that gets no further
//! is seen, whatever its size.
//!
//! In: requests that are signed already. Out: responses, read whole; the objects asked for are read whole anyway.
//! Never: a proxy or a redirect that no setting names.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use opendal::{Buffer, Error, ErrorKind, HttpBody, HttpTransport};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::retry::{Bandwidth, Limits, PIECE_BYTES, step};

/// No pack and no page of a listing comes near this.
const RESPONSE_BYTES_MAX: usize = 1024 * 1024 * 1024;

/// Sends requests.
#[derive(Clone, Debug)]
pub(super) struct Transport {
    client: reqwest::Client,
    limits: Limits,
    bandwidth: Arc<Bandwidth>,
}

impl Transport {
    /// Speaks to nobody yet.
    ///
    /// # Errors
    /// When the system's certificates cannot be had.
    pub(super) fn new(limits: &Limits) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(limits.stall_max)
            .build()?;
        let bandwidth = Arc::new(Bandwidth::new(limits.upload_bytes_per_second));
        Ok(Self { client, limits: limits.clone(), bandwidth })
    }

    async fn send(&self, request: reqwest::RequestBuilder, body: Buffer) -> Result<reqwest::Response, Error> {
        if body.is_empty() {
            return self.answer(request.send()).await;
        }
        let (pieces, taken) = mpsc::channel(1);
        let answer = request.body(reqwest::Body::wrap_stream(ReceiverStream::new(taken))).send();
        tokio::pin!(answer);
        tokio::select! {
            // A refusal comes before all is sent.
            answer = &mut answer => return answer.map_err(temporary),
            fed = self.feed(body, pieces) => fed?,
        }
        self.answer(answer).await
    }

    async fn feed(&self, body: Buffer, pieces: mpsc::Sender<io::Result<Bytes>>) -> Result<(), Error> {
        for mut chunk in body {
            while !chunk.is_empty() {
                let piece = chunk.split_to(chunk.len().min(PIECE_BYTES));
                self.bandwidth.take(piece.len()).await;
                match step(&self.limits, pieces.send(Ok(piece))).await {
                    None => return Err(self.stalled("the server takes no more bytes")),
                    // The request is over; its answer says why.
                    Some(Err(_)) => return Ok(()),
                    Some(Ok(())) => {}
                }
            }
        }
        Ok(())
    }

    async fn answer(
        &self,
        answer: impl Future<Output = Result<reqwest::Response, reqwest::Error>>,
    ) -> Result<reqwest::Response, Error> {
        let answer = step(&self.limits, answer).await;
        answer.ok_or_else(|| self.stalled("the server does not answer"))?.map_err(temporary)
    }

    async fn read(&self, response: &mut reqwest::Response) -> Result<Buffer, Error> {
        let mut chunks = VecDeque::new();
        let mut bytes = 0;
        loop {
            let chunk = step(&self.limits, response.chunk()).await;
            let chunk = chunk.ok_or_else(|| self.stalled("the answer does not go on"))?.map_err(temporary)?;
            let Some(chunk) = chunk else { return Ok(Buffer::from(chunks)) };
            bytes += chunk.len();
            if bytes > RESPONSE_BYTES_MAX {
                return Err(Error::new(ErrorKind::Unexpected, "the answer is too long"));
            }
            chunks.push_back(chunk);
        }
    }

    fn stalled(&self, what: &str) -> Error {
        let seconds = self.limits.stall_max.as_secs_f64();
        Error::new(ErrorKind::Unexpected, format!("{what} for {seconds} s")).set_temporary()
    }
}

impl HttpTransport for Transport {
    async fn fetch(&self, request: Request<Buffer>) -> Result<Response<HttpBody>, Error> {
        let (parts, body) = request.into_parts();
        let uri = parts.uri.clone();
        let is_head = parts.method == http::Method::HEAD;
        let request = self.client.request(parts.method, parts.uri.to_string()).headers(parts.headers);
        let mut response = self.send(request, body).await?;
        let mut answer = Response::builder().status(response.status()).version(response.version()).extension(uri);
        if let Some(headers) = answer.headers_mut() {
            headers.clone_from(response.headers());
        }
        let bytes = if is_head { Buffer::new() } else { self.read(&mut response).await? };
        // Whether it is all that was announced was checked while it was read.
        let body = HttpBody::new(tokio_stream::once(Ok(bytes)), None);
        answer.body(body).map_err(|e| Error::new(ErrorKind::Unexpected, "the answer has an odd head").set_source(e))
    }
}

fn temporary(error: reqwest::Error) -> Error {
    // Nothing that HTTP itself reports has reached the server's mind: all of it may pass.
    let reason = crate::platform::chain(&error.without_url());
    Error::new(ErrorKind::Unexpected, reason).set_temporary()
}
