//! Messages between processes of one host: one JSON object a line, with a bound on the line.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Reads one message of at most `bytes_max` bytes. `None`: there are no more.
///
/// # Errors
/// When the line is longer or is no such message, or the other side cannot be read.
pub async fn receive<T: DeserializeOwned>(
    reader: &mut (impl AsyncBufRead + Unpin),
    bytes_max: u64,
) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    reader.take(bytes_max).read_until(b'\n', &mut line).await?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(serde_json::from_slice(&line)?)),
        Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "the message was cut off or is too long")),
    }
}

/// Writes one message.
///
/// # Errors
/// When the other side is gone.
pub async fn send<T: Serialize>(writer: &mut (impl AsyncWrite + Unpin), message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    writer.write_all(&line).await?;
    writer.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn message_that_is_cut_off_or_too_long_is_an_error_and_the_end_is_none() {
        let mut line = Vec::new();
        send(&mut line, &"message").await.unwrap();
        assert_eq!(receive::<String>(&mut &line[..], 100).await.unwrap().as_deref(), Some("message"));
        assert!(receive::<String>(&mut &line[..], 5).await.is_err());
        assert!(receive::<String>(&mut &line[..4], 100).await.is_err());
        assert!(receive::<String>(&mut &line[..0], 100).await.unwrap().is_none());
    }
}
