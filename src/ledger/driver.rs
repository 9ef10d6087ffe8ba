//! The one place that knows how Redis is spoken to.
//!
//! The protocol is small, and what matters here is what clients of it leave open: a limit for every wait and for every
//! answer, no replay of commands whose fate is unknown, noticing a connection that is up but answers nothing,
//! resubscribing, and noticing a subscription that is up but delivers nothing.
//!
//! A cluster is a [`Link`] for each master and a table of slots: one dead master stops no call to the living ones.

mod address;
mod client;
mod cluster;
mod command;
mod connection;
mod link;
mod measure;
mod reply;
mod sentinel;
mod traffic;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::address::{Address, Place};
use self::cluster::Route;
use self::command::Command;
use self::connection::Failure;
use self::link::Link;
pub(super) use self::measure::LINE_END;
pub(super) use self::reply::{List, Reply, Value};
use super::call::Call;
use super::redis::{RedisClock, RedisSettingError};
use super::reply::unexpected;
use super::script::{Script, SteppedScripts};
use super::{LedgerError, key};
use crate::{metrics, telemetry};

/// How often a call follows a key to another master, and how long it waits for the cluster to say which.
const MOVES_MAX: usize = 3;
const MOVED_WAIT: Duration = Duration::from_millis(500);

/// How many bytes all messages that wait to be read may have: 16,384 of two thousand each, or 128 of the longest.
const MESSAGES_BYTES_MAX: usize = 32 * 1024 * 1024;

/// What a subscription delivers.
pub(super) enum Delivery {
    /// A channel's message, and the room that it takes until it was read.
    Message { channel: String, text: String, room: OwnedSemaphorePermit },
    /// Messages may have been missed.
    Gap,
}

/// What the driver is made with.
pub(super) struct DriverOptions {
    /// As [`super::RedisOptions::url`].
    pub url: String,
    /// As [`super::RedisOptions::ca_file`].
    pub ca_file: Option<PathBuf>,
    /// The limit of one round trip.
    pub timeout: Duration,
    /// Where scripts read the time.
    pub clock: RedisClock,
    /// This replica's own channel.
    pub probe: String,
    /// Whether a channel's message says nothing that is not known here: it is not delivered. It must not wait.
    pub is_known: IsKnown,
}

/// See [`DriverOptions::is_known`]: takes the channel and the text.
type IsKnown = Box<dyn Fn(&str, &str) -> bool + Send + Sync>;

/// Commands, scripts and subscriptions, each on the server that it belongs to.
pub(super) struct Driver {
    address: Arc<Address>,
    timeout: Duration,
    /// The scripts' texts on [`RedisClock::Stepped`].
    stepped: Option<SteppedScripts>,
    probe: String,
    is_known: IsKnown,
    /// Whether this is a cluster: changes go by sharded pub/sub there.
    clustered: bool,
    /// Which server has which key. Changes on a cluster only.
    route: watch::Sender<Arc<Route>>,
    /// Says that `route` may be out of date.
    doubt: Notify,
    /// Connections for commands made so far, to whichever server.
    connections: AtomicU64,
    /// Every channel that somebody wants.
    channels: Mutex<HashSet<String>>,
    deliveries: mpsc::Sender<Delivery>,
    /// One permit for each byte that messages may still take.
    room: Arc<Semaphore>,
    stop: CancellationToken,
}

/// The connection that calls about a key used at some moment.
pub(super) struct Witness {
    link: Arc<Link>,
    key: String,
    connection: u64,
}

/// See [`super::fuzzing::streams`].
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn replay(data: &[u8], length: usize, questions: usize) {
    fn walk(value: Value<'_>) -> usize {
        match value {
            Value::Text(_) | Value::Error(_) | Value::Nothing => 1,
            Value::List(parts) | Value::Push(parts) => 1 + parts.map(walk).sum::<usize>(),
        }
    }
    let whole = traffic::replay(data, usize::MAX, questions);
    assert_eq!(traffic::replay(data, length, questions), whole, "the pieces make a difference");
    let (answers, pushes, _) = whole;
    answers.into_iter().flatten().flatten().chain(pushes).for_each(|reply| assert!(walk(reply.value()) > 0));
}

/// The lower-case hexadecimal SHA-1 of a text.
pub(super) fn sha1(text: &str) -> String {
    sha1_smol::Sha1::from(text).digest().to_string()
}

