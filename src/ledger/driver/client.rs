//! A connection that is made again whenever it breaks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::address::{Address, Server};
use super::command::Command;
use super::connection::{Asker, Connection, Failure, Pushed};
use super::reply::Reply;

/// How long after a connection could not be made the next one is tried: doubled each time, up to the second. One that
/// stood for a shorter time than that is as good as none.
const AGAIN_AFTER: Duration = Duration::from_millis(50);
const AGAIN_AFTER_AT_MOST: Duration = Duration::from_millis(500);

/// Questions that may wait at once, for a connection or for an answer. One more fails without waiting.
pub(super) const QUESTIONS_MAX: usize = 10_000;

/// A connection that stands.
#[derive(Clone)]
pub(super) struct Live {
    asker: Asker,
    /// Where it leads, where that has a name.
    server: Option<Server>,
    /// Which one it is, counted from one.
    pub(super) number: u64,
}

/// What a client tells whoever made it.
pub(super) enum Told<'a> {
    /// A connection stands. Nothing is asked on it before this is told.
    Up(Option<&'a Server>),
    /// It broke, or none could be made.
    Down(&'a Failure),
}

/// Commands, each on the connection that stands then. A command is sent at most once: whether one that failed was done
/// is unknown, and whoever asked decides whether to ask again.
pub(super) struct Client {
    live: watch::Receiver<Option<Live>>,
    timeout: Duration,
    anew: Arc<Notify>,
    questions: AtomicUsize,
}

/// One question that waits.
struct Turn<'a>(&'a AtomicUsize);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Client {
    /// Connects in the background, and anew when the connection breaks, until `stop`.
    pub(super) fn start(
        address: Arc<Address>,
        timeout: Duration,
        pushed: Option<Pushed>,
        told: impl FnMut(Told<'_>) + Send + 'static,
        stop: CancellationToken,
    ) -> Self {
        let (sender, live) = watch::channel(None);
        let anew = Arc::new(Notify::new());
        let asked = Arc::clone(&anew);
        tokio::spawn(async move {
            stop.run_until_cancelled(keep(&address, pushed, told, &asked, &sender)).await;
            sender.send_replace(None);
        });
        Self { live, timeout, anew, questions: AtomicUsize::new(0) }
    }

    /// Asks on the connection that stands, or waits for one; both together no longer than the client's limit.
    pub(super) async fn ask(&self, command: Command) -> Result<Reply, Failure> {
        let _turn = self.turn()?;
        let until = Instant::now() + self.timeout;
        let asker = self.live(until, |live| live.asker.clone()).await?;
        asker.ask(command, until).await
    }

    /// Subscribes a channel, or ends its subscription, as [`Self::ask`] asks.
    pub(super) async fn channel(&self, verb: &'static str, channel: &str) -> Result<(), Failure> {
        let _turn = self.turn()?;
        let until = Instant::now() + self.timeout;
        let asker = self.live(until, |live| live.asker.clone()).await?;
        asker.channel(verb, channel, until).await
    }

    fn turn(&self) -> Result<Turn<'_>, Failure> {
        let turn = Turn(&self.questions);
        if self.questions.fetch_add(1, Ordering::Relaxed) < QUESTIONS_MAX {
            return Ok(turn);
        }
        Err(Failure::Lost("too many calls wait for Redis".to_owned()))
    }

    /// Which connection stands, or the next one.
    pub(super) async fn connected(&self) -> Result<u64, Failure> {
        self.live(Instant::now() + self.timeout, |live| live.number).await
    }

    async fn live<T>(&self, until: Instant, part: impl Fn(&Live) -> T) -> Result<T, Failure> {
        if let Some(live) = &*self.live.borrow() {
            return Ok(part(live));
        }
        let mut live = self.live.clone();
        let found = tokio::time::timeout_at(until, live.wait_for(Option::is_some)).await;
        let Ok(found) = found else { return Err(Failure::Unconnected) };
        let found = found.ok().and_then(|live| live.as_ref().map(&part));
        found.ok_or_else(|| Failure::Lost("the client was closed".to_owned()))
    }

    /// Where the connection leads that stands.
    pub(super) fn server(&self) -> Option<Server> {
        self.live.borrow().as_ref().and_then(|live| live.server.clone())
    }

