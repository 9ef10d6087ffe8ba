//! One connection to one server, and what its answers mean.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::{AsyncPushSender, MultiplexedConnection, SendError};
use redis::{AsyncConnectionConfig, Cmd, ProtocolVersion, PushInfo, PushKind, RedisConnectionInfo, RedisError, Value};
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::task::AbortOnDropHandle;

use super::address::{Address, Login, Place, Server};
use super::bounded::{Account, Bounded, Excess};

/// The limit for connecting, and for each question that belongs to it.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

/// How long the system tries to deliver what was written before it breaks the connection.
const UNDELIVERED_AT_MOST: Duration = Duration::from_secs(3);

/// Characters of an error of Redis's: one of a script names the script, the line and the error of a command.
const WORDS_MAX: usize = 500;

/// Commands that may wait to be written.
const QUEUE_LEN: usize = 1024;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// There was no connection in time.
    Unconnected,
    /// The answer did not come in time.
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
            Self::Unconnected => "no connection in time",
            Self::Late => "no answer in time",
            Self::Lost(text) | Self::Refused(text) => text,
        }
    }

    /// With the reason that the stream saw, where it saw one.
    fn because(self, account: &Account) -> Self {
        let is_known = matches!(self, Self::Lost(_)) && !account.why().is_empty();
        if is_known { Self::Lost(account.why().to_owned()) } else { self }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

impl From<RedisError> for Failure {
    fn from(error: RedisError) -> Self {
        match (error.code(), error.detail()) {
            (Some(code), Some(detail)) => Self::Refused(line(&format!("{code} {detail}"))),
            (Some(code), None) => Self::Refused(line(code)),
            // Nothing of the server's: the connection broke, or what came was not its protocol, which breaks it.
            (None, _) => Self::Lost(line(&error.to_string())),
        }
    }
}

/// What of a server's words goes into a log: one line, not too long.
fn line(text: &str) -> String {
    text.chars().take(WORDS_MAX).map(|one| if one.is_control() { ' ' } else { one }).collect()
}

/// Takes what Redis sends without an answer's being due. It must not wait.
pub(super) type Pushed = Arc<dyn Fn(PushInfo) + Send + Sync>;

/// A command with its arguments.
pub(super) fn command(name: &str, args: &[&str]) -> Cmd {
    let mut command = Cmd::new();
    command.arg(name).arg(args);
    command
}

/// One connection; it ends when this is dropped, and what was on its way fails then.
pub(super) struct Connection {
    asker: Asker,
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
        // The greeting, and where it is not the first the choice of the database.
        let questions = if settings.db() == 0 { 1 } else { 2 };
        let account = Arc::new(Account::new(questions, pushed.is_some()));
        if let Some(pushed) = pushed {
            config = config.set_push_sender(Pushes { pushed, account: Arc::clone(&account) });
        }
        let stream = Bounded::new(stream, Arc::clone(&account));
        let made = within(async { Ok(MultiplexedConnection::new_with_config(&settings, stream, config).await?) }).await;
        let (redis, work) = made.map_err(|failure| failure.because(&account))?;
        let work = AbortOnDropHandle::new(tokio::spawn(work));
        Ok(Self { asker: Asker { redis, account }, server, work })
    }

    /// Whoever wants to ask here, also while others do. It does not keep the connection.
    pub(super) fn asker(&self) -> Asker {
        self.asker.clone()
    }

    /// Asks once.
    pub(super) async fn ask(&self, command: &Cmd) -> Result<Value, Failure> {
        within(self.asker().ask(command)).await
    }

    /// Returns when the connection has broken, and says why.
    pub(super) async fn broken(&mut self) -> Failure {
        tokio::select! {
            // Fails when the runtime ends, and then nobody waits.
            _ = &mut self.work => {}
            () = self.asker.account.ended() => {}
        }
        Failure::Lost("the connection broke".to_owned()).because(&self.asker.account)
    }
}

/// See [`Connection::asker`].
#[derive(Clone)]
pub(super) struct Asker {
    redis: MultiplexedConnection,
    account: Arc<Account>,
}

impl Asker {
    /// Asks, and waits as long as the connection stands. What is dropped before it was sent is never sent.
    pub(super) async fn ask(mut self, command: &Cmd) -> Result<Value, Failure> {
        self.account.asked();
        let answer = self.redis.send_packed_command(command).await.and_then(Value::extract_error);
        answer.map_err(|error| Failure::from(error).because(&self.account))
    }

    /// Subscribes a channel, or ends its subscription; returns when Redis has said so.
    pub(super) async fn channel(self, verb: &str, channel: &str) -> Result<(), Failure> {
        let account = Arc::clone(&self.account);
        let reply = self.ask(&command(verb, &[channel])).await?;
        if let Value::Push { kind, data } = &reply
            && kind.to_string().eq_ignore_ascii_case(verb)
            && let Some(Value::BulkString(name)) = data.first()
            && name == channel.as_bytes()
        {
            return Ok(());
        }
        // The answer to another question: so would be whatever follows.
        account.end(&Excess::Unasked);
        Err(Failure::Lost(Excess::Unasked.to_string()))
    }
}

