//! Bytes between a channel and a stream inside the target: a forwarded connection, or an SFTP server. Called by `forward` and
//! `session`. Each half closes by itself; a client that does not read makes the stream wait, a stream that does not read is held
//! against the connection's [`Intake`](crate::intake::Intake).

use bytes::{Bytes, BytesMut};
use russh::server::Msg;
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

use crate::intake::{Held, Slot};
use crate::target::Stream;

/// Bytes of one read from inside.
const READ_LEN: usize = 64 << 10;

/// What waits for the inside.
type Queue = mpsc::UnboundedReceiver<(Bytes, Held)>;

/// Runs until both halves have ended, the client closes the channel or one side breaks.
pub(crate) async fn run(
    mut from_client: ChannelReadHalf,
    to_client: &ChannelWriteHalf<Msg>,
    slot: &Slot,
    inside: Box<dyn Stream>,
) {
    let (read, write) = tokio::io::split(inside);
    // Not bounded by its own length: what is in it is held, and the connection's intake is bounded.
    let (queue, queued) = mpsc::unbounded_channel();
    let receive = async {
        let mut queue = Some(queue);
        while let Some(message) = from_client.wait().await {
            match message {
                ChannelMsg::Data { data } => {
                    let held = slot.hold(data.len());
                    if let Some(queue) = &queue {
                        // A stream that was closed takes nothing more.
                        let _ = queue.send((data, held));
                    }
                }
                // Closing the queue is what tells the inside.
                ChannelMsg::Eof => queue = None,
                ChannelMsg::Close => return,
                _ => {}
            }
        }
    };
    let both = async {
        let (up, down) = tokio::join!(upwards(queued, write), downwards(read, to_client));
        if let Err(error) = up.and(down) {
            tracing::debug!(%error, "a stream broke off");
        }
    };
    tokio::select! {
        () = receive => {}
        () = both => {}
    }
}

async fn upwards(mut queued: Queue, mut inside: WriteHalf<impl AsyncWrite>) -> std::io::Result<()> {
    while let Some((data, held)) = queued.recv().await {
        if let Err(error) = inside.write_all(&data).await {
            // Nobody reads any more. What the other half still says is worth hearing, so this is not its end.
            queued.close();
            tracing::debug!(%error, "the inside does not read any more");
            break;
        }
        drop(held);
    }
    while queued.try_recv().is_ok() {}
    let _ = inside.shutdown().await;
    Ok(())
}

async fn downwards(mut inside: ReadHalf<impl AsyncRead>, to_client: &ChannelWriteHalf<Msg>) -> std::io::Result<()> {
    let mut buffer = BytesMut::with_capacity(READ_LEN);
    loop {
        buffer.reserve(READ_LEN);
        if inside.read_buf(&mut buffer).await? == 0 {
            break;
        }
        to_client.data_bytes(buffer.split().freeze()).await.map_err(std::io::Error::other)?;
    }
    to_client.eof().await.map_err(std::io::Error::other)
}