    /// Which connection stands; `None` when none does.
    pub(super) fn number(&self) -> Option<u64> {
        self.live.borrow().as_ref().map(|live| live.number)
    }

    /// Says when connections come and go.
    pub(super) fn watch(&self) -> watch::Receiver<Option<Live>> {
        self.live.clone()
    }

    /// Gives the connection up for a new one. One that is being made already is left alone.
    pub(super) fn reconnect(&self) {
        self.anew.notify_waiters();
    }
}

async fn keep(
    address: &Address,
    pushed: Option<Pushed>,
    mut told: impl FnMut(Told<'_>) + Send,
    anew: &Notify,
    live: &watch::Sender<Option<Live>>,
) {
    let mut number = 0;
    let mut wait = AGAIN_AFTER;
    loop {
        match Connection::open(address, pushed.clone()).await {
            Ok(mut connection) => {
                number += 1;
                let since = Instant::now();
                let given_up = anew.notified();
                told(Told::Up(connection.server.as_ref()));
                let asker = connection.asker();
                live.send_replace(Some(Live { asker, server: connection.server.clone(), number }));
                let why = tokio::select! {
                    why = connection.broken() => why,
                    () = given_up => Failure::Lost("the connection was given up".to_owned()),
                };
                live.send_replace(None);
                told(Told::Down(&why));
                if since.elapsed() > AGAIN_AFTER_AT_MOST {
                    wait = AGAIN_AFTER;
                    continue;
                }
            }
            Err(failure) => told(Told::Down(&failure)),
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(AGAIN_AFTER_AT_MOST);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::path::PathBuf;
    use std::task::Poll;

    use futures_util::future::join_all;
    use tempfile::TempDir;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{UnixListener, UnixStream};
    use tokio::sync::mpsc;

    use super::*;
    use crate::ledger::driver::address::Place;
    use crate::ledger::driver::measure::Excess;

    const SOON: Duration = Duration::from_secs(5);

    /// A client of a server that is not Redis: each connection, greeted, comes out of the receiver.
    struct Stage {
        client: Client,
        greeted: mpsc::UnboundedReceiver<UnixStream>,
        /// Why connections ended.
        ends: mpsc::UnboundedReceiver<String>,
        stop: CancellationToken,
        _folder: TempDir,
    }

    impl Stage {
        fn new(timeout: Duration) -> Self {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let socket = folder.path().join("socket");
            let listener = UnixListener::bind(&socket).expect("a socket");
            let (sender, greeted) = mpsc::unbounded_channel();
            tokio::spawn(async move {
                while let Ok((mut stream, _)) = listener.accept().await {
                    let mut greeting = [0; 1024];
                    let read = stream.read(&mut greeting).await.expect("a greeting");
                    assert!(greeting[..read].windows(5).any(|word| word == b"HELLO"));
                    stream.write_all(b"%0\r\n").await.expect("an open connection");
                    // Fails when the test is over.
                    sender.send(stream).ok();
                }
            });
            let (told, ends) = mpsc::unbounded_channel();
            let told = move |end: Told<'_>| {
                if let Told::Down(failure) = end {
                    told.send(failure.text().to_owned()).ok();
                }
            };
            let stop = CancellationToken::new();
            let client = start(socket, timeout, told, &stop);
            Self { client, greeted, ends, stop, _folder: folder }
        }

        async fn connection(&mut self) -> UnixStream {
            tokio::time::timeout(SOON, self.greeted.recv()).await.expect("a connection in time").expect("a server")
        }

        async fn end(&mut self) -> String {
            tokio::time::timeout(SOON, self.ends.recv()).await.expect("an end in time").expect("a client")
        }
    }

    impl Drop for Stage {
        fn drop(&mut self) {
            self.stop.cancel();
        }
    }

    fn start(
        socket: PathBuf,
        timeout: Duration,
        told: impl FnMut(Told<'_>) + Send + 'static,
        stop: &CancellationToken,
    ) -> Client {
        let address = Address::read("unix:/nowhere", None).expect("an address");
        Client::start(Arc::new(Address { place: Place::Unix(socket), ..address }), timeout, None, told, stop.clone())
    }

    fn said(text: &'static str) -> Reply {
        Reply::of(text).expect("a reply")
    }

    #[tokio::test]
    async fn one_question_too_many_fails_without_waiting() {
        let stop = CancellationToken::new();
        let client = start(PathBuf::from("/nowhere"), Duration::from_millis(100), |_| {}, &stop);
        let ping = Command::new("PING", &[]);
        let answers = join_all((0..=QUESTIONS_MAX).map(|_| client.ask(ping.clone()))).await;
        let late = answers.iter().filter(|answer| **answer == Err(Failure::Unconnected)).count();
        assert_eq!(late, QUESTIONS_MAX);
        assert!(matches!(answers.last(), Some(Err(Failure::Lost(_)))), "{:?}", answers.last());
        assert_eq!(client.ask(ping.clone()).await, Err(Failure::Unconnected));
        stop.cancel();
    }

    /// The server takes the question and hangs up: whoever asked learns so at once, and the next connection brings no
    /// second copy.
    #[tokio::test]
    async fn a_question_is_sent_once() {
        let mut stage = Stage::new(SOON);
        let mut first = stage.connection().await;
        let script = Command::new("EVAL", &["return 1", "0"]);
        let (answer, ()) = tokio::join!(stage.client.ask(script), async {
            let mut question = [0; 1024];
            assert!(first.read(&mut question).await.expect("a question") > 0);
            drop(first);
        });
        assert!(matches!(answer, Err(Failure::Lost(_))), "{answer:?}");
        assert_eq!(stage.end().await, "Redis closed the connection");
        let mut second = stage.connection().await;
        let ping = Command::new("PING", &[]);
        let (answer, question) = tokio::join!(stage.client.ask(ping.clone()), async {
            let mut question = [0; 1024];
            let read = second.read(&mut question).await.expect("a question");
            second.write_all(b"+PONG\r\n").await.expect("an open connection");
            String::from_utf8_lossy(&question[..read]).into_owned()
        });
        assert_eq!((answer, question.as_str()), (Ok(said("+PONG\r\n")), "*1\r\n$4\r\nPING\r\n"));
    }

    /// The server reads nothing, a long question stands in the way, and the one behind it waits too long: it is not sent
    /// when the way is free again.
    #[tokio::test]
    async fn a_question_that_was_given_up_is_never_sent() {
        let mut stage = Stage::new(Duration::from_millis(200));
        let mut connection = stage.connection().await;
        let long = Command::new("PING", &[&"x".repeat(8 << 20)]);
        let (late, last) = (Command::new("LATE", &[]), Command::new("LAST", &[]));
        let (first, second) = tokio::join!(biased; stage.client.ask(long), stage.client.ask(late));
        assert_eq!((first, second), (Err(Failure::Late), Err(Failure::Late)));
        let (last, read) = tokio::join!(stage.client.ask(last), async {
            let mut read = Vec::new();
            while !read.ends_with(b"LAST\r\n") {
                connection.read_buf(&mut read).await.expect("an open connection");
            }
            connection.write_all(b"+PONG\r\n+OK\r\n").await.expect("an open connection");
            read
        });
        assert_eq!(last, Ok(said("+OK\r\n")));
        assert!(!read.windows(4).any(|word| word == b"LATE"));
    }

    /// One timer is for all questions; each has its own limit all the same, and an answer that comes later is nobody's.
    #[tokio::test]
    async fn each_question_has_its_own_limit() {
        let limit = Duration::from_millis(200);
        let mut stage = Stage::new(limit);
        let mut connection = stage.connection().await;
        let question = async |after: Duration, name: &str| {
            tokio::time::sleep(after).await;
            let asked = Instant::now();
            (stage.client.ask(Command::new(name, &[])).await, asked.elapsed())
        };
        let (first, second, third) = tokio::join!(
            question(Duration::ZERO, "FIRST"),
            question(limit / 2, "SECOND"),
            question(limit * 2, "THIRD"),
        );
        for (answer, took) in [first, second, third] {
            assert_eq!(answer, Err(Failure::Late));
            assert!(took >= limit && took < limit * 3, "{took:?}");
        }
        let (answer, ()) = tokio::join!(stage.client.ask(Command::new("FOURTH", &[])), async {
            let mut read = Vec::new();
            while !read.ends_with(b"FOURTH\r\n") {
                connection.read_buf(&mut read).await.expect("an open connection");
            }
            connection.write_all(b"+1\r\n+2\r\n+3\r\n+4\r\n").await.expect("an open connection");
        });
        assert_eq!(answer, Ok(said("+4\r\n")));
    }

    /// Whoever asks in the same turn of the runtime shares a write with the others.
    #[tokio::test]
    async fn what_is_asked_together_is_sent_together() {
        let mut stage = Stage::new(SOON);
        let mut connection = stage.connection().await;
        let questions = join_all((0..50).map(|_| stage.client.ask(Command::new("PING", &[]))));
        let (answers, read) = tokio::join!(questions, async {
            let mut read = vec![0; 4096];
            let length = connection.read(&mut read).await.expect("an open connection");
            connection.write_all("+PONG\r\n".repeat(50).as_bytes()).await.expect("an open connection");
            length
        });
        assert_eq!(read, 50 * "*1\r\n$4\r\nPING\r\n".len());
        assert!(answers.iter().all(|answer| *answer == Ok(said("+PONG\r\n"))), "{answers:?}");
    }

    /// Sixteen do not wait until everybody has had a turn.
    #[test]
    fn what_is_enough_at_once_is_sent_at_once() {
        // Each time it is ready again at once, behind all others who are.
        async fn stand_in_line() {
            let mut has_stood = false;
            std::future::poll_fn(|cx| {
                cx.waker().wake_by_ref();
                if std::mem::replace(&mut has_stood, true) { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        }
        // One turn is as long as there is anybody who is ready.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().event_interval(u32::MAX).build();
        runtime.expect("a runtime").block_on(async {
            for (count, is_enough) in [(15, false), (16, true)] {
                let mut stage = Stage::new(SOON);
                let mut connection = stage.connection().await.into_std().expect("a socket");
                stage.client.connected().await.expect("a connection");
                let asked = tokio::spawn(async move {
                    let questions = (0..count).map(|_| stage.client.ask(Command::new("PING", &[])));
                    let mut questions = std::pin::pin!(join_all(questions));
                    for _ in 0..10 {
                        assert!(futures_util::poll!(questions.as_mut()).is_pending());
                        stand_in_line().await;
                    }
                    connection.read(&mut [0; 4096]).is_ok()
                });
                assert_eq!(asked.await.expect("no panic"), is_enough, "{count}");
            }
        });
    }

    #[tokio::test]
    async fn an_answer_to_nothing_ends_the_connection() {
        let mut stage = Stage::new(SOON);
        for unasked in ["+OK\r\n", ">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nt\r\n"] {
            let mut connection = stage.connection().await;
            connection.write_all(unasked.as_bytes()).await.expect("an open connection");
            assert_eq!(stage.end().await, Excess::Unasked.to_string(), "{unasked}");
        }
        stage.connection().await;
    }

    /// A server that hangs up after each greeting is asked less and less often.
    #[tokio::test]
    async fn a_connection_that_breaks_at_once_is_as_good_as_none() {
        let mut stage = Stage::new(SOON);
        let until = Instant::now() + Duration::from_secs(2);
        let mut connections = 0;
        while tokio::time::timeout_at(until, stage.greeted.recv()).await.is_ok() {
            connections += 1;
        }
        assert!((3..9).contains(&connections), "{connections} in two seconds");
    }

    /// One that is given up is replaced; a second wish for that, while none stands, costs the new one nothing.
    #[tokio::test]
    async fn a_connection_that_is_given_up_makes_room_for_one_other() {
        let mut stage = Stage::new(SOON);
        let first = stage.connection().await;
        stage.client.connected().await.expect("a connection");
        stage.client.reconnect();
        stage.client.reconnect();
        assert_eq!(stage.end().await, "the connection was given up");
        stage.client.reconnect();
        let second = stage.connection().await;
        assert_eq!(stage.client.connected().await, Ok(2));
        let third = tokio::time::timeout(Duration::from_millis(300), stage.greeted.recv()).await;
        assert!(third.is_err(), "a third connection");
        drop((first, second));
    }
}
