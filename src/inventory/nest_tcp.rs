//! The events-service over the NestJS TCP transport: one connection, kept, with several requests open on it.
//!
//! A task owns the connection and the open requests. It connects at once and again with growing pauses; while it cannot,
//! requests fail at once. When the connection dies every open request fails: whoever asked decides about asking again.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::frame::{Frame, FrameError, Frames};
use super::nest::{self, Answer, Peer};
use super::{Reply, SourceError, SourceOptions, StockSource};
use crate::domain::{EventId, Snapshot};
use crate::metrics;

/// Requests waiting for the connection's task, and as many open on the connection.
const OUTSTANDING_MAX: usize = 256;
/// Pauses between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How often open requests are looked at for their deadline.
const PURGE_EVERY: Duration = Duration::from_millis(50);
/// How much is read at once.
const READ_LEN: usize = 16 * 1024;

/// A client of a NestJS service over TCP.
#[derive(Debug)]
pub struct NestTcp {
    requests: mpsc::Sender<Request>,
    options: SourceOptions,
}

#[derive(Debug)]
struct Request {
    pattern: &'static str,
    data: EventId,
    deadline: Instant,
    answer: oneshot::Sender<Result<Answer, SourceError>>,
}

impl NestTcp {
    /// Connects in the background and stays connected until `stop`. Must be called inside a runtime.
    #[must_use]
    pub fn start(host: String, port: u16, options: SourceOptions, stop: CancellationToken) -> Self {
        let (requests, receiver) = mpsc::channel(OUTSTANDING_MAX);
        tokio::spawn(async move {
            let mut link = Link { host, port, options, requests: receiver };
            tokio::select! {
                () = link.run() => {}
                () = stop.cancelled() => {}
            }
            metrics::INVENTORY_CONNECTED.set(&[], 0.0);
        });
        Self { requests, options }
    }
}

#[async_trait]
impl StockSource for NestTcp {
    async fn snapshot(&self, event: EventId) -> Result<Snapshot, SourceError> {
        nest::snapshot(self, event).await
    }
}

impl Peer for NestTcp {
    async fn request(&self, pattern: &'static str, data: EventId) -> Result<Answer, SourceError> {
        let limit = self.options.request_timeout;
        let (sender, answer) = oneshot::channel();
        let request = Request { pattern, data, deadline: Instant::now() + limit, answer: sender };
        match self.requests.try_send(request) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return Err(SourceError::Busy),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(SourceError::Stopping),
        }
        match timeout(limit, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(SourceError::Stopping),
            Err(_) => Err(SourceError::Timeout(limit)),
        }
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the peer closed the connection")]
    Closed,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("nothing was received for a whole request timeout")]
    Silent,
}

/// The task's state.
struct Link {
    host: String,
    port: u16,
    options: SourceOptions,
    requests: mpsc::Receiver<Request>,
}

