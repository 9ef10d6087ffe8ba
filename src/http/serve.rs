//! The connections: accepting them, keeping slow ones from staying, ending them.
//!
//! Written on hyper and not on `axum::serve`, which sets no limit on how long a header may take.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body, extract::ConnectInfo};
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Instant, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service;

use crate::{callers::Addresses, metrics};

/// How long a client may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// From the opening of a connection to the end of its first header. Slower clients are not browsers.
    pub first_header: Duration,
    /// From an answer to the end of the next header, idle time included. Above the 60 s for which common load balancers
    /// keep idle connections, so that it is not we who close one that they are about to use.
    pub next_header: Duration,
    /// From the stop to the end of a header that has begun, or of an answer on its way.
    pub last_header: Duration,
    /// From the stop to the end of requests that are still not answered: above the longest that any request may take.
    /// What is left then are polls of transports without a session, which would be held open for as long as a ping takes.
    pub last_answer: Duration,
    /// What was sent to a client and stays unread for so long ends its connection.
    pub slow_client: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            first_header: Duration::from_secs(10),
            next_header: Duration::from_secs(75),
            last_header: Duration::from_secs(1),
            last_answer: Duration::from_secs(3),
            slow_client: Duration::from_secs(15),
        }
    }
}

/// Header bytes, and what is read ahead of a body.
const BUFFER_BYTES_MAX: usize = 32 * 1024;

/// Connections that carry HTTP at the same time; once one carries a WebSocket the gateway counts it. Beyond it new
/// ones wait in the system's queue.
const CONNECTIONS_MAX: usize = 20_000;

/// After the system refused a connection, mostly for want of file descriptors: time for some to close.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `app` on `listener` until `stop`; then takes no more connections and returns when the requests in flight are
/// answered, or their time is over.
///
/// `wrap` may put something around each stream, and what it returns beside it goes into the extensions of every request
/// that comes over it. Of one of the `addresses` only so many are accepted as it may have.
pub async fn serve<S, E>(
    listener: TcpListener,
    app: Router,
    wrap: fn(TcpStream) -> (S, E),
    limits: Limits,
    addresses: Arc<Addresses>,
    stop: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    E: Clone + Send + Sync + 'static,
{
    let tasks = TaskTracker::new();
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let permit = Arc::clone(&permits).acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                let Ok(counted) = addresses.connection(peer.ip()) else {
                    // Closed unread: whoever opens so many is not owed words.
                    metrics::HTTP_CONNECTIONS.count(&["crowded"]);
                    continue;
                };
                let (app, stop) = (app.clone(), stop.clone());
                tasks.spawn(async move {
                    let _held = (permit, counted);
                    metrics::HTTP_CONNECTIONS.count(&["accepted"]);
                    if let Err(error) = prepare(&stream, limits.slow_client) {
                        tracing::debug!(%error, "a connection broke before its first byte");
                        return;
                    }
                    let (stream, extension) = wrap(stream);
                    connection(stream, (ConnectInfo(peer), extension), app, limits, stop).await;
                });
            }
            Err(error) => {
                metrics::HTTP_CONNECTIONS.count(&["refused"]);
                tracing::debug!(%error, "a connection could not be accepted");
                tokio::select! {
                    () = sleep(ACCEPT_PAUSE) => {}
                    () = stop.cancelled() => break,
                }
            }
        }
    }
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

async fn connection<S, E>(
    stream: S,
    extensions: (ConnectInfo<SocketAddr>, E),
    app: Router,
    limits: Limits,
    stop: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    E: Clone + Send + Sync + 'static,
{
    let requests = Requests::default();
    let service = service_fn(|request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        let (peer, extension) = extensions.clone();
        request.extensions_mut().insert(peer);
        request.extensions_mut().insert(extension);
        let (mut app, in_flight) = (app.clone(), requests.begin());
        async move {
            let answer = app.call(request).await.unwrap_or_else(|never| match never {});
            drop(in_flight);
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.next_header)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    let mut idle = pin!(sleep(limits.first_header));
    let mut stopping = false;
    let mut cut = pin!(sleep(Duration::MAX));
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection broke");
                }
                return;
            }
            () = stop.cancelled(), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
                idle.as_mut().reset(Instant::now() + limits.last_header);
                cut.as_mut().reset(Instant::now() + limits.last_answer);
            }
            () = cut.as_mut(), if stopping => return,
            () = idle.as_mut(), if stopping || !requests.any_begun() => {
                if stopping && requests.any_in_flight() {
                    idle.as_mut().reset(Instant::now() + limits.last_header);
                } else if stopping || !requests.any_begun() {
                    metrics::HTTP_CONNECTIONS.count(&["slow"]);
                    return;
                }
            }
        }
    }
}

