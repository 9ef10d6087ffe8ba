//! What goes over one connection: questions out in the order in which they were asked, their answers back in the same.
//!
//! One task reads and writes. What is asked while it writes, or while others are about to ask, goes out together: a write
//! and the reading of it on the other side cost more than a question does. But not too much of it: Redis answers what it has
//! read at once when it has done all of it, so that of two halves one is at work while the other is asked and answered.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep_until};

use super::command::Command;
use super::connection::{Failure, Pushed, line};
use super::measure::{Excess, Measure};
use super::reply::{Reply, Value};

/// What is read at once.
const INPUT_BYTES: usize = 16 * 1024;

/// What is written at once: a hundred calls. What waits behind it can still be given up.
const OUTPUT_BYTES: usize = 64 * 1024;

/// So many wait for no others: about a quarter of a millisecond of work for Redis.
const TOGETHER: usize = 16;

/// Questions that may wait, given up or not: more than [`super::client::QUESTIONS_MAX`], which are not given up.
const QUESTIONS_MAX: usize = 16_384;

/// What is only said of subscriptions that somebody asked to begin or end. That one of a slot has ended, `SUNSUBSCRIBE`, a
/// master says by itself too, when the slot leaves it.
const STATES: [&str; 5] = ["SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE"];

type Answer = Result<Reply, Failure>;

/// What a question is answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expected {
    /// A reply.
    Reply,
    /// That a subscription of a channel began or ended, by the same verb in lower case.
    Told { verb: &'static str, channel: String },
}

struct Question {
    command: Command,
    asker: Asker,
}

/// Who waits for an answer.
struct Asker {
    expected: Expected,
    until: Instant,
    /// `None` when it had to be told that there is none in time.
    answer: Option<oneshot::Sender<Answer>>,
}

impl Asker {
    fn has_lost_interest(&self) -> bool {
        self.answer.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    fn tell(&mut self, answer: Answer) {
        if let Some(asker) = self.answer.take() {
            // Fails when whoever asked has lost interest.
            asker.send(answer).ok();
        }
    }
}

/// Where questions wait to be sent.
#[derive(Default)]
pub(super) struct Desk {
    state: Mutex<State>,
    /// Wakes the task of the connection.
    bell: AtomicWaker,
    /// Wakes the one that waits for what is asked together.
    first: AtomicWaker,
}

#[derive(Default)]
struct State {
    questions: VecDeque<Question>,
    /// They wait for no others any more.
    are_called: bool,
    /// Why the connection has ended. Nothing is asked any more then.
    end: Option<Failure>,
}

impl Desk {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks, and waits for the answer. What is dropped, or late, before it was sent is never sent.
    pub(super) async fn ask(&self, command: Command, expected: Expected, until: Instant) -> Answer {
        let (answer, receiver) = oneshot::channel();
        let count = {
            let mut state = self.state();
            if let Some(end) = &state.end {
                return Err(end.clone());
            }
            if state.questions.len() >= QUESTIONS_MAX {
                state.questions.retain(|question| !question.asker.has_lost_interest());
            }
            let asker = Asker { expected, until, answer: Some(answer) };
            state.questions.push_back(Question { command, asker });
            let count = state.questions.len();
            state.are_called = count >= TOGETHER || count > 1 && state.are_called;
            count
        };
        if count == 1 {
            self.first.wake();
        } else if count == TOGETHER {
            self.bell.wake();
        }
        receiver.await.unwrap_or_else(|_| Err(self.why()))
    }

    /// Behind the first question lets everybody who is ready to run have their turn, who may ask too; then has all of them
    /// sent. Never returns.
    pub(super) async fn gather(self: Arc<Self>) {
        loop {
            let asked = |cx: &mut Context<'_>| {
                self.first.register(cx.waker());
                let state = self.state();
                if state.questions.is_empty() || state.are_called { Poll::Pending } else { Poll::Ready(()) }
            };
            std::future::poll_fn(asked).await;
            tokio::task::yield_now().await;
            {
                let mut state = self.state();
                state.are_called = !state.questions.is_empty();
            }
            self.bell.wake();
        }
    }

    /// Why the connection ended.
    pub(super) fn why(&self) -> Failure {
        self.state().end.clone().unwrap_or_else(|| Failure::Lost("the connection broke".to_owned()))
    }

