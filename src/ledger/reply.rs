//! Reads what scripts answer. A reply is a list that begins with a word; an unknown word or a missing part is a protocol
//! error, never a guess.

use std::str::FromStr;
use std::time::Duration;

use super::driver::{List, Reply};
use super::notice::read_personal;
use super::script::{self, Script};
use super::{LedgerError, Presence, Told, ends};
use crate::domain::{
    AcceptOutcome, AskOutcome, Availability, BookStats, CategoryId, ConfirmOutcome, End, EndReason, EventId, Grant,
    Instant, Lock, LockId, LockOutcome, LockRequest, LockStatus, Quantity, ReleaseOutcome, RestoreOutcome,
    SnapshotNumber, UserId, ValidateOutcome,
};
use crate::metrics;

/// A reply being read, front to back.
pub(super) struct Parts {
    script: &'static str,
    left: List,
}

impl Parts {
    /// Splits a reply into its word and the rest.
    pub(super) fn new(script: &'static Script, reply: Reply) -> Result<Self, LedgerError> {
        let left = reply.list().map_err(|reply| unexpected(script.name, &reply))?;
        let mut parts = Self { script: script.name, left };
        parts.left.next(|word| word.text().map(drop)).ok_or_else(|| parts.unexpected())?;
        Ok(parts)
    }

    pub(super) fn word(&self) -> &str {
        self.left.whole().word()
    }

    /// The error for a reply that says something else than the script documents.
    pub(super) fn unexpected(&self) -> LedgerError {
        unexpected(self.script, self.left.whole())
    }

    pub(super) fn text(&mut self) -> Result<String, LedgerError> {
        self.left.next(|part| part.text().map(str::to_owned)).ok_or_else(|| self.unexpected())
    }

    /// A part that reads as `T`: numbers, ids.
    pub(super) fn read<T: FromStr>(&mut self) -> Result<T, LedgerError> {
        self.left.next(|part| part.text()?.parse().ok()).ok_or_else(|| self.unexpected())
    }

    /// A part that reads as `T`, or is nobody's: "" or another text.
    fn maybe<T: FromStr>(&mut self) -> Result<Option<T>, LedgerError> {
        self.left.next(|part| part.text().map(|text| text.parse().ok())).ok_or_else(|| self.unexpected())
    }

    pub(super) fn instant(&mut self) -> Result<Instant, LedgerError> {
        // Scores of sorted sets may come as "1.5e+12"-like texts in old protocols; ours are integers throughout.
        self.read().map(Instant::from_ms)
    }

    pub(super) fn quantity(&mut self) -> Result<Quantity, LedgerError> {
        let value = self.read()?;
        Quantity::new(value).map_err(|_| self.unexpected())
    }

    /// The remaining parts, each a list of its own.
    pub(super) fn lists(&mut self) -> Result<Vec<Self>, LedgerError> {
        let mut lists = Vec::new();
        while self.left.left() > 0 {
            let left = self.left.list().ok_or_else(|| self.unexpected())?;
            lists.push(Self { script: self.script, left });
        }
        Ok(lists)
    }

    /// The remaining parts as texts.
    pub(super) fn texts(&mut self) -> Result<Vec<String>, LedgerError> {
        let mut texts = Vec::new();
        while self.left.left() > 0 {
            texts.push(self.text()?);
        }
        Ok(texts)
    }
}

/// The error for a reply that is none of that script or command.
pub(super) fn unexpected(script: &'static str, reply: &Reply) -> LedgerError {
    LedgerError::Protocol { script, reply: format!("{reply:?}") }
}

/// What a category's counts are, as scripts write them: "stock total open active settling version".
pub(super) struct Row {
    stock: u64,
    total: u64,
    open: bool,
    active: u64,
    settling: u64,
    version: u64,
}

impl Row {
    /// The next six words.
    pub(super) fn read(words: &mut Words<'_>) -> Option<Self> {
        let (stock, total) = (words.read()?, words.read()?);
        let open = match words.next()? {
            "0" => false,
            "1" => true,
            _ => return None,
        };
        Some(Self { stock, total, open, active: words.read()?, settling: words.read()?, version: words.read()? })
    }

