//! The Socket.IO gateway: parse, ask the ledger, render.
//!
//! Owns the sockets of this replica, who they belong to and which rooms they are in. Owns no lock: what a socket is told
//! comes from the ledger. Does not know how replicas talk to each other; it is the fan-out's [`Audience`].
//!
//! A socket is a [`session`]: its handshake is checked in [`handshake`], its messages are read and answered in
//! [`wire`] and [`handlers`] by one task ([`actor`]) in the order in which they came, its connection can be closed through its
//! [`mod@line`]. socketioxide opens every session and knows of none but such that poll; the connection of one that is on a
//! WebSocket is [carried](carrier) until it is taken over, read here ([`attend`], [`frame`]) and written to without a
//! detour ([`pipe`], [`packet`]).
//! Nothing here tells a client to stay away (`io server disconnect`): every connection that this service ends is one that
//! the client opens again by itself.

mod actor;
mod attend;
pub mod auth;
mod carrier;
mod compact;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod handlers;
mod handshake;
mod heard;
mod hoard;
mod keep;
mod limits;
mod line;
mod packet;
mod pipe;
mod polls;
mod queue;
mod rooms;
mod session;
mod wire;

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::response::{IntoResponse as _, Response};
use futures_util::future::BoxFuture;
use socketioxide::extract::{SocketRef, TryData};
use socketioxide::handler::ConnectHandler as _;
use socketioxide::{ParserConfig, SocketIo};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service as _;
use tracing::Instrument as _;

use self::auth::TokenVerifier;
use self::compact::compact;
pub use self::handshake::Origins;
use self::handshake::{Guest, Refused};
use self::hoard::Hoard;
use self::keep::Keep;
use self::limits::Seats;
use self::line::Lines;
pub use self::line::{Line, LineStream};
use self::polls::Polls;
use self::rooms::{Here, Rooms};
use self::session::{Callers, WeakSocket};
use self::wire::Auth;
use crate::callers::{Addresses, Quota, Quotas};
use crate::domain::{self, RateLimit, UserId};
use crate::fanout::{Audience, Fanout};
use crate::inventory::Stock;
use crate::ledger::Ledger;
use crate::{metrics, telemetry};

/// The Socket.IO namespace.
const NAMESPACE: &str = "/realtime";

/// Sessions that tell the ledger at the same time that they end; a replica's sockets may all end at once.
const LEAVING_MAX: usize = 64;

/// Sessions that ended while the ledger could not be told for long: some 400 bytes each.
const OWED_MAX: usize = 65_536;

/// Sessions that tell the ledger at the same time that they are here: after an outage all of them do.
const ENTERING_MAX: usize = 64;

/// Before a draining replica moves its first client: load balancers look at readiness about once a second, and a client
/// that is moved before they have looked may be sent back here. At most an eighth of the time for draining.
const DRAIN_NOTICE: Duration = Duration::from_secs(1);

/// Between two clients that a draining replica moves, where there is time: so few come back at once that nobody notices,
/// and a replica with a hundred clients still is empty within seconds.
const DRAIN_GAP: Duration = Duration::from_millis(50);

/// Between two rounds of asking how locks ended, and of counting whose.
const FOLLOW_EVERY: Duration = Duration::from_secs(5);

/// After the time for draining is over: to cut what is left and to say so.
const DRAIN_LAST: Duration = Duration::from_secs(2);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that runs under the mutexes of this module panics half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This machine's time, for messages whose time decides nothing.
fn now() -> domain::Instant {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    domain::Instant::from_ms(since.as_millis().try_into().unwrap_or(u64::MAX))
}

/// How the gateway treats its clients.
#[derive(Debug, Clone)]
pub struct GatewayOptions {
    /// Which pages may connect.
    pub origins: Origins,
    /// From a request to its answer.
    pub request_timeout: Duration,
    /// From a grant to the deadline of the lock.
    pub lock_ttl: Duration,
    /// The shortest time that a lock stands for a user who lets one after the other lapse; `None`: the same for all.
    pub abandoner_ttl: Option<Duration>,
    /// How long before its deadline a lock's owner is warned, as the ledger does it.
    pub expiry_warning: Duration,
    /// What locks have left when the last socket of their user is gone.
    pub disconnect_grace: Duration,
    /// The same when it is gone because this replica drains.
    pub drain_grace: Duration,
    /// Tickets in one lock.
    pub max_per_lock: u32,
    /// Tickets of one event that a user may hold and have confirmed.
    pub max_per_event: Option<u32>,
    /// How often a user may try to lock in one event.
    pub rate: Option<RateLimit>,
    /// The oldest stock that may decide about a lock: [`Stock::age_wanted`].
    pub stock_age_max: Duration,
    /// From the expiry of a token to the end of its connection.
    pub token_grace: Duration,
    /// A client that takes nothing for so long is disconnected.
    pub slow_client: Duration,
    /// Open sockets on this replica.
    pub sockets_max: usize,
    /// Open sockets of one user on this replica.
    pub sockets_per_user_max: usize,
    /// Sockets that one user may open.
    pub user_handshakes: Option<RateLimit>,
    /// Messages that one user may send, over all sockets here.
    pub user_messages: Option<RateLimit>,
    /// What one address may take.
    pub addresses: Arc<Addresses>,
}

