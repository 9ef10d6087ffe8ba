//! The NestJS TCP transport, served: many requests may be open on one connection.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;

use crate::nest::{self, Fault, Packet, Service};

/// Serves for ever.
pub async fn serve<S: Service>(listener: TcpListener, service: Arc<S>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let service = Arc::clone(&service);
                tokio::spawn(async move {
                    if let Err(error) = talk(stream, service).await {
                        tracing::debug!(%error, "a connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "no connection accepted");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn talk<S: Service>(stream: TcpStream, service: Arc<S>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut reader, writer) = stream.into_split();
    let writer = Arc::new(Mutex::new(writer));
    let mut buffer = Vec::new();
    while reader.read_buf(&mut buffer).await? > 0 {
        // Like NestJS: a connection that does not speak frames is closed without a word.
        while let Some(text) = nest::take_frame(&mut buffer).map_err(|()| std::io::ErrorKind::InvalidData)? {
            let packet = Packet::read(&text).ok_or(std::io::ErrorKind::InvalidData)?;
            let (service, writer) = (Arc::clone(&service), Arc::clone(&writer));
            tokio::spawn(async move {
                let outcome = service.handle(&packet.pattern, packet.data).await;
                if let Err(Fault::Broken(error)) = &outcome {
                    tracing::error!(pattern = packet.pattern, error = format!("{error:#}"), "a request failed");
                }
                let Some(id) = packet.id else { return };
                let mut reply = nest::reply(&id, &outcome);
                reply["id"] = id;
                // Whoever asked may be gone.
                let _ = writer.lock().await.write_all(&nest::frame(&reply)).await;
            });
        }
    }
    Ok(())
}