    pub(super) fn at(self, event: EventId, category: CategoryId, at: Instant) -> Availability {
        let Self { stock, total, open, active, settling, version } = self;
        Availability { event, category, total, stock, active, settling, open, version, at }
    }
}

/// What `lock` answered to a request.
pub(super) fn lock(reply: &Reply, request: &LockRequest) -> Result<LockOutcome, LedgerError> {
    said_as(script::LOCK.name, reply, |word, words| {
        Some(match word {
            "granted" => LockOutcome::Granted(grant(words, request)?),
            "granted_before" => {
                let grant = grant(words, request)?;
                LockOutcome::GrantedBefore(Grant { lock: words.read()?, ..grant })
            }
            "request_ended" => LockOutcome::RequestEnded { lock: words.read()? },
            "request_mismatch" => LockOutcome::RequestMismatch,
            "stock_unknown" => LockOutcome::StockUnknown,
            "rate_limited" => LockOutcome::RateLimited { retry_after: Duration::from_micros(words.read()?) },
            "category_not_found" => LockOutcome::CategoryNotFound,
            "closed" => LockOutcome::Closed,
            "already_locked" => LockOutcome::AlreadyLocked { lock: words.read()? },
            "limit_exceeded" => LockOutcome::LimitExceeded { held: words.read()? },
            "insufficient" => LockOutcome::Insufficient { available: words.read()? },
            "sold_out" => LockOutcome::SoldOut,
            _ => return None,
        })
    })
}

/// `deadline_ms`, the counts of the category behind the grant, `now_ms`.
fn grant(words: &mut Words<'_>, request: &LockRequest) -> Option<Grant> {
    let deadline = words.instant()?;
    let row = Row::read(words)?;
    let (now, version) = (words.instant()?, row.version);
    let available = row.at(request.event(), request.category, now).available();
    Some(Grant { lock: request.lock, deadline, available, version, now })
}

/// A reply that is one text: a word, and others behind single spaces, of which `read` reads all.
fn said_as<T>(
    script: &'static str,
    reply: &Reply,
    read: impl FnOnce(&str, &mut Words<'_>) -> Option<T>,
) -> Result<T, LedgerError> {
    let all = || {
        let mut words = Words::of(reply.value().text()?);
        let said = read(words.next()?, &mut words)?;
        words.rest().is_none().then_some(said)
    };
    all().ok_or_else(|| unexpected(script, reply))
}

pub(super) fn validate(mut parts: Parts) -> Result<ValidateOutcome, LedgerError> {
    match parts.word() {
        "valid" => Ok(ValidateOutcome::Valid { lock: parts.read()?, deadline: parts.instant()? }),
        "not_found" => Ok(ValidateOutcome::NotFound),
        "expired" => Ok(ValidateOutcome::Expired),
        _ => Err(parts.unexpected()),
    }
}

/// The outcome, whether the order was reported before its lock was confirmed, and the end that the call was.
pub(super) fn confirm(mut parts: Parts) -> Result<((ConfirmOutcome, bool), Option<End>), LedgerError> {
    let outcome = match parts.word() {
        "confirmed" | "confirmed_reported" => {
            let reported = parts.word() == "confirmed_reported";
            let end = ends::called(EndReason::Confirmed, parts.read()?);
            return Ok(((ConfirmOutcome::Confirmed, reported), end));
        }
        "already_confirmed" => ConfirmOutcome::AlreadyConfirmed,
        "other_order" => ConfirmOutcome::OtherOrder,
        "wrong_user" => ConfirmOutcome::WrongUser,
        "expired" => ConfirmOutcome::Expired,
        "released" => ConfirmOutcome::Released,
        "not_found" => ConfirmOutcome::NotFound,
        _ => return Err(parts.unexpected()),
    };
    Ok(((outcome, false), None))
}

/// The outcome, and the end that the call was.
pub(super) fn release(reply: &Reply, id: LockId) -> Result<(ReleaseOutcome, Option<End>), LedgerError> {
    said_as(script::RELEASE.name, reply, |word, words| {
        let outcome = match word {
            "released" => {
                let (lock, held_ms) = released_lock(words, id)?;
                return Some((ReleaseOutcome::Released(lock), ends::called(EndReason::Released, held_ms)));
            }
            "already_released" => ReleaseOutcome::AlreadyReleased(released_lock(words, id)?.0),
            "released_by_other" => ReleaseOutcome::ReleasedByOther,
            "confirmed" => ReleaseOutcome::Confirmed,
            "wrong_user" => ReleaseOutcome::WrongUser,
            "expired" => ReleaseOutcome::Expired,
            "not_found" => ReleaseOutcome::NotFound,
            _ => return None,
        };
        Some((outcome, None))
    })
}

/// `user category quantity created_ms version session deadline_ms ended_ms order`: the lock, and how long it was active, -1
/// when it was not.
fn released_lock(words: &mut Words<'_>, id: LockId) -> Option<(Lock, i64)> {
    let (user, category, quantity) = (words.read()?, words.read()?, Quantity::new(words.read()?).ok()?);
    let created_at = words.instant()?;
    let _version: u64 = words.read()?;
    let session = words.next()?.parse().ok();
    let deadline = words.instant()?;
    let held_ms = match words.read()? {
        -1 => -1,
        ended_ms => i64::checked_sub(ended_ms, created_at.as_ms().try_into().ok()?)?,
    };
    let order = words.next()?.parse().ok();
    let lock = Lock {
        id,
        user,
        category,
        quantity,
        created_at,
        deadline,
        status: LockStatus::Released,
        version: None,
        session,
        order,
        pinned: false,
    };
    Some((lock, held_ms))
}

/// What is left of a text of words with single spaces between them; `None` behind the last one.
pub(super) struct Words<'a>(Option<&'a str>);

