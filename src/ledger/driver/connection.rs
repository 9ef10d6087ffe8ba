//! One connection to one server, and what its answers mean.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::{AsyncPushSender, MultiplexedConnection};
use redis::{AsyncConnectionConfig, Cmd, ProtocolVersion, RedisConnectionInfo, RedisError, Value};
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::task::AbortOnDropHandle;

use super::address::{Address, Login, Place, Server};
use super::bounded::Bounded;

/// The limit for connecting, and for each question that belongs to it.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

/// How long the system tries to deliver what was written before it breaks the connection.
const UNDELIVERED_AT_MOST: Duration = Duration::from_secs(3);

/// Commands that may wait to be written.
const QUEUE_LEN: usize = 1024;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// It did not come in time.
    Late,
    /// There is no connection, or it broke.
    Lost(String),
    /// The server's own words, its code first.
    Refused(String),
}

impl Failure {
    /// What happened, in words.
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Late => "no answer in time",
            Self::Lost(text) | Self::Refused(text) => text,
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

impl From<RedisError> for Failure {
    fn from(error: RedisError) -> Self {
        if error.is_timeout() {
            return Self::Late;
        }
        match (error.code(), error.detail()) {
            (Some(code), Some(detail)) => Self::Refused(format!("{code} {detail}")),
            (Some(code), None) => Self::Refused(code.to_owned()),
            // Nothing of the server's: the connection broke, or what came was not its protocol, which breaks it.
            (None, _) => Self::Lost(error.to_string()),
        }
    }
}

/// Where what Redis sends unasked goes.
pub(super) type Pushed = Arc<dyn AsyncPushSender>;

/// A command with its arguments.
pub(super) fn command(name: &str, args: &[&str]) -> Cmd {
    let mut command = Cmd::new();
    command.arg(name).arg(args);
    command
}

/// One connection; it ends when this is dropped, and what was on its way fails then.
pub(super) struct Connection {
    redis: MultiplexedConnection,
    /// Where it leads, where that has a name.
    pub(super) server: Option<Server>,
    work: AbortOnDropHandle<()>,
}

impl Connection {
    /// Connects to a place: on Sentinel's to the master that one of them names, on a cluster's to its first node.
    pub(super) async fn open(address: &Address, pushed: Option<Pushed>) -> Result<Self, Failure> {
        match &address.place {
            Place::Server(server) => Self::to(address, server, &address.login, pushed).await,
            Place::Cluster(nodes) => {
                let first = nodes.first().ok_or_else(|| Failure::Lost("a cluster without nodes".to_owned()))?;
                Self::to(address, first, &address.login, pushed).await
            }
            Place::Unix(path) => {
                let stream = within(async { Ok(UnixStream::connect(path).await?) }).await?;
                Self::over(stream, None, settings(&address.login, address.database), pushed).await
            }
            Place::Sentinel { .. } => super::sentinel::open(address, pushed).await,
        }
    }

    /// Connects to a server, whatever the address's own place is.
    pub(super) async fn to(
        address: &Address,
        server: &Server,
        login: &Login,
        pushed: Option<Pushed>,
    ) -> Result<Self, Failure> {
        let settings = settings(login, address.database);
        let stream = within(async { Ok(TcpStream::connect((server.host.as_str(), server.port)).await?) }).await?;
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_tcp_user_timeout(Some(UNDELIVERED_AT_MOST))?;
        let Some(tls) = &address.tls else {
            return Self::over(stream, Some(server.clone()), settings, pushed).await;
        };
        let name = ServerName::try_from(server.host.clone()).map_err(|error| Failure::Lost(error.to_string()))?;
        let connector = tokio_rustls::TlsConnector::from(tls.clone());
        let stream = within(async { Ok(connector.connect(name, stream).await?) }).await?;
        Self::over(stream, Some(server.clone()), settings, pushed).await
    }

    async fn over<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        stream: S,
        server: Option<Server>,
        settings: RedisConnectionInfo,
        pushed: Option<Pushed>,
    ) -> Result<Self, Failure> {
        let mut config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(QUEUE_LEN);
        if let Some(pushed) = pushed {
            config = config.set_push_sender(pushed);
        }
        let made = MultiplexedConnection::new_with_config(&settings, Bounded::new(stream), config);
        let (redis, work) = within(async { Ok(made.await?) }).await?;
        Ok(Self { redis, server, work: AbortOnDropHandle::new(tokio::spawn(work)) })
    }

    /// Whoever wants to ask here, also while others do. It does not keep the connection.
    pub(super) fn asker(&self) -> Asker {
        Asker(self.redis.clone())
    }

    /// Asks once.
    pub(super) async fn ask(&self, command: &Cmd) -> Result<Value, Failure> {
        within(self.asker().ask(command)).await
    }

    /// Returns when the connection has broken.
    pub(super) async fn broken(&mut self) {
        // Fails when the runtime ends, and then nobody waits.
        (&mut self.work).await.ok();
    }
}

/// See [`Connection::asker`].
#[derive(Clone)]
pub(super) struct Asker(MultiplexedConnection);

impl Asker {
    /// Asks, and waits as long as the connection stands.
    pub(super) async fn ask(mut self, command: &Cmd) -> Result<Value, Failure> {
        Ok(self.0.send_packed_command(command).await?.extract_error()?)
    }

    /// Starts to receive channels; returns when Redis has said so for each.
    pub(super) async fn subscribe(mut self, channels: &[String]) -> Result<(), Failure> {
        Ok(self.0.subscribe(channels).await?)
    }
}

fn settings(login: &Login, database: i64) -> RedisConnectionInfo {
    let settings = RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP3).set_skip_set_lib_name();
    let settings = settings.set_db(database);
    let settings = login.username.iter().fold(settings, RedisConnectionInfo::set_username);
    login.password.iter().fold(settings, RedisConnectionInfo::set_password)
}

async fn within<T>(step: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::time::timeout(CONNECT_WITHIN, step).await.unwrap_or(Err(Failure::Late))
}