impl Default for GatewayOptions {
    /// The defaults of the contract; the bounds on sockets are generous for one process (7 KiB each when idle, on a WebSocket) and one person.
    fn default() -> Self {
        Self {
            origins: Origins::Any,
            request_timeout: Duration::from_secs(2),
            lock_ttl: Duration::from_mins(5),
            abandoner_ttl: None,
            expiry_warning: Duration::from_mins(1),
            disconnect_grace: Duration::from_secs(15),
            drain_grace: Duration::from_mins(1),
            max_per_lock: 10,
            max_per_event: None,
            rate: Some(RateLimit { interval: Duration::from_millis(100), burst: 20 }),
            stock_age_max: Duration::from_secs(20),
            token_grace: Duration::from_secs(25),
            slow_client: Duration::from_secs(15),
            sockets_max: 50_000,
            sockets_per_user_max: 50,
            user_handshakes: None,
            user_messages: None,
            addresses: Addresses::unlimited(),
        }
    }
}

/// What the sockets and the gateway share.
struct Shared {
    options: GatewayOptions,
    verifier: Arc<TokenVerifier>,
    ledger: Arc<dyn Ledger>,
    stock: Arc<Stock>,
    fanout: OnceLock<Arc<Fanout>>,
    io: SocketIo,
    transport: Transport,
    seats: Arc<Seats>,
    users: Arc<Quotas<UserId>>,
    rooms: Rooms,
    keep: Keep,
    hoard: Hoard,
    lines: Lines,
    polls: Polls,
    /// The actors and what they leave to be done.
    tasks: TaskTracker,
    leaving: Semaphore,
    /// Places for sessions that ended long ago without the ledger's knowledge.
    owed: Arc<Semaphore>,
    /// Sessions that may tell the ledger at the same time that they are here.
    entering: Arc<Semaphore>,
    /// Changed by [`Shared::tell_all`] only.
    word: watch::Sender<Word>,
    /// Nobody is taken in any more; sessions go on until their turn to move.
    draining: CancellationToken,
    /// Set before `draining`.
    turns: OnceLock<Turns>,
    /// They finish at once.
    impatient: CancellationToken,
}

/// What all sessions are told. Their actors look at it when they are stirred.
#[derive(Debug, Clone, Copy, Default)]
struct Word {
    /// How often this replica had reason to doubt that it and the ledger know the same: the ledger may have lost the
    /// sessions that were entered into it, or messages to users may have been missed.
    doubts: u64,
    /// How often it was for the first of both reasons.
    losses: u64,
    drain: Drain,
}

/// How far a drain of the replica is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Drain {
    #[default]
    No,
    /// Each session moves in its turn.
    InTurn,
    /// All that are left finish at once.
    AtOnce,
}

/// When a draining replica moves its clients: one after the other, evenly.
struct Turns {
    first: Instant,
    gap: Duration,
    /// How many have a turn.
    count: usize,
    taken: AtomicUsize,
}

impl Turns {
    /// For so many clients, all within `limit`. Two thirds of it are for moving, the rest for what the last were asked.
    fn new(count: usize, limit: Duration, now: Instant) -> Self {
        let shares = u32::try_from(count.max(1)).unwrap_or(u32::MAX);
        let gap = (limit * 2 / 3 / shares).min(DRAIN_GAP);
        Self { first: now + DRAIN_NOTICE.min(limit / 8), gap, count, taken: AtomicUsize::new(0) }
    }

    /// The next one's turn. Who came while the drain began moves with the last.
    fn take(&self) -> Instant {
        let before = self.taken.fetch_add(1, Ordering::Relaxed).min(self.count);
        self.first + self.gap * u32::try_from(before).unwrap_or(u32::MAX)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("options", &self.options).finish_non_exhaustive()
    }
}