impl Driver {
    /// Connects in the background: calls made before the connection stands wait for it, at most `timeout`. What
    /// subscriptions deliver comes out of the second half.
    ///
    /// # Errors
    /// When the URL is not one, or the file of the CA cannot be used.
    pub(super) fn connect(options: DriverOptions) -> Result<(Arc<Self>, mpsc::Receiver<Delivery>), RedisSettingError> {
        let address = Arc::new(Address::read(&options.url, options.ca_file)?);
        let stepped = match options.clock {
            RedisClock::Server => None,
            RedisClock::Stepped { scripts } => {
                let unread = |error: std::io::Error| RedisSettingError::Scripts(error.to_string());
                Some(SteppedScripts::read(scripts).map_err(unread)?)
            }
        };
        let (deliveries, receiver) = mpsc::channel(16_384);
        let driver = Arc::new(Self {
            address: Arc::clone(&address),
            timeout: options.timeout,
            stepped,
            probe: options.probe,
            is_known: options.is_known,
            clustered: matches!(address.place, Place::Cluster(_)),
            route: watch::Sender::new(Arc::default()),
            doubt: Notify::new(),
            connections: AtomicU64::new(0),
            channels: Mutex::new(HashSet::from([key::EXPIRED_CHANNEL.to_owned()])),
            deliveries,
            room: Arc::new(Semaphore::new(MESSAGES_BYTES_MAX)),
            stop: CancellationToken::new(),
        });
        if let Place::Cluster(seeds) = &address.place {
            tokio::spawn(cluster::follow(Arc::clone(&driver), seeds.clone()));
        } else {
            let link = Link::start(&driver, None);
            driver.route.send_replace(Arc::new(Route::one(Arc::clone(&link))));
            if let Place::Sentinel { sentinels, first, .. } = &address.place {
                tokio::spawn(sentinel::follow(Arc::clone(&driver), link, sentinels.clone(), Arc::clone(first)));
            }
        }
        Ok((driver, receiver))
    }

    /// Runs a script by its SHA; sends its text when Redis does not have it.
    pub(super) async fn eval(&self, script: &'static Script, call: Call) -> Result<Reply, LedgerError> {
        let started = Instant::now();
        let call = &call.close();
        debug_assert!(script.keys.admits(call.keys), "{}: {} keys", script.name, call.keys);
        debug_assert!(script.args.admits(call.args), "{}: {} arguments", script.name, call.args);
        let span = telemetry::script(script.name);
        let (text, sha) = match &self.stepped {
            Some(stepped) => stepped.named(script),
            None if self.clustered => script.on_cluster(),
            None => (script.source(), script.sha()),
        };
        let answer = self
            .call(script.name, call.first_key(), |link| async move {
                match link.commands.ask(Command::script("EVALSHA", sha, call)).await {
                    Err(Failure::Refused(words)) if words.starts_with("NOSCRIPT") => {
                        link.commands.ask(Command::script("EVAL", text, call)).await
                    }
                    answer => answer,
                }
            })
            .await;
        let took = started.elapsed();
        metrics::LEDGER_CALL.observe(&[script.name], took);
        tracing::debug!(
            script = script.name,
            ms = took.as_secs_f64() * 1000.0,
            answered = answer.is_ok(),
            "ran a script"
        );
        if let Some(span) = span {
            span.ends(answer.as_ref().map(Reply::word).map_err(|error| error.kind().as_str()));
        }
        answer
    }

    /// The members of a sorted set with the lowest scores, at most `limit`.
    pub(super) async fn oldest(&self, key: &str, limit: usize) -> Result<Vec<String>, LedgerError> {
        self.members(key, limit, None).await
    }

    /// The members of a sorted set with the highest scores, at most `limit`.
    pub(super) async fn newest(&self, key: &str, limit: usize) -> Result<Vec<String>, LedgerError> {
        self.members(key, limit, Some("REV")).await
    }

    async fn members(&self, key: &str, limit: usize, order: Option<&str>) -> Result<Vec<String>, LedgerError> {
        let last = limit.saturating_sub(1).to_string();
        let args: Vec<_> = [key, "0", &last].into_iter().chain(order).collect();
        texts("members", &self.ask("members", key, Command::new("ZRANGE", &args)).await?)
    }

    /// The fields of a hash; none when there is no such key.
    pub(super) async fn fields(&self, key: &str) -> Result<Vec<String>, LedgerError> {
        texts("fields", &self.ask("fields", key, Command::new("HKEYS", &[key])).await?)
    }

    /// Remembers the connection of a key, to be taken before something is written that [`Self::replicated`] waits for.
    pub(super) async fn witness(&self, key: &str) -> Result<Witness, LedgerError> {
        let link = self.link(key).await?;
        let connection = link.commands.connected().await.map_err(|failure| link.error("wait", &failure))?;
        Ok(Witness { link, key: key.to_owned(), connection })
    }

    /// Waits until so many Redis replicas have everything that was written about the witness's key, at most `within`;
    /// how many have. Commands behind it on the connection wait too.
    ///
    /// Redis counts what *this connection* wrote: asked on another one, perhaps of a master that never had the write,
    /// it would count at once. So a connection that is not the witness's any more is an error.
    pub(super) async fn replicated(
        &self,
        witness: Witness,
        replicas: u32,
        within: Duration,
    ) -> Result<u32, LedgerError> {
        let answer = witness.link.wait(replicas, within).await;
        let reply = witness.link.judge(self, "wait", answer)?;
        let same = witness.link.commands.number() == Some(witness.connection)
            && self.route.borrow().link(&witness.key).is_some_and(|link| Arc::ptr_eq(link, &witness.link));
        if !same {
            return Err(LedgerError::Disconnected(
                "the connection changed before Redis replicas had the lock".to_owned(),
            ));
        }
        reply.value().text().and_then(|have| have.parse().ok()).ok_or_else(|| unexpected("wait", &reply))
    }

