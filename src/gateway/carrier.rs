//! The carrier: a session's WebSocket until its connection is taken over.
//!
//! socketioxide opens every session, and all that it knows of polls. A WebSocket is opened here, and while its session
//! still is socketioxide's, this goes between as a client would that polls: what the WebSocket's client sends is posted,
//! what it is to be told is polled. When the session has begun, a [mark](packet::MARK) is put into its queue behind
//! everything that is in it, and nothing else of the session's is any more: it waits at the connection ([`Pipe`]). When the
//! mark comes out, everything before it was told; the session's transport is closed, as its client would, and the
//! connection is read and written to without a detour ([`super::attend`]). So nothing is lost and nothing overtakes.
//!
//! A session that began with polling comes here by an upgrade: the client tries the WebSocket with a probe, lets its last
//! poll end, and says that it has come over. Until then the session goes on by polling, whatever becomes of the WebSocket:
//! there are proxies that let one begin and nothing through.

use std::ops::ControlFlow;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{Method, StatusCode, Uri};
use axum::response::Response;
use futures_util::FutureExt as _;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::sync::Notify;
use tokio::time::{interval, timeout};
use tungstenite::handshake::server::create_response_with_body;

use super::attend;
use super::compact::compact;
use super::frame::{Frames, Received};
use super::handshake::{CLOSE, bad_request};
use super::line::{Alive, Line, LineStream};
use super::pipe::{Marked, Pipe, Urgency};
use super::session::Session;
use super::{Shared, packet, wire};

/// From the answer to the opening of a WebSocket to the end of the upgrade, as with the server in Node.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(10);

/// While a client probes, a poll that waits is ended so often: the client comes over when it has none. As in Node.
const NUDGE: Duration = Duration::from_millis(100);

/// For what a client sends before its connection is taken over: mostly one packet.
const READ_BYTES: usize = 4 * 1024;

/// Between two packets of a poll.
const SEPARATOR: char = '\u{1e}';

/// Opens a WebSocket for a session, or a session on a WebSocket.
pub(super) async fn open(shared: &Arc<Shared>, sid: Option<&str>, mut request: Request) -> Response {
    let Some(line) = request.extensions().get::<Line>().cloned() else { return bad_request() };
    let Ok(answer) = create_response_with_body(&request, Body::empty) else { return bad_request() };
    let upgrade = hyper::upgrade::on(&mut request);
    let (sid, greeting) = match sid {
        Some(sid) => {
            // Nothing is posted to see whether there is such a session.
            let asked = shared.post(sid, String::new()).await;
            if asked.status() != StatusCode::OK {
                return asked;
            }
            (sid.into(), None)
        }
        None => match begin(shared, request).await {
            Ok((sid, greeting)) => (sid, Some(greeting)),
            Err(refused) => return refused,
        },
    };
    let Some(stir) = shared.lines.add(&sid, line.clone()) else { return bad_request() };
    if greeting.is_some() {
        shared.lines.cross(&sid);
    }
    let carrier = Carrier { shared: Arc::downgrade(shared), sid, line, stir };
    tokio::spawn(carrier.live(upgrade, greeting));
    answer
}