    /// The connection has ended; whoever waits learns why. The first reason is the one.
    fn end(&self, why: Failure) {
        let mut state = self.state();
        state.end.get_or_insert(why);
        let unsent = std::mem::take(&mut state.questions);
        drop(state);
        drop(unsent);
    }
}

/// The life of a connection, and both directions of it.
pub(super) struct Traffic<S> {
    stream: S,
    desk: Arc<Desk>,
    /// Takes what comes unasked; without it nothing may.
    pushed: Option<Pushed>,
    input: Box<[u8]>,
    measure: Measure,
    /// The beginning of a value whose end has not come.
    rest: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    is_flushed: bool,
    /// Who waits for the next answers, in order; whether somebody still does is not known.
    waiting: VecDeque<Asker>,
    /// When somebody will have waited too long. One timer for all: one for each would cost as much as the rest of a question.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S> Drop for Traffic<S> {
    fn drop(&mut self) {
        self.desk.end(Failure::Lost("the connection was given up".to_owned()));
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Traffic<S> {
    pub(super) fn new(stream: S, desk: Arc<Desk>, pushed: Option<Pushed>) -> Self {
        Self {
            stream,
            desk,
            pushed,
            input: vec![0; INPUT_BYTES].into(),
            measure: Measure::default(),
            rest: Vec::new(),
            output: Vec::new(),
            written: 0,
            is_flushed: true,
            waiting: VecDeque::new(),
            timer: None,
        }
    }

    /// Returns when the connection has broken; then nothing is asked any more.
    pub(super) async fn run(mut self) {
        let why = std::future::poll_fn(|cx| self.poll(cx)).await;
        self.desk.end(why);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Failure> {
        while let Poll::Ready(read) = self.poll_read(cx) {
            if let Err(failure) = read {
                return Poll::Ready(failure);
            }
        }
        // Before the look at what waits: what is asked after it wakes this task again.
        self.desk.bell.register(cx.waker());
        if let Poll::Ready(error) = self.poll_write(cx) {
            return Poll::Ready(Failure::Lost(error.to_string()));
        }
        if !self.output.is_empty() {
            // What waits behind it has a limit too.
            let next = self.desk.state().questions.front().map(|question| question.asker.until);
            self.time(next);
        }
        while self.timer.as_mut().is_some_and(|timer| timer.as_mut().poll(cx).is_ready()) {
            self.give_up(Instant::now());
        }
        Poll::Pending
    }

    /// Somebody may wait until then.
    fn time(&mut self, until: Option<Instant>) {
        let Some(until) = until else { return };
        if self.timer.as_ref().is_none_or(|timer| until < timer.deadline()) {
            self.timer = Some(Box::pin(sleep_until(until)));
        }
    }

    /// Tells those who have waited too long.
    fn give_up(&mut self, now: Instant) {
        let late = |asker: &mut Asker| {
            let is_late = asker.until <= now;
            if is_late {
                asker.tell(Err(Failure::Late));
            }
            is_late
        };
        let mut state = self.desk.state();
        state.questions.retain_mut(|question| !late(&mut question.asker));
        let unsent = state.questions.iter().map(|question| question.asker.until).min();
        drop(state);
        for asker in &mut self.waiting {
            late(asker);
        }
        let waiting = self.waiting.iter().filter(|asker| asker.answer.is_some()).map(|asker| asker.until).min();
        self.timer = None;
        self.time(unsent.into_iter().chain(waiting).min());
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        let mut buf = ReadBuf::new(&mut self.input);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buf))?;
        let length = buf.filled().len();
        if length == 0 {
            return Poll::Ready(Err(Failure::Lost("Redis closed the connection".to_owned())));
        }
        let mut at = 0;
        while let Some(piece) = self.input.get(at..length).filter(|piece| !piece.is_empty()) {
            let end = self.measure.pass(piece)?;
            let (own, _) = piece.split_at(end.unwrap_or(piece.len()));
            at += own.len();
            let whole = if self.rest.is_empty() && end.is_some() {
                Bytes::copy_from_slice(own)
            } else {
                self.rest.extend_from_slice(own);
                if end.is_none() {
                    break;
                }
                std::mem::take(&mut self.rest).into()
            };
            self.came(Reply::new(whole))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Gives a value to whom it is for.
    fn came(&mut self, reply: Reply) -> Result<(), Excess> {
        let answer = match reply.value() {
            Value::Push(mut told) => {
                let (kind, channel) = (told.next().and_then(Value::text), told.next().and_then(Value::text));
                let is = |verb: &&str| kind.is_some_and(|kind| kind.eq_ignore_ascii_case(verb));
                let expected = self.waiting.front().map(|asker| &asker.expected);
                match (expected, &self.pushed) {
                    (Some(Expected::Told { verb, channel: of }), _) if is(verb) && channel == Some(of) => Ok(reply),
                    (_, Some(pushed)) if !STATES.iter().any(is) => {
                        pushed(&reply);
                        return Ok(());
                    }
                    _ => return Err(Excess::Unasked),
                }
            }
            Value::Error(words) => Err(Failure::Refused(line(&String::from_utf8_lossy(words)))),
            _ if self.waiting.front().is_some_and(|asker| asker.expected != Expected::Reply) => {
                return Err(Excess::Unasked);
            }
            Value::Text(_) | Value::List(_) | Value::Nothing => Ok(reply),
        };
        self.waiting.pop_front().ok_or(Excess::Unasked)?.tell(answer);
        Ok(())
    }

    /// Writes what is asked; ready when that fails.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            while let Some(left) = self.output.get(self.written..).filter(|left| !left.is_empty()) {
                match ready!(Pin::new(&mut self.stream).poll_write(cx, left)) {
                    Ok(0) => return Poll::Ready(io::ErrorKind::WriteZero.into()),
                    Ok(written) => self.written += written,
                    Err(error) => return Poll::Ready(error),
                }
            }
            self.output.clear();
            self.written = 0;
            let (are_called, is_empty) = {
                let state = self.desk.state();
                (state.are_called, state.questions.is_empty())
            };
            if !are_called || is_empty {
                if !self.is_flushed {
                    if let Err(error) = ready!(Pin::new(&mut self.stream).poll_flush(cx)) {
                        return Poll::Ready(error);
                    }
                    self.is_flushed = true;
                }
                return Poll::Pending;
            }
            self.take();
        }
    }