/// The HTTP side of socketioxide: one instance, because each holds its own transport sessions.
type Transport = Box<dyn Fn(Request<Body>) -> BoxFuture<'static, Response> + Send + Sync>;

impl Shared {
    /// When a client is to be moved.
    fn turn(&self) -> Instant {
        self.turns.get().map_or_else(Instant::now, Turns::take)
    }

    /// Tells all sessions something.
    fn tell_all(&self, tell: impl FnOnce(&mut Word)) {
        self.word.send_modify(tell);
        self.rooms.stir_all();
    }

    /// Every session enters again: what this replica remembers of its users' locks is handed back, and they are told
    /// what they missed.
    fn doubt(&self) {
        self.tell_all(|word| word.doubts += 1);
    }

    /// The handshake of one socket, before it is connected.
    async fn greet(self: &Arc<Self>, socket: SocketRef, weak: WeakSocket, auth: Auth) -> Result<(), Refused> {
        let parts = socket.req_parts();
        if self.draining.is_cancelled() {
            // The client would not come back after a refusal; after a lost connection it does.
            if let Some(line) = self.lines.find(&socket.id.to_string()) {
                line.close();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            return Err(Refused::Unavailable);
        }
        let limited = |limit: &'static str| {
            metrics::GATEWAY_LIMITED.count(&[limit]);
            Refused::TooManyConnections
        };
        let guest = parts.extensions.get::<Guest>();
        if let Some(guest) = guest {
            if guest.connection.is_surplus {
                return Err(limited("address_connections"));
            }
            // Before the token is looked at: its signature is what costs.
            guest.address.greeting().map_err(|_| limited("address_handshakes"))?;
        }
        let query = parts.uri.query().unwrap_or_default();
        let claims = handshake::check(self, &auth, query, &parts.headers).await?;
        let user = self.users.caller(claims.user).map_err(|_| limited("users"))?;
        if let Some(user) = &user {
            user.greeting().map_err(|_| limited("user_handshakes"))?;
        }
        let seat = self.seats.take(claims.user).map_err(|_| Refused::TooManyConnections)?;
        let socket = weak.0.upgrade().ok_or(Refused::Unavailable)?;
        let callers = Callers { user, address: guest.map(|guest| guest.address.clone()) };
        self.admit(&socket, claims, seat, callers);
        Ok(())
    }
}

/// The Socket.IO side of one replica.
#[derive(Debug, Clone)]
pub struct Gateway {
    shared: Arc<Shared>,
}

impl Gateway {
    /// A gateway that nobody can reach yet: its [`Gateway::routes`] are to be served on connections wrapped by
    /// [`Line::wrap`], and a fan-out is to be [attached](Gateway::attach).
    #[must_use]
    pub fn new(
        options: GatewayOptions,
        verifier: Arc<TokenVerifier>,
        ledger: Arc<dyn Ledger>,
        stock: Arc<Stock>,
    ) -> Self {
        let (service, io) = SocketIo::builder()
            .ping_interval(limits::PING_INTERVAL)
            .ping_timeout(limits::PING_TIMEOUT)
            .connect_timeout(limits::HANDSHAKE_TIMEOUT)
            .max_buffer_size(limits::OUTBOX_LEN_MAX)
            .max_payload(limits::MESSAGE_BYTES_MAX as u64)
            // No message of the contract carries binary data.
            .with_parser(ParserConfig::common().max_incoming_binaries(0))
            .build_svc();
        let transport: Transport = Box::new(move |request| {
            let mut service = service.clone();
            Box::pin(async move { service.call(request).await.unwrap_or_else(|never| match never {}).into_response() })
        });
        let shared = Arc::new_cyclic(|shared: &Weak<Shared>| {
            listen(&io, shared);
            Shared {
                seats: Seats::new(options.sockets_max, options.sockets_per_user_max),
                users: Quotas::new(Quota {
                    connections: None,
                    handshakes: options.user_handshakes,
                    messages: options.user_messages,
                }),
                options,
                verifier,
                ledger,
                stock,
                fanout: OnceLock::new(),
                io,
                transport,
                rooms: Rooms::default(),
                keep: Keep::default(),
                hoard: Hoard::default(),
                lines: Lines::default(),
                polls: Polls::default(),
                tasks: TaskTracker::new(),
                leaving: Semaphore::new(LEAVING_MAX),
                owed: Arc::new(Semaphore::new(OWED_MAX)),
                entering: Arc::new(Semaphore::new(ENTERING_MAX)),
                word: watch::Sender::default(),
                draining: CancellationToken::new(),
                turns: OnceLock::new(),
                impatient: CancellationToken::new(),
            }
        });
        Self { shared }
    }