impl<'a> Words<'a> {
    pub(super) const fn of(text: &'a str) -> Self {
        Self(Some(text))
    }

    /// The next word, as `T`.
    pub(super) fn read<T: FromStr>(&mut self) -> Option<T> {
        self.next()?.parse().ok()
    }

    fn instant(&mut self) -> Option<Instant> {
        self.read().map(Instant::from_ms)
    }

    /// What was not read yet; `None` when all was.
    pub(super) const fn rest(&self) -> Option<&'a str> {
        self.0
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let text = self.0?;
        // Words are short: to look at each byte takes a third of what a search takes to begin.
        let (word, rest) = match text.bytes().position(|byte| byte == b' ') {
            Some(end) => (text.get(..end)?, text.get(end + 1..)),
            None => (text, None),
        };
        self.0 = rest;
        Some(word)
    }
}

pub(super) fn find(mut parts: Parts, id: LockId) -> Result<Option<Lock>, LedgerError> {
    match parts.word() {
        "found" => {
            let status = match parts.text()?.as_str() {
                "active" => LockStatus::Active,
                "confirmed" => LockStatus::Confirmed,
                "released" => LockStatus::Released,
                "expired" => LockStatus::Expired,
                _ => return Err(parts.unexpected()),
            };
            Ok(Some(Lock {
                id,
                user: parts.read()?,
                category: parts.read()?,
                quantity: parts.quantity()?,
                created_at: parts.instant()?,
                deadline: parts.instant()?,
                status,
                version: Some(parts.read()?),
                session: parts.maybe()?,
                order: parts.maybe()?,
                pinned: false,
            }))
        }
        "not_found" => Ok(None),
        _ => Err(parts.unexpected()),
    }
}

/// Active locks of one user, from `locks` and `adopt`.
pub(super) fn locks(mut parts: Parts, user: UserId) -> Result<Vec<Lock>, LedgerError> {
    if !matches!(parts.word(), "locks" | "adopted") {
        return Err(parts.unexpected());
    }
    let mut locks = Vec::new();
    for mut lock in parts.lists()? {
        locks.push(Lock {
            id: lock.read()?,
            user,
            category: lock.read()?,
            quantity: lock.quantity()?,
            created_at: lock.instant()?,
            deadline: lock.instant()?,
            status: LockStatus::Active,
            version: None,
            session: None,
            order: None,
            pinned: match lock.text()?.as_str() {
                "pinned" => true,
                "attended" | "abandoned" => false,
                _ => return Err(lock.unexpected()),
            },
        });
    }
    locks.sort_unstable_by_key(|lock| lock.category);
    Ok(locks)
}

