//! The composition root: what the process is made of, started from the ledger outwards and stopped in reverse.

mod fleet;
mod parts;

use std::{
    io::{self, Write},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::TcpStream,
    time::{Instant, interval, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    callers::Addresses,
    config::Config,
    domain::ReplicaId,
    fanout::{Fanout, FanoutOptions},
    gateway::{Gateway, Line},
    http::{
        self, Sources,
        health::Health,
        serve::{Limits, serve},
        stats::Stats,
    },
    inventory::{CatalogueError, Stock},
    ledger::{Ledger, Sweeper},
    metrics,
    rpc::Rpc,
    shutdown::{Phase, Shutdown},
    telemetry,
};

/// How often the metrics' buffers are emptied, so that they do not grow when nobody reads them, and tasks are counted.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Kept of the drain: for the farewell to the ledger, and for connections that do not close by themselves.
const FAREWELL: Duration = Duration::from_secs(1);
const CUTTING: Duration = Duration::from_secs(2);

/// How long the last spans may take to their collector, within the drain: a dead one is not waited for.
const FLUSHING: Duration = Duration::from_secs(2);

/// Why the process did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting that is well written names something that makes no sense. Says which; never a secret.
    #[error("{setting}: {why}")]
    Setting {
        /// The variable.
        setting: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The catalogue cannot be read.
    #[error("SEATLOCK_EVENTS_URL: {0}")]
    Catalogue(#[from] CatalogueError),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The metrics cannot be recorded.
    #[error("metrics: {0}")]
    Metrics(#[from] metrics::BuildError),
}

/// How the process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Everything in flight was answered.
    Clean,
    /// Time ran out, or a second signal came, before that.
    Cut,
}

/// Serves until `shutdown` is draining, drains, and says how it ended.
///
/// # Errors
/// When it cannot start.
pub async fn run(config: Config, shutdown: Shutdown) -> Result<End, StartError> {
    let app = App::start(&config, &shutdown).await?;
    shutdown.reached(Phase::Draining).await;
    let drain = app.drain(Instant::now() + config.drain_timeout);
    Ok(tokio::select! {
        end = drain => end,
        () = shutdown.reached(Phase::Stopped) => End::Cut,
    })
}

/// Everything that runs.
struct App {
    replica: ReplicaId,
    ledger: Arc<dyn Ledger>,
    stock: Arc<Stock>,
    gateway: Gateway,
    rpc: Option<Rpc>,
    health: Arc<Health>,
    /// The connections, public and admin.
    serving: TaskTracker,
    /// Sweep, beat, health, upkeep.
    background: TaskTracker,
    stop: Stop,
}

/// What ends each part, one token per step of the drain.
#[derive(Default)]
struct Stop {
    rpc: CancellationToken,
    serving: CancellationToken,
    fanout: CancellationToken,
    stock: CancellationToken,
    background: CancellationToken,
}

impl App {
    async fn start(config: &Config, shutdown: &Shutdown) -> Result<Self, StartError> {
        let listener = parts::listen(config.listen).await?;
        let admin = match config.admin_listen {
            Some(address) => Some(parts::listen(address).await?),
            None => None,
        };
        let (verifier, issuer) = parts::tokens(config)?;
        let handle = metrics::install()?;
        let replica = ReplicaId::generate();
        let stop = Stop::default();

        let ledger = parts::ledger(config, replica)?;
        let (stock, catalogue) = parts::stock(config, &ledger, &stop.stock)?;
        let options = parts::gateway_options(config, &stock);
        let (cors, addresses) = (options.origins.cors(), Arc::clone(&options.addresses));
        let gateway = Gateway::new(options, Arc::clone(&verifier), Arc::clone(&ledger), Arc::clone(&stock));
        let ticks = FanoutOptions { tick: config.fanout_tick, ..FanoutOptions::default() };
        let (rooms, heard) = (Arc::clone(&stock), Arc::clone(&ledger));
        gateway.attach(Fanout::start(heard, rooms, gateway.audience(), ticks, stop.fanout.clone()));
        let stats = Stats::new(Arc::clone(&ledger), replica);
        let rpc = parts::rpc(config, &ledger, &stock, &stats, &stop.rpc)?;
        let health = Health::new(Arc::clone(&ledger), shutdown.clone());
        if let Some(rpc) = rpc.clone() {
            health.watch_rpc(Box::new(move || rpc.is_connected()));
        }

        let background = TaskTracker::new();
        let refresh = {
            let stock = Arc::clone(&stock);
            move |event| stock.refresh(event)
        };
        background.spawn(Sweeper::new(Arc::clone(&ledger), refresh).run(stop.background.clone()));
        background.spawn(fleet::beat(Arc::clone(&ledger), replica, gateway.clone(), stop.background.clone()));
        background.spawn(fleet::reap(Arc::clone(&ledger), config.disconnect_grace, stop.background.clone()));
        background.spawn(Arc::clone(&health).run(stop.background.clone()));
        background.spawn(upkeep(handle.clone(), Arc::clone(&stock), stop.background.clone()));
        metrics::APP_INFO.set(&[env!("CARGO_PKG_VERSION")], 1.0);
        let (followed, until) = (gateway.clone(), stop.background.clone());
        background.spawn(async move { followed.follow(until).await });
        // A key set that cannot be had shows in the log before the first user does; nothing waits for it.
        background.spawn(async move { verifier.prepare().await });

        let sources = Sources {
            stats,
            health: Arc::clone(&health),
            stock: Arc::clone(&stock),
            metrics: handle,
            request_timeout: config.request_timeout,
            addresses: Arc::clone(&addresses),
        };
        let demo = parts::demo(issuer, catalogue.as_deref());
        let serving = TaskTracker::new();
        let limits = Limits {
            slow_client: config.slow_client,
            last_answer: config.request_timeout + Duration::from_secs(1),
            ..Limits::default()
        };
        if let Some(listener) = admin {
            let address = listener.local_addr().unwrap_or(config.listen);
            tracing::info!(listen = %address, "serving admin");
            serving.spawn(serve(
                listener,
                http::admin(&sources),
                plain,
                limits,
                Addresses::unlimited(),
                stop.serving.clone(),
            ));
        }
        let address = listener.local_addr().unwrap_or(config.listen);
        let routes = http::public(&sources, demo, config.admin_listen.is_none()).layer(cors).merge(gateway.routes());
        serving.spawn(serve(listener, routes, Line::wrap, limits, addresses, stop.serving.clone()));
        tracing::info!(listen = %address, %replica, version = env!("CARGO_PKG_VERSION"), "serving");
        if config.demo {
            invite(address);
        }
        Ok(Self { replica, ledger, stock, gateway, rpc, health, serving, background, stop })
    }

    /// Stops what was started, in reverse, all of it by `deadline`. Readiness has fallen before: it follows the phase.
    async fn drain(self, deadline: Instant) -> End {
        let started = Instant::now();
        let work_ends = deadline - FAREWELL;
        let mut clean = true;
        self.health.note();

        // Requests of both transports are finished at the same time. Sockets close one by one as theirs are answered.
        self.stop.rpc.cancel();
        let sockets = self.gateway.drain((work_ends - CUTTING).saturating_duration_since(Instant::now()));
        let messages = async {
            match &self.rpc {
                Some(rpc) => step("RabbitMQ messages in work", rpc.drained(), work_ends).await,
                None => true,
            }
        };
        let ((), messages) = tokio::join!(sockets, messages);
        clean &= messages;
        self.stop.serving.cancel();
        self.serving.close();
        clean &= step("requests in flight", self.serving.wait(), work_ends).await;
        self.stop.fanout.cancel();
        self.stop.stock.cancel();
        clean &= step("questions to the events-service", self.stock.drained(), work_ends).await;
        self.stop.background.cancel();
        self.background.close();
        clean &= step("background work", self.background.wait(), work_ends).await;

        // A lease that is not given back ends by itself; its locks are then abandoned a few seconds later.
        let farewell = tokio::spawn(async move { self.ledger.farewell(self.replica).await });
        let left = deadline.saturating_duration_since(Instant::now());
        let (farewell, ()) = tokio::join!(timeout_at(deadline, farewell), telemetry::flush(left.min(FLUSHING)));
        match farewell {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!(%error, "the lease was not given back"),
            Ok(Err(_)) | Err(_) => tracing::warn!("the lease was not given back in time"),
        }
        tracing::info!(clean, seconds = started.elapsed().as_secs_f64(), "drained");
        if clean { End::Clean } else { End::Cut }
    }
}

/// Waits for one step of the drain, no longer than until `deadline`.
async fn step(what: &'static str, done: impl Future<Output = ()>, deadline: Instant) -> bool {
    let ended = timeout_at(deadline, done).await.is_ok();
    if !ended {
        tracing::warn!(what, "left unfinished: the drain timeout is over");
    }
    ended
}

fn plain(stream: TcpStream) -> (TcpStream, ()) {
    (stream, ())
}

/// Tells whoever started the demo where it is, on standard output, whatever is logged.
fn invite(address: SocketAddr) {
    let host = if address.ip().is_unspecified() || address.ip().is_loopback() {
        format!("localhost:{}", address.port())
    } else {
        address.to_string()
    };
    // Nobody reads it when there is no output; the demo serves all the same.
    let _ = writeln!(
        io::stdout(),
        "\n  Seatlock demo: open two windows of  http://{host}/demo/  and fight for the same tickets.\n  \
         Tokens for anybody: not for real sales. Ctrl-C stops it.\n"
    );
}

async fn upkeep(handle: metrics::Handle, stock: Arc<Stock>, stop: CancellationToken) {
    let mut ticks = interval(UPKEEP_EVERY);
    let runtime = tokio::runtime::Handle::current();
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                handle.run_upkeep();
                let tasks = u32::try_from(runtime.metrics().num_alive_tasks()).unwrap_or(u32::MAX);
                metrics::APP_TASKS.set(&[], tasks.into());
                metrics::INVENTORY_STOCK_AGE.set(&[], stock.age().as_secs_f64());
            }
            () = stop.cancelled() => return,
        }
    }
}