impl Link {
    /// Until every handle is gone.
    async fn run(&mut self) {
        let mut pause = BACKOFF.0;
        let mut told = false;
        while !self.requests.is_closed() || !self.requests.is_empty() {
            let why = match self.connect().await {
                Ok(stream) => {
                    metrics::INVENTORY_CONNECTED.set(&[], 1.0);
                    tracing::debug!(host = %self.host, port = self.port, "connected to the events-service");
                    let mut talk = Talk::new(stream);
                    match talk.run(&mut self.requests).await {
                        Ok(()) => return,
                        Err(broken) => {
                            let why = broken.to_string();
                            talk.fail(&why);
                            if talk.proven {
                                pause = BACKOFF.0;
                                told = false;
                            }
                            why
                        }
                    }
                }
                Err(error) => error.to_string(),
            };
            metrics::INVENTORY_CONNECTED.set(&[], 0.0);
            metrics::INVENTORY_DISCONNECTS.count(&[]);
            if !told {
                tracing::warn!(host = %self.host, port = self.port, error = %why, "no connection to the events-service");
                told = true;
            }
            if !self.refuse_for(pause, &why).await {
                return;
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        let stream = timeout(self.options.connect_timeout, TcpStream::connect((self.host.as_str(), self.port)))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no connection in time"))??;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Fails what comes during the pause. False when nobody can come any more.
    async fn refuse_for(&mut self, pause: Duration, why: &str) -> bool {
        let end = sleep(pause);
        tokio::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => return true,
                request = self.requests.recv() => match request {
                    Some(request) => {
                        // The caller may have gone; then nobody is to be told.
                        let _ = request.answer.send(Err(SourceError::Unavailable(why.to_owned())));
                    }
                    None => return false,
                },
            }
        }
    }
}

/// One connection and what is open on it.
struct Talk {
    stream: TcpStream,
    frames: Frames,
    out: Vec<u8>,
    open: HashMap<String, Open>,
    next_id: u64,
    heard: Instant,
    /// Something sensible came over this connection.
    proven: bool,
}

struct Open {
    answer: oneshot::Sender<Result<Answer, SourceError>>,
    sent: Instant,
    deadline: Instant,
}

impl Talk {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            frames: Frames::default(),
            out: Vec::new(),
            open: HashMap::new(),
            next_id: 0,
            heard: Instant::now(),
            proven: false,
        }
    }

    /// Until the connection breaks (`Err`) or every handle is gone.
    async fn run(&mut self, requests: &mut mpsc::Receiver<Request>) -> Result<(), Broken> {
        let (mut reader, mut writer) = self.stream.split();
        let mut purge = interval(PURGE_EVERY);
        let mut chunk = vec![0; READ_LEN];
        loop {
            tokio::select! {
                request = requests.recv(), if self.open.len() < OUTSTANDING_MAX => match request {
                    // It waited for the connection too long.
                    Some(request) if request.answer.is_closed() => {}
                    Some(request) => {
                        self.next_id += 1;
                        let id = self.next_id.to_string();
                        let frame = Frame { pattern: request.pattern, data: request.data.value(), id: Some(&id) };
                        self.out.extend_from_slice(&frame.encode());
                        let open = Open { answer: request.answer, sent: Instant::now(), deadline: request.deadline };
                        self.open.insert(id, open);
                    }
                    None => return Ok(()),
                },
                read = reader.read(&mut chunk) => match read? {
                    0 => return Err(Broken::Closed),
                    len => {
                        self.heard = Instant::now();
                        self.frames.push(&chunk[..len]);
                        while let Some(body) = self.frames.next_frame()? {
                            self.proven = true;
                            settle(&mut self.open, body);
                        }
                    }
                },
                written = writer.write(&self.out), if !self.out.is_empty() => {
                    self.out.drain(..written?);
                }
                _ = purge.tick() => {
                    let now = Instant::now();
                    let heard = self.heard;
                    let silent = self.open.values().any(|open| open.deadline <= now && heard <= open.sent);
                    self.open.retain(|_, open| open.deadline > now);
                    if silent {
                        // A connection whose other end is gone without a word takes writes for many minutes.
                        return Err(Broken::Silent);
                    }
                }
            }
        }
    }

    fn fail(&mut self, why: &str) {
        for (_, open) in self.open.drain() {
            // The caller may have gone; then nobody is to be told.
            let _ = open.answer.send(Err(SourceError::Unavailable(why.to_owned())));
        }
    }
}

/// Gives a reply to whoever waits for it. A reply without a known id belongs to a request that gave up.
fn settle(open: &mut HashMap<String, Open>, body: Value) {
    let id = match body.get("id") {
        Some(Value::String(id)) => id.clone(),
        _ => return,
    };
    let answer = match Reply::of(body) {
        Reply::Error(error) => Answer::Refused(error),
        Reply::Next { value, .. } => Answer::Value(value.unwrap_or(Value::Null)),
    };
    if let Some(open) = open.remove(&id) {
        // The caller may have gone; then nobody is to be told.
        let _ = open.answer.send(Ok(answer));
    }
}
