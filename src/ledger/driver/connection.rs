//! One connection to one server, and what its answers mean.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::address::{Address, Login, Place, Server};
use super::command::Command;
use super::measure::Excess;
use super::reply::Reply;
use super::traffic::{Desk, Expected, Traffic};

/// The limit for connecting, and for each question that belongs to it.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

/// How long the system tries to deliver what was written before it breaks the connection.
const UNDELIVERED_AT_MOST: Duration = Duration::from_secs(3);

/// Characters of an error of Redis's: one of a script names the script, the line and the error of a command.
const WORDS_MAX: usize = 500;

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
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Lost(error.to_string())
    }
}

impl From<Excess> for Failure {
    fn from(excess: Excess) -> Self {
        Self::Lost(excess.to_string())
    }
}

/// What of a server's words goes into a log: one line, not too long.
pub(super) fn line(text: &str) -> String {
    text.chars().take(WORDS_MAX).map(|one| if one.is_control() { ' ' } else { one }).collect()
}

/// Takes what Redis sends without an answer's being due. It must not wait.
pub(super) type Pushed = Arc<dyn Fn(&Reply) + Send + Sync>;

/// One connection; it ends when this is dropped, and what was on its way fails then.
pub(super) struct Connection {
    asker: Asker,
    /// Where it leads, where that has a name.
    pub(super) server: Option<Server>,
    work: AbortOnDropHandle<()>,
    _gathering: AbortOnDropHandle<()>,
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
                Self::over(stream, None, &address.login, address.database, pushed).await
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
        let stream = within(async { Ok(TcpStream::connect((server.host.as_str(), server.port)).await?) }).await?;
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_tcp_user_timeout(Some(UNDELIVERED_AT_MOST))?;
        let Some(tls) = &address.tls else {
            return Self::over(stream, Some(server.clone()), login, address.database, pushed).await;
        };
        let name = ServerName::try_from(server.host.clone()).map_err(|error| Failure::Lost(error.to_string()))?;
        let connector = tokio_rustls::TlsConnector::from(tls.clone());
        let stream = within(async { Ok(connector.connect(name, stream).await?) }).await?;
        Self::over(stream, Some(server.clone()), login, address.database, pushed).await
    }

    async fn over<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        stream: S,
        server: Option<Server>,
        login: &Login,
        database: i64,
        pushed: Option<Pushed>,
    ) -> Result<Self, Failure> {
        let desk = Arc::new(Desk::default());
        let work = AbortOnDropHandle::new(tokio::spawn(Traffic::new(stream, Arc::clone(&desk), pushed).run()));
        let gathering = AbortOnDropHandle::new(tokio::spawn(Arc::clone(&desk).gather()));
        let connection = Self { asker: Asker(desk), server, work, _gathering: gathering };
        connection.ask(greeting(login)).await?;
        if database != 0 {
            connection.ask(Command::new("SELECT", &[&database.to_string()])).await?;
        }
        Ok(connection)
    }

    /// Whoever wants to ask here, also while others do. It does not keep the connection.
    pub(super) fn asker(&self) -> Asker {
        self.asker.clone()
    }

    /// Asks once.
    pub(super) async fn ask(&self, command: Command) -> Result<Reply, Failure> {
        self.asker().ask(command, Instant::now() + CONNECT_WITHIN).await
    }

    /// Returns when the connection has broken, and says why.
    pub(super) async fn broken(&mut self) -> Failure {
        // Fails when the runtime ends, and then nobody waits.
        (&mut self.work).await.ok();
        self.asker.0.why()
    }
}

/// See [`Connection::asker`].
#[derive(Clone)]
pub(super) struct Asker(Arc<Desk>);

impl Asker {
    /// Asks, and waits for the answer. What is dropped, or late, before it was sent is never sent.
    pub(super) async fn ask(self, command: Command, until: Instant) -> Result<Reply, Failure> {
        self.0.ask(command, Expected::Reply, until).await
    }

    /// Subscribes a channel, or ends its subscription; returns when Redis has said so.
    pub(super) async fn channel(self, verb: &'static str, channel: &str, until: Instant) -> Result<(), Failure> {
        let expected = Expected::Told { verb, channel: channel.to_owned() };
        self.0.ask(Command::new(verb, &[channel]), expected, until).await.map(drop)
    }
}