    /// How the fan-out reaches the sockets.
    #[must_use]
    pub fn audience(&self) -> Arc<dyn Audience> {
        Arc::new(Here(Arc::clone(&self.shared)))
    }

    /// Gives the sockets their news. Until then, sessions wait and nobody can watch an event. Only the first counts.
    pub fn attach(&self, fanout: Arc<Fanout>) {
        self.shared.fanout.set(fanout).ok();
    }

    /// `/socket.io/`. The connection's [`Line`] must be in the extensions of every request.
    pub fn routes(&self) -> Router {
        let serve = {
            let shared = Arc::clone(&self.shared);
            move |request: Request<Body>| (shared.transport)(compact(request))
        };
        Router::new()
            .route("/socket.io/", axum::routing::any(serve))
            .layer(axum::middleware::from_fn_with_state(Arc::clone(&self.shared), handshake::gate))
            .layer(self.shared.options.origins.cors())
    }

    /// Users with an open socket here, and open sockets.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        self.shared.seats.counts()
    }

    /// The ledger may have lost what was entered into it: every session enters again, and what this replica remembers
    /// of its users' locks is handed back. Returns at once; goes on until the ledger has answered.
    pub fn reassure(&self) {
        self.shared.tell_all(|word| {
            word.doubts += 1;
            word.losses += 1;
        });
    }

    /// Learns how locks ended that nobody here heard of, until `stop`.
    pub async fn follow(&self, stop: CancellationToken) {
        let shared = &self.shared;
        let mut rounds = tokio::time::interval(FOLLOW_EVERY);
        loop {
            tokio::select! {
                _ = rounds.tick() => {}
                () = stop.cancelled() => return,
            }
            for id in shared.hoard.overdue() {
                match shared.ledger.find(id).await {
                    Ok(lock) => shared.hoard.found(id, lock.map(|lock| lock.status)),
                    // The next round tries again.
                    Err(_) => break,
                }
            }
            shared.hoard.show();
        }
    }

    /// Takes nobody in any more and moves the clients, spread over two thirds of `limit`: each is served until its turn,
    /// then what it has asked is answered and its connection is closed, so that it goes elsewhere by itself. Locks are
    /// handed over with the longer grace. Returns when all that is done, and after `limit` and twice [`DRAIN_LAST`] at
    /// the latest.
    pub async fn drain(&self, limit: Duration) {
        let shared = &self.shared;
        let (_, sockets) = self.counts();
        let turns = Turns::new(sockets, limit, Instant::now());
        tracing::info!(sockets, gap_ms = turns.gap.as_secs_f64() * 1000.0, "draining the sockets");
        // Only the first drain counts.
        shared.turns.set(turns).ok();
        shared.draining.cancel();
        shared.tell_all(|word| word.drain = Drain::InTurn);
        shared.tasks.close();
        if timeout(limit, shared.tasks.wait()).await.is_err() {
            shared.impatient.cancel();
            shared.tell_all(|word| word.drain = Drain::AtOnce);
            timeout(DRAIN_LAST, shared.tasks.wait()).await.ok();
        }
        let left = shared.lines.cut_all();
        // Transports without a session (one that has left the namespace, or never came to it) hold their polls open.
        timeout(DRAIN_LAST, shared.io.close()).await.ok();
        let undone = shared.tasks.len();
        tracing::info!(left, undone, "the sockets are drained");
    }
}

/// Handles the namespace. The handlers hold no gateway: it holds them.
fn listen(io: &SocketIo, shared: &Weak<Shared>) {
    let (greeting, beginning) = (shared.clone(), shared.clone());
    let greet = move |socket: SocketRef, weak: WeakSocket, TryData(auth): TryData<Auth>| async move {
        let (span, request) = telemetry::from_handshake(handshake::Trace::of(socket.req_parts()).headers());
        let greeted = match greeting.upgrade() {
            Some(shared) => shared.greet(socket, weak, auth.unwrap_or_default()).instrument(span).await,
            None => Err(Refused::Unavailable),
        };
        let outcome = greeted.as_ref().map_or_else(|refused| refused.as_str(), |()| "ok");
        request.ends("connect", outcome, greeted == Err(Refused::Unavailable));
        greeted.inspect_err(|refused| metrics::GATEWAY_REFUSED.count(&[refused.as_str()]))
    };
    let begin = move |socket: SocketRef| {
        if let Some(shared) = beginning.upgrade() {
            shared.begin(&socket);
        }
        std::future::ready(())
    };
    io.ns(NAMESPACE, begin.with(greet));
}