/// The counts of every category, by category; `None` when the stock is not known.
pub(super) fn availability(reply: &Reply, event: EventId) -> Result<Option<Vec<Availability>>, LedgerError> {
    said_as(script::AVAILABILITY.name, reply, |word, words| match word {
        "known" => {
            let at = words.instant()?;
            let mut rows = Vec::new();
            while words.rest().is_some() {
                let (category, row) = (words.read()?, Row::read(words)?);
                rows.push(row.at(event, category, at));
            }
            rows.sort_unstable_by_key(|row| row.category);
            Some(Some(rows))
        }
        "stock_unknown" => Some(None),
        _ => None,
    })
}

/// The outcome, and how many settlements timed out.
pub(super) fn ask(mut parts: Parts) -> Result<(AskOutcome, u64), LedgerError> {
    match parts.word() {
        "ask" => Ok((AskOutcome::Ask(SnapshotNumber(parts.read()?)), parts.read()?)),
        "fresh" => Ok((AskOutcome::Fresh, 0)),
        _ => Err(parts.unexpected()),
    }
}

pub(super) fn accept(parts: &Parts) -> Result<AcceptOutcome, LedgerError> {
    match parts.word() {
        "accepted" => Ok(AcceptOutcome::Accepted),
        "older" => Ok(AcceptOutcome::Older),
        _ => Err(parts.unexpected()),
    }
}

/// What `order` says.
pub(super) enum OrderReply {
    Noted,
    Repeated,
    AfterCancel,
    ConfirmFirst(LockId),
}

pub(super) fn order(mut parts: Parts) -> Result<OrderReply, LedgerError> {
    match parts.word() {
        "noted" => Ok(OrderReply::Noted),
        "repeated" => Ok(OrderReply::Repeated),
        "after_cancel" => Ok(OrderReply::AfterCancel),
        "confirm_first" => Ok(OrderReply::ConfirmFirst(parts.read()?)),
        _ => Err(parts.unexpected()),
    }
}

/// What `sweep` says about one event.
pub(super) struct EventSweep {
    pub(super) expired: u64,
    /// Whether the end of some locks is still to be written down.
    pub(super) left: bool,
    pub(super) refresh: bool,
    /// Until something is due there again, ms; -1 when nothing is.
    pub(super) next_ms: i64,
    /// The locks that reached their deadline and were ended since the last sweep, by any script.
    pub(super) ends: Vec<End>,
    pub(super) old: Vec<String>,
}

impl EventSweep {
    /// Whether another sweep would find something to do.
    pub(super) fn goes_on(&self) -> bool {
        self.next_ms == 0 && (self.expired > 0 || self.left)
    }
}

pub(super) fn sweep(mut parts: Parts) -> Result<EventSweep, LedgerError> {
    if parts.word() != "swept" {
        return Err(parts.unexpected());
    }
    let (expired, left) = (parts.read()?, parts.read::<u8>()? == 1);
    let (refresh, next_ms) = (parts.read::<u8>()? == 1, parts.read()?);
    let ends = ends::read(&parts.text()?, &parts)?;
    let old = match parts.lists()?.pop() {
        Some(mut members) => members.texts()?,
        None => return Err(parts.unexpected()),
    };
    Ok(EventSweep { expired, left, refresh, next_ms, ends, old })
}

pub(super) fn tally(mut parts: Parts) -> Result<BookStats, LedgerError> {
    if parts.word() != "tally" {
        return Err(parts.unexpected());
    }
    Ok(BookStats {
        active: parts.read()?,
        expired: parts.read()?,
        confirmed: parts.read()?,
        released: parts.read()?,
        users: parts.read()?,
        categories: parts.read()?,
    })
}

/// The claim's score, until the next unclaimed member is due (ms, -1 for never), and the claimed members.
pub(super) fn due<T: FromStr>(mut parts: Parts) -> Result<(u64, i64, Vec<T>), LedgerError> {
    if parts.word() != "due" {
        return Err(parts.unexpected());
    }
    let (next_ms, claimed) = (parts.read()?, parts.read()?);
    let mut members = Vec::new();
    for text in parts.texts()? {
        members.push(text.parse().map_err(|_| parts.unexpected())?);
    }
    Ok((claimed, next_ms, members))
}