    /// Takes questions to be written, but for those that were given up.
    fn take(&mut self) {
        let desk = Arc::clone(&self.desk);
        let mut state = desk.state();
        while self.output.len() < OUTPUT_BYTES
            && let Some(Question { command, asker }) = state.questions.pop_front()
        {
            if !asker.has_lost_interest() {
                command.write(&mut self.output);
                self.time(Some(asker.until));
                self.waiting.push_back(asker);
            }
        }
        state.are_called = !state.questions.is_empty();
        self.is_flushed &= self.output.is_empty();
    }
}

/// What becomes of what a server sends in pieces of a length to whom has asked so many questions: their answers, what came
/// unasked, and why it ended. See [`crate::ledger::fuzzing::streams`].
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn replay(data: &[u8], length: usize, questions: usize) -> (Vec<Option<Answer>>, Vec<Reply>, Failure) {
    struct Pieces<'a>(std::slice::Chunks<'a, u8>);

    impl AsyncRead for Pieces<'_> {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            buf.put_slice(self.0.next().unwrap_or_default());
            Poll::Ready(Ok(()))
        }
    }

    let came = Arc::new(Mutex::new(Vec::new()));
    let note = Arc::clone(&came);
    let pushed: Pushed = Arc::new(move |reply: &Reply| {
        note.lock().unwrap_or_else(PoisonError::into_inner).push(reply.clone());
    });
    let stream = tokio::io::join(Pieces(data.chunks(length.clamp(1, INPUT_BYTES))), tokio::io::sink());
    let desk = Arc::new(Desk::default());
    let mut traffic = Traffic::new(stream, desk, Some(pushed));
    let (askers, mut answers): (Vec<_>, Vec<_>) = (0..questions).map(|_| oneshot::channel()).unzip();
    let (expected, until) = (Expected::Reply, Instant::now());
    let asker = |answer| Asker { expected: expected.clone(), until, answer: Some(answer) };
    traffic.waiting = askers.into_iter().map(asker).collect();
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let end = loop {
        if let Poll::Ready(end) = traffic.poll(&mut cx) {
            break end;
        }
    };
    let came = std::mem::take(&mut *came.lock().unwrap_or_else(PoisonError::into_inner));
    (answers.iter_mut().map(|answer| answer.try_recv().ok()).collect(), came, end)
}
