//! One AMQP connection that can always be got rid of.
//!
//! `lapin` gives every connection a thread of its own, which waits for its socket without a limit: a broker that
//! accepts and then says nothing would keep thread and socket for ever, once per attempt. A [`Link`] therefore keeps a
//! second handle on the socket and shuts it down when the link is dropped, or when the handshake takes too long.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::tcp::OwnedTLSConfig;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{AsyncTcpStream, Channel, Connection, ConnectionProperties, Event};
use socket2::{SockRef, Socket};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::UrlError;

/// From the first packet to the open connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// For one request to the broker and its answer. The broker answers in a millisecond, or in a second under load; one
/// that does not within this time is treated as gone.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Offered to the broker when the URL names no other: a silent peer is noticed after twice this.
const HEARTBEAT_SECONDS: u16 = 10;

/// Unacknowledged bytes end the connection after this, which notices a cut path sooner than heartbeats do.
const USER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no connection, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The URL cannot be used.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// The broker refused or closed, or the network did.
    #[error("the broker's connection: {0}")]
    Broker(#[from] lapin::Error),
    /// The broker did not answer in time.
    #[error("no answer from the broker within {0:?}")]
    Timeout(Duration),
    /// It was there, and is gone.
    #[error("the broker's connection was lost")]
    Lost,
}

impl LinkError {
    /// The AMQP reply code, where the broker gave one.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Broker(error) => {
                if let lapin::ErrorKind::ProtocolError(error) = error.kind() {
                    Some(error.get_id())
                } else {
                    None
                }
            }
            Self::Url(_) | Self::Timeout(_) | Self::Lost => None,
        }
    }
}

/// Waits for the broker, but not longer than [`CALL_TIMEOUT`].
pub async fn within<T>(call: impl Future<Output = lapin::Result<T>>) -> Result<T, LinkError> {
    match timeout(CALL_TIMEOUT, call).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(LinkError::Timeout(CALL_TIMEOUT)),
    }
}

/// Reads an AMQP URL as AMQP clients of Node read it: `amqp://host/` means the default virtual host.
pub fn parse_url(text: &str) -> Result<AMQPUri, UrlError> {
    let url = url::Url::parse(text).map_err(|_| UrlError::NotAUrl)?;
    if !matches!(url.scheme(), "amqp" | "amqps") {
        return Err(UrlError::NotAmqp);
    }
    let host = url.host_str().filter(|host| !host.is_empty()).ok_or(UrlError::NoHost)?;
    // The parser's own text may quote the URL, which holds the password.
    let mut uri: AMQPUri = text.parse().map_err(|_| UrlError::BadPart)?;
    // It also takes `localhost` for an IPv6 address in brackets.
    host.trim_start_matches('[').trim_end_matches(']').clone_into(&mut uri.authority.host);
    if uri.vhost.is_empty() {
        "/".clone_into(&mut uri.vhost);
    }
    uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
    Ok(uri)
}

/// A connection, its blocked state and its kill switch.
pub struct Link {
    connection: Connection,
    blocked: watch::Receiver<bool>,
    _events: AbortOnDropHandle<()>,
    _kill: KillOnDrop,
}

/// The socket's second handle, from when it is connected.
#[derive(Default, Clone)]
struct KillSwitch(Arc<Mutex<Option<Socket>>>);

struct KillOnDrop(KillSwitch);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(socket) = self.0.lock().take() {
            // An error means that it is down already.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl KillSwitch {
    /// Takes a second handle on the socket, and sets what no URL can.
    fn arm(&self, socket: &SockRef<'_>) -> std::io::Result<()> {
        socket.set_tcp_nodelay(true)?;
        #[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
        socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
        *self.lock() = Some(socket.try_clone()?);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Socket>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    /// Connects. `name` is what the broker's operator sees.
    pub async fn open(uri: &AMQPUri, name: &str) -> Result<Self, LinkError> {
        let switch = KillSwitch::default();
        let kill = KillOnDrop(switch.clone());
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let connecting = Connection::connector(
            uri.clone(),
            lapin::runtime::default_runtime()?,
            async move |uri, runtime| {
                let address = runtime.to_socket_addrs((uri.authority.host.clone(), uri.authority.port));
                let stream = AsyncTcpStream::connect(&runtime, address).await?;
                if let AsyncTcpStream::Plain(tcp) = &stream {
                    switch.arm(&SockRef::from(tcp.get_ref()))?;
                }
                match uri.scheme {
                    AMQPScheme::AMQP => Ok(stream),
                    AMQPScheme::AMQPS => {
                        Ok(stream.into_tls(&uri.authority.host, OwnedTLSConfig::default().as_ref()).await?)
                    }
                }
            },
            properties,
        );
        let connection = match timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(connection) => connection?,
            Err(_) => return Err(LinkError::Timeout(CONNECT_TIMEOUT)),
        };
        let (sender, blocked) = watch::channel(false);
        let mut events = connection.events_listener();
        let events = tokio::spawn(async move {
            while let Some(event) = events.next().await {
                // Of the rest, whoever uses the link learns by the errors of its own calls.
                if let Event::ConnectionBlocked(reason) = event {
                    tracing::warn!(reason, "the broker blocks publishers");
                    sender.send_replace(true);
                } else if let Event::ConnectionUnblocked = event {
                    tracing::info!("the broker lets publishers go on");
                    sender.send_replace(false);
                }
            }
        });
        Ok(Self { connection, blocked, _events: AbortOnDropHandle::new(events), _kill: kill })
    }

    /// A new channel.
    pub async fn channel(&self) -> Result<Channel, LinkError> {
        within(self.connection.create_channel()).await
    }

    /// Whether the connection still stands, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.connection.status().connected()
    }

    /// True while the broker takes nothing that is published (it lacks memory or disk).
    pub fn is_blocked(&self) -> bool {
        *self.blocked.borrow()
    }

    /// Says goodbye. Whatever comes of it, the socket is shut down when the link is dropped.
    pub async fn close(&self) {
        if let Err(error) = within(self.connection.close(200, "OK".into())).await {
            tracing::debug!(%error, "closing a connection");
        }
    }
}
