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

use crate::metrics;

/// From the opening of a connection to the end of its first header. Slower clients are not browsers.
const FIRST_HEADER: Duration = Duration::from_secs(10);

/// From an answer to the end of the next header, idle time included. Above the 60 s for which common load balancers
/// keep idle connections, so that it is not we who close one that they are about to use.
const NEXT_HEADER: Duration = Duration::from_secs(75);

/// From the stop to the end of requests that are still not answered. Sessions have ended by then; what is left are polls
/// of transports that have none, which would be held open for as long as a ping takes.
const LAST_ANSWER: Duration = Duration::from_secs(3);

/// After `stop`, how long the rest of a header or of an answer may take.
const LAST_HEADER: Duration = Duration::from_secs(1);

/// Header bytes, and what is read ahead of a body.
const BUFFER_BYTES_MAX: usize = 32 * 1024;

/// Connections that carry HTTP at the same time; once one carries a WebSocket the gateway counts it. Beyond it new
/// ones wait in the system's queue.
const CONNECTIONS_MAX: usize = 20_000;

/// After the system refused a connection, mostly for want of file descriptors: time for some to close.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `app` on `listener` until `stop`; then takes no more connections and returns when the requests in flight are
/// answered. What was sent to a client and stays unread for `slow_client` ends its connection.
///
/// `wrap` may put something around each stream, and what it returns beside it goes into the extensions of every request
/// that comes over it.
pub async fn serve<S, E>(
    listener: TcpListener,
    app: Router,
    wrap: fn(TcpStream) -> (S, E),
    slow_client: Duration,
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
                let (app, stop) = (app.clone(), stop.clone());
                tasks.spawn(async move {
                    let _permit = permit;
                    metrics::HTTP_CONNECTIONS.count(&["accepted"]);
                    if let Err(error) = prepare(&stream, slow_client) {
                        tracing::debug!(%error, "a connection broke before its first byte");
                        return;
                    }
                    let (stream, extension) = wrap(stream);
                    connection(stream, (ConnectInfo(peer), extension), app, stop).await;
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

async fn connection<S, E>(stream: S, extensions: (ConnectInfo<SocketAddr>, E), app: Router, stop: CancellationToken)
where
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
        .header_read_timeout(NEXT_HEADER)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    let mut idle = pin!(sleep(FIRST_HEADER));
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
                idle.as_mut().reset(Instant::now() + LAST_HEADER);
                cut.as_mut().reset(Instant::now() + LAST_ANSWER);
            }
            () = cut.as_mut(), if stopping => return,
            () = idle.as_mut(), if stopping || !requests.any_begun() => {
                if stopping && requests.any_in_flight() {
                    idle.as_mut().reset(Instant::now() + LAST_HEADER);
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

    /// Serves one route that answers after a minute.
    async fn start() -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        let slow = get(|| async {
            sleep(Duration::from_mins(1)).await;
            "at last"
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let stop = CancellationToken::new();
        let app = Router::new().route("/", get(|| async { "hello" })).route("/slow", slow);
        let served = serve(listener, app, |stream| (stream, ()), Duration::from_secs(15), stop.clone());
        (address, stop.clone(), tokio::spawn(served))
    }

    /// What comes until the server closes, and after how long. Time is the test's: it jumps whenever all tasks wait.
    async fn answer(address: SocketAddr, sent: &str) -> (String, Duration) {
        let mut stream = TcpStream::connect(address).await.expect("connected");
        stream.write_all(sent.as_bytes()).await.expect("sent");
        let (start, mut text) = (Instant::now(), String::new());
        stream.read_to_string(&mut text).await.expect("read to the end");
        (text, start.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_header_that_does_not_come_ends_the_connection() {
        let (address, _stop, _served) = start().await;
        for sent in ["", "GET / HT", "GET / HTTP/1.1\r\nhost: a\r\nx-slow: y\r\n"] {
            let (text, waited) = answer(address, sent).await;
            assert_eq!(text, "");
            assert!(waited >= FIRST_HEADER && waited < FIRST_HEADER * 2, "{sent:?} took {waited:?}");
        }
        let (text, waited) = answer(address, "GET / HTTP/1.1\r\nhost: a\r\n\r\nGET /").await;
        assert!(text.ends_with("hello"), "{text}");
        assert!(waited >= NEXT_HEADER && waited < NEXT_HEADER * 2, "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_answers_what_is_in_flight_and_waits_for_nobody_else() {
        let (address, stop, served) = start().await;
        let in_flight = tokio::spawn(answer(address, "GET /slow HTTP/1.1\r\nhost: a\r\n\r\n"));
        let dawdling = tokio::spawn(answer(address, "GET / HTTP/1.1\r\nhost: a\r\n"));
        let idle = tokio::spawn(answer(address, "GET / HTTP/1.1\r\nhost: a\r\n\r\n"));
        sleep(Duration::from_secs(5)).await;
        stop.cancel();
        let (text, waited) = in_flight.await.expect("answered");
        assert!(text.ends_with("at last") && waited >= Duration::from_mins(1), "{text} after {waited:?}");
        let (text, waited) = dawdling.await.expect("closed");
        assert!(text.is_empty() && waited <= Duration::from_secs(5) + LAST_HEADER * 2, "{text} after {waited:?}");
        let (text, waited) = idle.await.expect("closed");
        assert!(text.ends_with("hello") && waited <= Duration::from_secs(5) + LAST_HEADER, "{text} after {waited:?}");
        served.await.expect("ended");
        assert!(TcpStream::connect(address).await.is_err(), "nobody listens");
    }
}