/// Asks for the third version of the protocol, in which what comes unasked is marked, and says who asks.
fn greeting(login: &Login) -> Command {
    let greeting = Command::new("HELLO", &["3"]);
    let Login { username, password } = login;
    let Some(password) = password else { return greeting };
    greeting.word("AUTH").word(username.as_deref().unwrap_or("default")).word(password)
}

async fn within<T>(step: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::time::timeout(CONNECT_WITHIN, step).await.unwrap_or(Err(Failure::Late))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    /// A connection for subscriptions and its other end, with what came unasked.
    async fn connected() -> (Connection, DuplexStream, Arc<Mutex<Vec<Reply>>>) {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        let came = Arc::new(Mutex::new(Vec::new()));
        let note = Arc::clone(&came);
        let pushed: Pushed = Arc::new(move |reply: &Reply| note.lock().expect("no panic").push(reply.clone()));
        let login = Login::default();
        let (connection, ()) = tokio::join!(Connection::over(ours, None, &login, 0, Some(pushed)), async {
            assert!(theirs.read(&mut [0; 1024]).await.expect("a greeting") > 0);
            theirs.write_all(b"%0\r\n").await.expect("an open pipe");
        });
        (connection.expect("greeted"), theirs, came)
    }

    fn channel(connection: &Connection, verb: &'static str) -> impl Future<Output = Result<(), Failure>> + use<> {
        connection.asker().channel(verb, "a", Instant::now() + CONNECT_WITHIN)
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
            ("SUNSUBSCRIBE", told("ssubscribe", "a"), Err(Failure::Lost(Excess::Unasked.to_string()))),
            ("SUBSCRIBE", "$1\r\na\r\n".to_owned(), Err(Failure::Lost(Excess::Unasked.to_string()))),
            ("SUBSCRIBE", "+OK\r\n".to_owned(), Err(Failure::Lost(Excess::Unasked.to_string()))),
        ] {
            let (mut connection, mut theirs, _) = connected().await;
            let (answered, ()) = tokio::join!(channel(&connection, verb), async {
                assert!(theirs.read(&mut [0; 1024]).await.expect("a question") > 0);
                theirs.write_all(answer.as_bytes()).await.expect("an open pipe");
            });
            assert_eq!(answered, expected, "{verb} {answer:?}");
            let stands = tokio::time::timeout(Duration::from_millis(50), connection.broken()).await.is_err();
            assert_eq!(stands, !matches!(expected, Err(Failure::Lost(_))), "{verb} {answer:?}");
        }
    }

    /// A master says this by itself when a slot leaves it, and it answers no question but its own.
    #[tokio::test]
    async fn the_end_of_a_sharded_subscription_needs_no_question() {
        let (connection, mut theirs, came) = connected().await;
        let gone = told("sunsubscribe", "a");
        theirs.write_all(gone.as_bytes()).await.expect("an open pipe");
        let (answered, ()) = tokio::join!(channel(&connection, "SSUBSCRIBE"), async {
            let answers = format!("{gone}{}", told("ssubscribe", "a"));
            assert!(theirs.read(&mut [0; 1024]).await.expect("a question") > 0);
            theirs.write_all(answers.as_bytes()).await.expect("an open pipe");
        });
        assert_eq!(answered, Ok(()));
        let gone = Reply::of(gone).expect("a reply");
        assert_eq!(*came.lock().expect("no panic"), [gone.clone(), gone]);
    }

    #[test]
    fn a_greeting_says_who_asks() {
        let login = |username: Option<&str>, password: Option<&str>| {
            let login = Login { username: username.map(str::to_owned), password: password.map(str::to_owned) };
            let mut out = Vec::new();
            greeting(&login).write(&mut out);
            String::from_utf8_lossy(&out).into_owned()
        };
        assert_eq!(login(None, None), "*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n");
        let words = |text: String| text.lines().skip(2).step_by(2).map(str::to_owned).collect::<Vec<_>>().join(" ");
        assert_eq!(words(login(None, Some("secret"))), "HELLO 3 AUTH default secret");
        assert_eq!(words(login(Some("me"), Some("secret"))), "HELLO 3 AUTH me secret");
    }

    #[test]
    fn a_log_line_is_one_line() {
        assert_eq!(line("ERR a\r\nb\u{1b}[31m"), "ERR a  b [31m");
        assert_eq!(line(&"x".repeat(1 << 20)).len(), WORDS_MAX);
    }
}