    /// Connections for commands made so far: after a new one, Redis may be another one or have lost something.
    pub(super) fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Tells a channel that is not an event's.
    pub(super) async fn publish(&self, channel: &str, text: &str) -> Result<(), LedgerError> {
        self.ask("publish", channel, Command::new("PUBLISH", &[channel, text])).await.map(drop)
    }

    /// One round trip to the server that has a key.
    pub(super) async fn ping(&self, key: &str) -> Result<(), LedgerError> {
        self.ask("ping", key, Command::new("PING", &[])).await.map(drop)
    }

    /// Starts to receive a channel; returns when Redis has said so.
    pub(super) async fn subscribe(&self, channel: String) -> Result<(), LedgerError> {
        self.channels().insert(channel.clone());
        for _ in 0..MOVES_MAX {
            let link = self.link(&channel).await?;
            match link.subscribe(self, std::slice::from_ref(&channel)).await {
                Err(failure) if has_moved(&failure) => self.rerouted(&channel, &link).await,
                answer => return answer.map_err(|failure| link.error("subscribe", &failure)),
            }
        }
        Err(moving())
    }

    /// Whether somebody wants a channel.
    pub(super) fn wants(&self, channel: &str) -> bool {
        self.channels().contains(channel)
    }

    /// Stops receiving a channel.
    pub(super) async fn unsubscribe(&self, channel: String) -> Result<(), LedgerError> {
        self.channels().remove(&channel);
        let link = self.link(&channel).await?;
        link.unsubscribe(self, &channel).await.map_err(|failure| link.error("unsubscribe", &failure))
    }

    /// Ends all connections; pending calls fail.
    pub(super) fn close(&self) {
        self.stop.cancel();
        for link in &self.route.borrow().links {
            link.close();
        }
    }

    /// One command to the server that has a key.
    async fn ask(&self, name: &'static str, key: &str, command: Command) -> Result<Reply, LedgerError> {
        let command = &command;
        self.call(name, key, |link| async move { link.commands.ask(command.clone()).await }).await
    }

    /// Runs a call on the server that has a key. A server that says the key is elsewhere has done nothing, so another
    /// one is asked.
    async fn call<F>(
        &self,
        name: &'static str,
        key: &str,
        call: impl Fn(Arc<Link>) -> F + Send,
    ) -> Result<Reply, LedgerError>
    where
        F: Future<Output = Result<Reply, Failure>> + Send,
    {
        for _ in 0..MOVES_MAX {
            let link = self.link(key).await?;
            match call(Arc::clone(&link)).await {
                Err(failure) if has_moved(&failure) => self.rerouted(key, &link).await,
                answer => return link.judge(self, name, answer),
            }
        }
        metrics::LEDGER_ERRORS.count(&[name, moving().kind().as_str()]);
        Err(moving())
    }

    /// The server that has a key. Waits only before a cluster was seen for the first time, and while none has the key.
    async fn link(&self, key: &str) -> Result<Arc<Link>, LedgerError> {
        if let Some(link) = self.route.borrow().link(key) {
            return Ok(Arc::clone(link));
        }
        let mut route = self.route.subscribe();
        let found = tokio::time::timeout(self.timeout, route.wait_for(|route| route.link(key).is_some())).await;
        let link = found.ok().and_then(|route| route.ok()?.link(key).cloned());
        link.ok_or(LedgerError::Timeout(self.timeout))
    }

    /// Asks for a new look at the cluster and waits until it shows that a key is on another server than it was.
    async fn rerouted(&self, key: &str, was: &Arc<Link>) {
        self.doubt.notify_one();
        let mut route = self.route.subscribe();
        let elsewhere = route.wait_for(|route| route.link(key).is_none_or(|link| !Arc::ptr_eq(link, was)));
        // Without one in time the call goes to the same server once more, and fails if nothing changed there.
        tokio::time::timeout(MOVED_WAIT, elsewhere).await.ok();
    }

    fn channels(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a channel is sharded: only the servers of its slot carry it.
    fn is_sharded(&self, channel: &str) -> bool {
        self.clustered && key::is_event_channel(channel)
    }
}

/// A reply that is a list of texts.
fn texts(name: &'static str, reply: &Reply) -> Result<Vec<String>, LedgerError> {
    let text = |part: Value<'_>| part.text().map(str::to_owned);
    let texts = reply.value().parts().and_then(|parts| parts.map(text).collect());
    texts.ok_or_else(|| unexpected(name, reply))
}

fn has_moved(failure: &Failure) -> bool {
    failure.text().starts_with("MOVED ")
}

fn moving() -> LedgerError {
    LedgerError::Disconnected("the key's slot is moving".to_owned())
}