/// What the client hands on: all that comes unasked, and of what is subscribed what an answer to it says.
struct Pushes {
    pushed: Pushed,
    account: Arc<Account>,
}

impl AsyncPushSender for Pushes {
    fn send(&self, info: PushInfo) -> Result<(), SendError> {
        let is_answer = matches!(
            info.kind,
            PushKind::Subscribe
                | PushKind::PSubscribe
                | PushKind::SSubscribe
                | PushKind::Unsubscribe
                | PushKind::PUnsubscribe
                | PushKind::SUnsubscribe
        );
        // A master says that a sharded subscription has ended unasked too, when the slot leaves it.
        if is_answer && !self.account.answered() && info.kind != PushKind::SUnsubscribe {
            self.account.end(&Excess::Unasked);
        }
        (self.pushed)(info);
        Ok(())
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    const SETTINGS: fn() -> RedisConnectionInfo = || settings(&Login::default(), 0);

    /// A connection for subscriptions and its other end, with the kinds of what came unasked.
    async fn connected() -> (Connection, DuplexStream, Arc<Mutex<Vec<PushKind>>>) {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        let came = Arc::new(Mutex::new(Vec::new()));
        let note = Arc::clone(&came);
        let pushed: Pushed = Arc::new(move |info| note.lock().expect("no panic").push(info.kind));
        theirs.write_all(b"%0\r\n").await.expect("an open pipe");
        let connection = Connection::over(ours, None, SETTINGS(), Some(pushed)).await.expect("greeted");
        let mut greeting = [0; 1024];
        assert!(theirs.read(&mut greeting).await.expect("a greeting") > 0);
        (connection, theirs, came)
    }

    fn told(kind: &str, channel: &str) -> String {
        format!(">3\r\n${}\r\n{kind}\r\n${}\r\n{channel}\r\n:1\r\n", kind.len(), channel.len())
    }

    #[tokio::test]
    async fn a_subscription_stands_when_redis_says_so_of_it() {
        let (mut connection, mut theirs, came) = connected().await;
        theirs.write_all(told("ssubscribe", "a").as_bytes()).await.expect("an open pipe");
        let unasked = tokio::time::timeout(Duration::from_secs(5), connection.broken()).await;
        assert_eq!(unasked, Ok(Failure::Lost(Excess::Unasked.to_string())), "nobody asked");
        drop(came);

        for (verb, answer, expected) in [
            ("SSUBSCRIBE", told("ssubscribe", "a"), Ok(())),
            ("SUBSCRIBE", told("subscribe", "a"), Ok(())),
            ("SUNSUBSCRIBE", told("sunsubscribe", "a"), Ok(())),
            ("SSUBSCRIBE", "-MOVED 1 b:2\r\n".to_owned(), Err(Failure::Refused("MOVED 1 b:2".to_owned()))),
            ("SUBSCRIBE", told("subscribe", "b"), Err(Failure::Lost(Excess::Unasked.to_string()))),
            ("SSUBSCRIBE", told("sunsubscribe", "a"), Err(Failure::Lost(Excess::Unasked.to_string()))),
            ("SUBSCRIBE", "+OK\r\n".to_owned(), Err(Failure::Lost(Excess::Unasked.to_string()))),
        ] {
            let (mut connection, mut theirs, _) = connected().await;
            let asker = connection.asker();
            let (answered, ()) = tokio::join!(asker.channel(verb, "a"), async {
                assert!(theirs.read(&mut [0; 1024]).await.expect("a question") > 0);
                theirs.write_all(answer.as_bytes()).await.expect("an open pipe");
            });
            assert_eq!(answered, expected, "{verb} {answer:?}");
            let stands = tokio::time::timeout(Duration::from_millis(50), connection.broken()).await.is_err();
            assert_eq!(stands, !matches!(expected, Err(Failure::Lost(_))), "{verb} {answer:?}");
        }
    }

    /// A master says this by itself when a slot leaves it.
    #[tokio::test]
    async fn the_end_of_a_sharded_subscription_needs_no_question() {
        let (mut connection, mut theirs, came) = connected().await;
        theirs.write_all(told("sunsubscribe", "a").as_bytes()).await.expect("an open pipe");
        assert!(tokio::time::timeout(Duration::from_millis(50), connection.broken()).await.is_err());
        assert_eq!(*came.lock().expect("no panic"), [PushKind::SUnsubscribe]);
    }

    #[test]
    fn a_log_line_is_one_line() {
        assert_eq!(line("ERR a\r\nb\u{1b}[31m"), "ERR a  b [31m");
        assert_eq!(line(&"x".repeat(1 << 20)).len(), WORDS_MAX);
    }
}
