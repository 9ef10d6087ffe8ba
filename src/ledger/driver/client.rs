//! A connection that is made again whenever it breaks.

use std::sync::Arc;
use std::time::Duration;

use redis::{Cmd, Value};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::address::{Address, Server};
use super::connection::{Asker, Connection, Failure, Pushed};

/// How long after a connection could not be made the next one is tried: doubled each time, up to the second.
const AGAIN_AFTER: Duration = Duration::from_millis(50);
const AGAIN_AFTER_AT_MOST: Duration = Duration::from_millis(500);

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
        Self { live, timeout, anew }
    }

    /// Asks on the connection that stands, or waits for one; both together no longer than the client's limit.
    pub(super) async fn ask(&self, command: &Cmd) -> Result<Value, Failure> {
        let until = Instant::now() + self.timeout;
        let asker = self.live(until, |live| live.asker.clone()).await?;
        limited(until, asker.ask(command)).await
    }

    /// Starts to receive channels; returns when Redis has said so for each.
    pub(super) async fn subscribe(&self, channels: &[String]) -> Result<(), Failure> {
        let until = Instant::now() + self.timeout;
        let asker = self.live(until, |live| live.asker.clone()).await?;
        limited(until, asker.subscribe(channels)).await
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
        let Ok(found) = found else { return Err(Failure::Late) };
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

async fn limited<T>(until: Instant, answer: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::time::timeout_at(until, answer).await.unwrap_or(Err(Failure::Late))
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
                wait = AGAIN_AFTER;
                let given_up = anew.notified();
                told(Told::Up(connection.server.as_ref()));
                let asker = connection.asker();
                live.send_replace(Some(Live { asker, server: connection.server.clone(), number }));
                let why = tokio::select! {
                    () = connection.broken() => "the connection broke",
                    () = given_up => "the connection was given up",
                };
                live.send_replace(None);
                told(Told::Down(&Failure::Lost(why.to_owned())));
            }
            Err(failure) => {
                told(Told::Down(&failure));
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(AGAIN_AFTER_AT_MOST);
            }
        }
    }
}