/// How long until the event is looked at again, `None` when it was dropped.
pub(super) fn plan(mut parts: Parts) -> Result<Option<Duration>, LedgerError> {
    match parts.word() {
        "planned" => Ok(Some(Duration::from_millis(parts.read()?))),
        "dropped" => Ok(None),
        _ => Err(parts.unexpected()),
    }
}

/// What `leave` found.
pub(super) struct Left {
    pub(super) generation: u64,
    /// The user's other sessions, on all replicas.
    pub(super) remaining: u64,
    /// Those on the replica that was asked about.
    pub(super) here: u64,
    /// When this was found, microseconds.
    pub(super) found_us: u64,
}

pub(super) fn left(mut parts: Parts) -> Result<Left, LedgerError> {
    match parts.word() {
        "left" => Ok(Left {
            generation: parts.read()?,
            remaining: parts.read()?,
            here: parts.read()?,
            found_us: parts.read()?,
        }),
        _ => Err(parts.unexpected()),
    }
}

/// How many users the replica may still have sessions of.
pub(super) fn unhosted(mut parts: Parts) -> Result<u64, LedgerError> {
    match parts.word() {
        "unhosted" => parts.read(),
        _ => Err(parts.unexpected()),
    }
}

/// Whether the member was taken out or had been written since makes no difference to whoever asked.
pub(super) fn dropped(parts: &Parts) -> Result<(), LedgerError> {
    match parts.word() {
        "dropped" | "rewritten" => Ok(()),
        _ => Err(parts.unexpected()),
    }
}

/// The outcome, and whether the order that confirmed the lock was reported.
pub(super) fn restore(parts: &Parts) -> Result<(RestoreOutcome, bool), LedgerError> {
    Ok(match parts.word() {
        "restored" => (RestoreOutcome::Restored, false),
        "restored_reported" => (RestoreOutcome::Restored, true),
        "known" => (RestoreOutcome::Known, false),
        "expired" => (RestoreOutcome::Expired, false),
        "no_room" => (RestoreOutcome::NoRoom, false),
        "stock_unknown" => (RestoreOutcome::StockUnknown, false),
        _ => return Err(parts.unexpected()),
    })
}

/// A user's presence, the locks of which are still to be asked for.
pub(super) fn entered(mut parts: Parts) -> Result<Presence, LedgerError> {
    if parts.word() != "entered" {
        return Err(parts.unexpected());
    }
    let (generation, now, seen_until) = (parts.read()?, parts.instant()?, parts.instant()?);
    let mut told = Vec::new();
    for mut kept in parts.lists()? {
        let at = kept.instant()?;
        match read_personal(&kept.text()?) {
            Some(message) => told.push(Told { at, message }),
            // As when it comes by itself: a later version's words keep nobody out.
            None => metrics::LEDGER_NOTICES_UNREADABLE.count(&[]),
        }
    }
    Ok(Presence { generation, now, locks: Vec::new(), told, seen_until })
}

/// What `beat` says.
pub(super) struct Alive {
    /// The lease had not run out.
    pub(super) held: bool,
    /// The data's own name.
    pub(super) epoch: String,
    /// Users and sockets of each living replica.
    pub(super) reports: Vec<(u64, u64)>,
}

pub(super) fn alive(mut parts: Parts) -> Result<Alive, LedgerError> {
    if parts.word() != "alive" {
        return Err(parts.unexpected());
    }
    let (held, epoch) = (parts.read::<u8>()? == 1, parts.text()?);
    let mut reports = Vec::new();
    for text in parts.texts()? {
        let report =
            text.split_once(' ').and_then(|(users, sockets)| Some((users.parse().ok()?, sockets.parse().ok()?)));
        reports.push(report.ok_or_else(|| parts.unexpected())?);
    }
    Ok(Alive { held, epoch, reports })
}

/// Checks the word of a script that says only one.
pub(super) fn said(parts: &Parts, word: &str) -> Result<(), LedgerError> {
    if parts.word() == word { Ok(()) } else { Err(parts.unexpected()) }
}