/// Opens a session: its id, and the packet that says so.
async fn begin(shared: &Shared, request: Request) -> Result<(Box<str>, String), Response> {
    let (mut parts, _) = request.into_parts();
    let query = parts.uri.query().unwrap_or_default().split('&');
    let query: Vec<_> =
        query.map(|pair| if pair.starts_with("transport=") { "transport=polling" } else { pair }).collect();
    let uri = format!("{}?{}", parts.uri.path(), query.join("&")).parse::<Uri>();
    parts.uri = uri.map_err(|_| bad_request())?;
    let response = (shared.transport)(compact(Request::from_parts(parts, Body::empty()))).await;
    if response.status() != StatusCode::OK {
        return Err(response);
    }
    let packet = text(response).await;
    let sid = wire::opened(&packet).ok_or_else(bad_request)?;
    // It is where an upgrade would bring it.
    Ok((sid, packet.replace(r#""upgrades":["websocket"]"#, r#""upgrades":[]"#)))
}

/// The body of an answer of the transport, which is there as a whole. Empty when it is no text.
async fn text(response: Response) -> String {
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap_or_default();
    String::from_utf8(body.into()).unwrap_or_default()
}

impl Shared {
    /// Asks socketioxide as a client would that polls.
    async fn ask(&self, method: Method, sid: &str, packets: String) -> Response {
        let request = Request::builder()
            .method(method)
            .uri(format!("/socket.io/?EIO=4&transport=polling&sid={sid}"))
            .header("content-type", "text/plain;charset=UTF-8")
            .body(Body::from(packets));
        match request {
            Ok(request) => (self.transport)(request).await,
            Err(_) => bad_request(),
        }
    }

    /// Hands on packets of a session's client. Some bytes that are no packets end the session.
    async fn post(&self, sid: &str, packets: String) -> Response {
        self.ask(Method::POST, sid, packets).await
    }

    /// Ends a session that socketioxide has, as its client would.
    pub(super) async fn close_polling(&self, sid: &str) {
        self.post(sid, CLOSE.to_owned()).await;
    }

    /// What waits for the session's client, or the first that comes. `None` when the session is over.
    async fn poll(&self, sid: &str) -> Option<String> {
        let response = self.ask(Method::GET, sid, String::new()).await;
        if response.status() != StatusCode::OK {
            return None;
        }
        Some(text(response).await).filter(|packets| !packets.is_empty())
    }
}

/// The connection did not go over.
struct Ended;

struct Carrier {
    shared: Weak<Shared>,
    sid: Box<str>,
    line: Line,
    /// There may be a session to be taken over.
    stir: Arc<Notify>,
}

/// What has been sent to and by the client.
struct Wire {
    pipe: Arc<Pipe>,
    reader: OwnedReadHalf,
    frames: Frames,
    /// Packets that were read and not seen to.
    texts: std::vec::IntoIter<Box<str>>,
    /// Nothing more comes.
    is_over: bool,
    /// A frame is being written: nobody knows how much of it was.
    writing: bool,
}

impl Carrier {
    async fn live(self, upgrade: OnUpgrade, greeting: Option<String>) {
        let began_here = greeting.is_some();
        let Some((mut wire, alive)) = self.wire(upgrade).await else { return self.give_up(began_here).await };
        let came_over = match greeting {
            Some(greeting) => self.write(&mut wire, &packet::message(&greeting)).await,
            None => timeout(UPGRADE_TIMEOUT, self.probe(&mut wire)).await.unwrap_or(Err(Ended)),
        };
        if came_over.is_ok()
            && let Ok(session) = self.carry(&mut wire).await
        {
            let guest = session.goes_over();
            wire.pipe.own();
            if let Some(shared) = self.shared.upgrade() {
                shared.close_polling(&self.sid).await;
            }
            attend::attend(self.shared, session, self.line, (alive, guest), (wire.reader, wire.pipe, wire.frames));
            return;
        }
        self.give_up(began_here || came_over.is_ok()).await;
        if !wire.writing {
            wire.pipe.send(packet::CLOSE, Urgency::Owed);
            wire.pipe.own();
            tokio::select! {
                biased;
                () = self.line.until_cut() => {}
                () = wire.pipe.flush() => {}
            }
        }
        wire.pipe.close();
    }

    /// The WebSocket is over, and with it the session that was on it.
    async fn give_up(&self, with_session: bool) {
        let Some(shared) = self.shared.upgrade() else { return };
        shared.lines.remove(&self.sid, &self.stir);
        if with_session {
            shared.close_polling(&self.sid).await;
        }
    }

    /// The connection, when HTTP is done with it, and what was read of it already.
    async fn wire(&self, upgrade: OnUpgrade) -> Option<(Wire, Alive)> {
        let upgraded = timeout(UPGRADE_TIMEOUT, upgrade).await.ok()?.ok()?;
        let parts = upgraded.downcast::<TokioIo<LineStream<TcpStream>>>();
        let parts = parts.inspect_err(|_| tracing::error!("a connection is none that was accepted here")).ok()?;
        let (stream, alive) = parts.io.into_inner().into_inner();
        let (reader, writer) = stream.into_split();
        let pipe = Arc::new(Pipe::new(writer));
        let texts = Vec::new().into_iter();
        let mut wire = Wire { pipe, reader, frames: Frames::default(), texts, is_over: false, writing: false };
        let pongs = wire.take(&mut Vec::from(parts.read_buf));
        self.write(&mut wire, &pongs).await.ok()?;
        Some((wire, alive))
    }

    /// Sees a client come over from polling, or not.
    async fn probe(&self, wire: &mut Wire) -> Result<(), Ended> {
        let mut nudges = interval(NUDGE);
        let mut probed = false;
        loop {
            while let Some(text) = wire.texts.next() {
                match &*text {
                    "2probe" => {
                        self.write(wire, &packet::message("3probe")).await?;
                        probed = true;
                        nudges.reset();
                    }
                    "5" if probed => return self.cross().await,
                    _ => return Err(Ended),
                }
            }
            if wire.is_over {
                return Err(Ended);
            }
            tokio::select! {
                biased;
                () = self.line.until_closed() => return Err(Ended),
                _ = nudges.tick(), if probed => {
                    self.shared.upgrade().ok_or(Ended)?.polls.nudge(&self.sid);
                }
                () = wire.readable() => self.read(wire).await?,
            }
        }
    }

    /// From now on the client's polls are refused; returns when none is under way.
    async fn cross(&self) -> Result<(), Ended> {
        let shared = self.shared.upgrade().ok_or(Ended)?;
        shared.lines.cross(&self.sid);
        while shared.polls.nudge(&self.sid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Goes between until the session can be taken over.
    async fn carry(&self, wire: &mut Wire) -> Result<Arc<Session>, Ended> {
        let shared = self.shared.upgrade().ok_or(Ended)?;
        let mut poll = pin!(shared.poll(&self.sid));
        let mut marked = None;
        let mut may_begin = true;
        loop {
            for text in wire.texts.by_ref() {
                Self::post(&shared, &self.sid, text).await?;
            }
            if wire.is_over {
                return Err(Ended);
            }
            if may_begin && marked.is_none() {
                may_begin = false;
                marked = shared.begun(&self.sid).filter(|session| session.mark(&wire.pipe) == Marked::Yes);
            }
            let polled = tokio::select! {
                biased;
                polled = &mut poll => polled.ok_or(Ended)?,
                () = self.line.until_closed() => {
                    // What the client has been answered is written all the same, as far as it is there.
                    if let Some(polled) = poll.as_mut().now_or_never().flatten() {
                        self.tell(wire, &polled).await?;
                    }
                    return Err(Ended);
                }
                () = self.stir.notified() => {
                    may_begin = true;
                    continue;
                }
                // Behind the mark nothing is to be answered by socketioxide.
                () = wire.readable(), if marked.is_none() => {
                    self.read(wire).await?;
                    continue;
                }
            };
            let mark_came = self.tell(wire, &polled).await?;
            if mark_came && let Some(session) = marked {
                return Ok(session);
            }
            poll.set(shared.poll(&self.sid));
            may_begin = true;
        }
    }

    /// Writes what was polled; whether the mark was in it.
    async fn tell(&self, wire: &mut Wire, polled: &str) -> Result<bool, Ended> {
        let mut frames = Vec::with_capacity(polled.len() + 16);
        let (mut mark_came, mut over) = (false, false);
        for text in polled.split(SEPARATOR) {
            match text.as_bytes() {
                [b'1', ..] => over = true,
                // For a client that lets a poll end.
                [b'6', ..] => {}
                _ if text == packet::MARKED => mark_came = true,
                _ => frames.extend_from_slice(&packet::message(text)),
            }
        }
        self.write(wire, &frames).await?;
        if over { Err(Ended) } else { Ok(mark_came) }
    }

    /// Hands on a packet of the client.
    async fn post(shared: &Shared, sid: &str, text: Box<str>) -> Result<(), Ended> {
        let known = matches!(text.as_bytes(), [b'2' | b'3'] | [b'4', ..]);
        // No JSON has a separator in it as it is.
        if !known || text.contains(SEPARATOR) {
            return Err(Ended);
        }
        let posted = shared.post(sid, text.into()).await;
        if posted.status() == StatusCode::OK { Ok(()) } else { Err(Ended) }
    }

    async fn read(&self, wire: &mut Wire) -> Result<(), Ended> {
        let pongs = wire.read()?;
        self.write(wire, &pongs).await
    }

    async fn write(&self, wire: &mut Wire, frames: &[u8]) -> Result<(), Ended> {
        if frames.is_empty() {
            return Ok(());
        }
        wire.writing = true;
        let written = tokio::select! {
            biased;
            () = self.line.until_cut() => return Err(Ended),
            written = wire.pipe.write_all(frames) => written,
        };
        wire.writing = written.is_err();
        written.map_err(|_| Ended)
    }
}

impl Wire {
    async fn readable(&self) {
        if self.is_over {
            return std::future::pending().await;
        }
        // An error shows when it is read.
        self.reader.readable().await.ok();
    }

    /// Reads what is there; the answers to pings of the WebSocket's own.
    fn read(&mut self) -> Result<Vec<u8>, Ended> {
        let mut bytes = [0; READ_BYTES];
        match self.reader.try_read(&mut bytes) {
            Ok(0) => {
                self.is_over = true;
                Ok(Vec::new())
            }
            Ok(len) => Ok(self.take(bytes.get_mut(..len).unwrap_or_default())),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(Vec::new()),
            Err(_) => Err(Ended),
        }
    }

    /// Takes what was read; the answers to pings of the WebSocket's own.
    fn take(&mut self, bytes: &mut [u8]) -> Vec<u8> {
        let (mut texts, mut pongs) = (Vec::new(), Vec::new());
        let read = self.frames.read(bytes, |received| match received {
            Received::Text(text) => {
                texts.push(Box::from(text));
                ControlFlow::Continue(())
            }
            Received::Ping(payload) => {
                pongs.extend_from_slice(&packet::pong(payload));
                ControlFlow::Continue(())
            }
            Received::Binary | Received::Close => ControlFlow::Break(()),
        });
        self.is_over |= !matches!(read, Ok(ControlFlow::Continue(())));
        self.texts = texts.into_iter();
        pongs
    }
}