/// The requests of one connection.
#[derive(Default)]
struct Requests {
    begun: AtomicUsize,
    /// One reference more than requests that are not answered yet.
    in_flight: Arc<()>,
}

impl Requests {
    fn begin(&self) -> Arc<()> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        Arc::clone(&self.in_flight)
    }

    fn any_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed) > 0
    }

    fn any_in_flight(&self) -> bool {
        Arc::strong_count(&self.in_flight) > 1
    }
}

/// Small frames leave at once, and the system ends a connection whose peer does not read: nothing above it can, because
/// a write that waits for the peer's window waits for ever.
fn prepare(stream: &TcpStream, slow_client: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(slow_client))
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const LIMITS: Limits = Limits {
        first_header: Duration::from_millis(300),
        next_header: Duration::from_millis(600),
        last_header: Duration::from_millis(100),
        last_answer: Duration::from_millis(1500),
        slow_client: Duration::from_secs(15),
    };

    /// Far above every limit, far below for ever.
    const PATIENCE: Duration = Duration::from_secs(20);

    struct Server {
        address: SocketAddr,
        stop: CancellationToken,
        served: tokio::task::JoinHandle<()>,
        /// Requests to `/slow` that have begun.
        begun: Arc<Semaphore>,
        /// Each lets one of them answer.
        gate: Arc<Semaphore>,
    }

    async fn start() -> Server {
        let (begun, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let slow = {
            let (begun, gate) = (Arc::clone(&begun), Arc::clone(&gate));
            get(move || async move {
                begun.add_permits(1);
                gate.acquire().await.expect("never closed").forget();
                "at last"
            })
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let stop = CancellationToken::new();
        let app = Router::new().route("/", get(|| async { "hello" })).route("/slow", slow);
        let served =
            tokio::spawn(serve(listener, app, |stream| (stream, ()), LIMITS, Addresses::unlimited(), stop.clone()));
        Server { address, stop, served, begun, gate }
    }

    async fn send(address: SocketAddr, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        stream.write_all(text.as_bytes()).await.expect("sent");
        stream
    }

    /// What comes until the server closes.
    async fn rest(mut stream: TcpStream) -> String {
        let mut text = String::new();
        let read = stream.read_to_string(&mut text);
        tokio::time::timeout(PATIENCE, read).await.expect("closed in time").expect("read to the end");
        text
    }

    #[tokio::test]
    async fn a_header_that_does_not_come_ends_the_connection() {
        let server = start().await;
        for sent in ["", "GET / HT", "GET / HTTP/1.1\r\nhost: a\r\nx-slow: y\r\n"] {
            let began = Instant::now();
            assert_eq!(rest(send(server.address, sent).await).await, "");
            assert!(began.elapsed() >= LIMITS.first_header, "{sent:?} took {:?}", began.elapsed());
        }
        let began = Instant::now();
        let text = rest(send(server.address, "GET / HTTP/1.1\r\nhost: a\r\n\r\nGET /").await).await;
        assert!(text.ends_with("hello"), "{text}");
        assert!(began.elapsed() >= LIMITS.next_header, "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_stop_answers_what_is_in_flight_and_waits_for_nobody_else() {
        let server = start().await;
        // First, so that it is read before the others are answered.
        let dawdling = send(server.address, "GET / HTTP/1.1\r\nhost: a\r\n").await;
        let in_flight = send(server.address, "GET /slow HTTP/1.1\r\nhost: a\r\n\r\n").await;
        server.begun.acquire().await.expect("never closed").forget();
        let mut idle = send(server.address, "GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let mut answer = [0; 15];
        idle.read_exact(&mut answer).await.expect("an answer");
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
        server.stop.cancel();
        assert_eq!(rest(dawdling).await, "");
        assert!(rest(idle).await.ends_with("hello"));
        sleep(LIMITS.last_header * 2).await;
        server.gate.add_permits(1);
        assert!(rest(in_flight).await.ends_with("at last"));
        server.served.await.expect("ended");
        assert!(TcpStream::connect(server.address).await.is_err(), "nobody listens");
    }

    #[tokio::test]
    async fn a_stop_waits_for_an_answer_only_so_long() {
        let server = start().await;
        let in_flight = send(server.address, "GET /slow HTTP/1.1\r\nhost: a\r\n\r\n").await;
        server.begun.acquire().await.expect("never closed").forget();
        let began = Instant::now();
        server.stop.cancel();
        assert_eq!(rest(in_flight).await, "");
        assert!(began.elapsed() >= LIMITS.last_answer, "{:?}", began.elapsed());
        server.served.await.expect("ended");
    }
}
