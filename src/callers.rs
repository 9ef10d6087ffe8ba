//! Who asks, and how much of it: the address that a request counts for, and what one address or one user may take.
//!
//! Owns the reading of `X-Forwarded-For`, the counting and its bounds. Knows no sockets and no routes: those who serve ask
//! it and answer the refusal.
//!
//! Invariants: a header counts only where a trusted proxy wrote it; no caller and no number of callers makes a table
//! longer than [`PLACES_MAX`].

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::domain::RateLimit;

/// Callers remembered at once: more than a replica has sockets, twice over. About a hundred bytes each.
pub const PLACES_MAX: usize = 131_072;

/// A full table is searched for callers that can be forgotten at most this often.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Transports beyond the limit of an address that are let in to be told so; each is closed when its handshake has failed.
const TOLD_MAX: usize = 16;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that runs under the mutexes of this module panics half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whom a limit counts: one IPv4 address, or the 64 bits of an IPv6 address that one customer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address(IpAddr);

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 64))),
            ip @ IpAddr::V4(_) => ip,
        })
    }
}

/// A range of addresses, as in `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    base: IpAddr,
    bits: u8,
}

impl Range {
    /// The addresses whose first `bits` bits are those of `base`; more than it has are all.
    #[must_use]
    pub const fn new(base: IpAddr, bits: u8) -> Self {
        Self { base, bits }
    }

    fn contains(&self, ip: IpAddr) -> bool {
        let same = |a: u128, b: u128, width: u32| {
            let ignored = width.saturating_sub(u32::from(self.bits));
            a.checked_shr(ignored).unwrap_or(0) == b.checked_shr(ignored).unwrap_or(0)
        };
        match (self.base.to_canonical(), ip.to_canonical()) {
            (IpAddr::V4(base), IpAddr::V4(ip)) => same(base.to_bits().into(), ip.to_bits().into(), 32),
            (IpAddr::V6(base), IpAddr::V6(ip)) => same(base.to_bits(), ip.to_bits(), 128),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

/// One entry of `X-Forwarded-For`: an address, with or without a port.
fn forwarded_address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bracketed = || text.strip_prefix('[')?.split_once(']')?.0.parse().ok();
    let with_port = || text.parse::<std::net::SocketAddr>().ok().map(|address| address.ip());
    text.parse().ok().or_else(with_port).or_else(bracketed)
}

/// How much one caller may take. `None` sets no limit.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quota {
    /// Open at the same time.
    pub connections: Option<usize>,
    /// Transports opened, and apart from them tokens presented.
    pub handshakes: Option<RateLimit>,
    /// Messages, and HTTP requests beside Socket.IO.
    pub messages: Option<RateLimit>,
}

impl Quota {
    const fn limits_nothing(&self) -> bool {
        self.connections.is_none() && self.handshakes.is_none() && self.messages.is_none()
    }
}

/// How far a caller has used up a rate: when it is as if nothing had been taken, in microseconds of its table's clock
/// (the generic cell rate algorithm, as in `lua/lock.lua`).
#[derive(Debug, Default)]
pub struct Pace(AtomicU64);

impl Pace {
    /// Takes one; or says how long to wait for it.
    pub fn take(&self, rate: RateLimit, now: u64) -> Result<(), Duration> {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let interval = micros(rate.interval).max(1);
        let slack = interval.saturating_mul(u64::from(rate.burst.saturating_sub(1)));
        let next = |due: u64| {
            let start = due.max(now);
            (start - now <= slack).then(|| start.saturating_add(interval))
        };
        match self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
            Ok(_) => Ok(()),
            Err(due) => Err(Duration::from_micros(due.saturating_sub(now).saturating_sub(slack).max(1))),
        }
    }

    fn is_unused(&self, now: u64) -> bool {
        self.0.load(Ordering::Relaxed) <= now
    }
}

/// What one caller has taken.
#[derive(Debug, Default)]
pub struct Place {
    open: AtomicUsize,
    /// Beside those: let in to be told that there are too many. They do not keep a place from anybody.
    told: AtomicUsize,
    transports: Pace,
    greetings: Pace,
    messages: Pace,
}

/// The table is full of callers that cannot be forgotten yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crowded;

/// What callers of one kind have taken, each within the same quota.
#[derive(Debug)]
pub struct Quotas<K> {
    quota: Quota,
    began: Instant,
    table: Mutex<Table<K>>,
}

#[derive(Debug)]
struct Table<K> {
    places: HashMap<K, Arc<Place>>,
    places_max: usize,
    /// Not swept again before.
    sweep_at: u64,
}

impl<K: Copy + Eq + Hash> Quotas<K> {
    /// Nobody has taken anything.
    #[must_use]
    pub fn new(quota: Quota) -> Arc<Self> {
        Self::with(quota, PLACES_MAX)
    }

    fn with(quota: Quota, places_max: usize) -> Arc<Self> {
        let table = Table { places: HashMap::new(), places_max, sweep_at: 0 };
        Arc::new(Self { quota, began: Instant::now(), table: Mutex::new(table) })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// The caller, as others are to count it; `None` where there is nothing to limit.
    ///
    /// # Errors
    /// When no more callers can be told apart: this one is to be refused.
    pub fn caller(self: &Arc<Self>, key: K) -> Result<Option<Caller<K>>, Crowded> {
        if self.quota.limits_nothing() {
            return Ok(None);
        }
        let place = lock(&self.table).place(key, self.now())?;
        Ok(Some(Caller { quotas: Arc::clone(self), place }))
    }
}

impl<K: Copy + Eq + Hash> Table<K> {
    fn place(&mut self, key: K, now: u64) -> Result<Arc<Place>, Crowded> {
        if let Some(place) = self.places.get(&key) {
            return Ok(Arc::clone(place));
        }
        if self.places.len() >= self.places_max && self.sweep_at <= now {
            self.sweep_at = now + u64::try_from(SWEEP_EVERY.as_micros()).unwrap_or(u64::MAX);
            // Whoever is counted somewhere has a second reference; it can only be had under this lock.
            self.places.retain(|_, place| {
                let unused = [&place.transports, &place.greetings, &place.messages].map(|pace| pace.is_unused(now));
                Arc::strong_count(place) > 1 || unused.contains(&false)
            });
        }
        if self.places.len() >= self.places_max {
            return Err(Crowded);
        }
        Ok(Arc::clone(self.places.entry(key).or_default()))
    }
}

/// One caller of a table.
#[derive(Debug)]
pub struct Caller<K> {
    quotas: Arc<Quotas<K>>,
    place: Arc<Place>,
}

impl<K> Clone for Caller<K> {
    fn clone(&self) -> Self {
        Self { quotas: Arc::clone(&self.quotas), place: Arc::clone(&self.place) }
    }
}

impl<K: Copy + Eq + Hash> Caller<K> {
    fn take(&self, pace: &Pace, rate: Option<RateLimit>) -> Result<(), Duration> {
        rate.map_or(Ok(()), |rate| pace.take(rate, self.quotas.now()))
    }

    /// Opens a transport; or says how long to wait.
    pub fn transport(&self) -> Result<(), Duration> {
        self.take(&self.place.transports, self.quotas.quota.handshakes)
    }

    /// Presents a token, or opens a session; or says how long to wait.
    pub fn greeting(&self) -> Result<(), Duration> {
        self.take(&self.place.greetings, self.quotas.quota.handshakes)
    }

    /// Sends a message; or says how long to wait.
    pub fn message(&self) -> Result<(), Duration> {
        self.take(&self.place.messages, self.quotas.quota.messages)
    }

    /// Takes a connection until it is dropped; `None` when there are so many that this one is not even to be told.
    #[must_use]
    pub fn connection(&self) -> Option<Connection> {
        let max = self.quotas.quota.connections.unwrap_or(usize::MAX);
        let take = |count: &AtomicUsize, max: usize| {
            let one_more = |count: usize| (count < max).then(|| count + 1);
            count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
        };
        let is_surplus = !take(&self.place.open, max);
        if is_surplus && !take(&self.place.told, TOLD_MAX) {
            return None;
        }
        Some(Connection { place: Arc::clone(&self.place), is_surplus })
    }
}

/// One connection of a caller, given back when dropped.
#[derive(Debug)]
pub struct Connection {
    place: Arc<Place>,
    /// More than the caller may have: it is to be told so and ended.
    pub is_surplus: bool,
}

impl Drop for Connection {
    fn drop(&mut self) {
        let count = if self.is_surplus { &self.place.told } else { &self.place.open };
        count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whose address a request counts for, and what addresses have taken.
#[derive(Debug)]
pub struct Addresses {
    proxies: Vec<Range>,
    /// What comes over connections: transports, messages, requests.
    pub quotas: Arc<Quotas<Address>>,
    /// The connections themselves, by who opened them.
    peers: Arc<Quotas<Address>>,
}

impl Addresses {
    /// With the proxies whose `X-Forwarded-For` is believed, and what each address may take.
    #[must_use]
    pub fn new(proxies: Vec<Range>, quota: Quota) -> Arc<Self> {
        let peers = Quota { connections: quota.connections, ..Quota::default() };
        Arc::new(Self { proxies, quotas: Quotas::new(quota), peers: Quotas::new(peers) })
    }

    /// Without any limit.
    #[must_use]
    pub fn unlimited() -> Arc<Self> {
        Self::new(Vec::new(), Quota::default())
    }

    fn is_proxy(&self, ip: IpAddr) -> bool {
        self.proxies.iter().any(|range| range.contains(ip))
    }

    /// Whom a request counts for that `peer` sent with these values of `X-Forwarded-For`, in the order of their lines:
    /// the rightmost address that is no trusted proxy's. Each proxy appends whom it heard from, so what stands left of
    /// that was written by strangers. An entry that is no address counts for the proxy that wrote it.
    pub fn of<'a>(&self, peer: IpAddr, forwarded: impl DoubleEndedIterator<Item = &'a [u8]>) -> Address {
        let mut nearest = peer;
        let mut entries = forwarded.rev().flat_map(|line| line.rsplit(|byte| *byte == b','));
        while self.is_proxy(nearest) {
            let Some(next) = entries.next().and_then(|entry| forwarded_address(str::from_utf8(entry).ok()?)) else {
                break;
            };
            nearest = next;
        }
        nearest.into()
    }

    /// A connection from `peer`, counted until the result is dropped: `Ok(None)` where it is not limited, which those of
    /// trusted proxies are not.
    ///
    /// # Errors
    /// When it is to be closed at once.
    pub fn connection(&self, peer: IpAddr) -> Result<Option<Connection>, Crowded> {
        if self.is_proxy(peer) {
            return Ok(None);
        }
        match self.peers.caller(peer.into())? {
            None => Ok(None),
            Some(caller) => match caller.connection() {
                Some(connection) if !connection.is_surplus => Ok(Some(connection)),
                Some(_) | None => Err(Crowded),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn behind(ranges: &[(&str, u8)]) -> Arc<Addresses> {
        Addresses::new(ranges.iter().map(|(base, bits)| Range::new(ip(base), *bits)).collect(), Quota::default())
    }

    #[test]
    fn only_a_trusted_proxy_says_whom_it_speaks_for() {
        let addresses = behind(&[("10.0.0.0", 8), ("192.0.2.7", 32), ("fd00::", 8)]);
        for (peer, lines, expected) in [
            ("203.0.113.5", &["198.51.100.1"][..], "203.0.113.5"),
            ("10.1.2.3", &["198.51.100.1"], "198.51.100.1"),
            // The client wrote the first; the proxy has appended whom it heard from.
            ("10.1.2.3", &["1.1.1.1, 198.51.100.1"], "198.51.100.1"),
            ("10.1.2.3", &["10.9.9.9, 198.51.100.1 ,192.0.2.7, 10.0.0.1"], "198.51.100.1"),
            ("10.1.2.3", &["198.51.100.1", "10.0.0.1"], "198.51.100.1"),
            ("10.1.2.3", &["1.1.1.1", "198.51.100.1"], "198.51.100.1"),
            ("10.1.2.3", &["198.51.100.1:4711"], "198.51.100.1"),
            ("10.1.2.3", &["[2001:db8::1]:4711"], "2001:db8::"),
            ("10.1.2.3", &["[2001:db8::1]"], "2001:db8::"),
            ("::ffff:10.1.2.3", &["::ffff:198.51.100.1"], "198.51.100.1"),
            ("fd00::1", &["2001:db8:0:1:2:3:4:5"], "2001:db8:0:1::"),
            // Nothing readable: it counts for the proxy nearest to it.
            ("10.1.2.3", &[], "10.1.2.3"),
            ("10.1.2.3", &["unknown"], "10.1.2.3"),
            ("10.1.2.3", &["198.51.100.1, "], "10.1.2.3"),
            ("10.1.2.3", &["10.0.0.2"], "10.0.0.2"),
            ("192.0.2.8", &["198.51.100.1"], "192.0.2.8"),
        ] {
            assert_eq!(
                addresses.of(ip(peer), lines.iter().map(|line| line.as_bytes())),
                Address(ip(expected)),
                "{peer} {lines:?}"
            );
        }
        // A stranger wrote the first entry; the proxy's own is readable all the same.
        let garbage = [b"\xff\xfe, 198.51.100.1".as_slice()];
        assert_eq!(addresses.of(ip("10.1.2.3"), garbage.into_iter()), Address(ip("198.51.100.1")));
        assert_eq!(behind(&[]).of(ip("10.1.2.3"), [b"1.1.1.1".as_slice()].into_iter()), Address(ip("10.1.2.3")));
        assert_eq!(
            behind(&[("0.0.0.0", 0)]).of(ip("9.9.9.9"), [b"1.1.1.1".as_slice()].into_iter()),
            Address(ip("1.1.1.1"))
        );
        assert_eq!(behind(&[("::", 0)]).of(ip("9.9.9.9"), [b"1.1.1.1".as_slice()].into_iter()), Address(ip("9.9.9.9")));
    }

    #[test]
    fn a_pace_allows_its_burst_and_then_its_rate() {
        let (pace, rate) = (Pace::default(), RateLimit { interval: Duration::from_micros(100), burst: 3 });
        for _ in 0..3 {
            assert_eq!(pace.take(rate, 1_000), Ok(()));
        }
        assert_eq!(pace.take(rate, 1_000), Err(Duration::from_micros(100)));
        assert_eq!(pace.take(rate, 1_099), Err(Duration::from_micros(1)));
        assert_eq!(pace.take(rate, 1_100), Ok(()));
        assert!(!pace.is_unused(1_399) && pace.is_unused(1_400));
        assert_eq!(pace.take(rate, u64::MAX), Ok(()), "the end of time is no overflow");
    }

    #[test]
    fn connections_come_back_and_a_few_more_are_told() {
        let quotas = Quotas::new(Quota { connections: Some(2), ..Quota::default() });
        let caller = quotas.caller(7).unwrap().unwrap();
        let held: Vec<_> = std::iter::from_fn(|| caller.connection()).collect();
        assert_eq!(held.iter().map(|one| one.is_surplus).collect::<Vec<_>>(), {
            let mut expected = vec![false; 2];
            expected.resize(2 + TOLD_MAX, true);
            expected
        });
        assert!(!quotas.caller(8).unwrap().unwrap().connection().unwrap().is_surplus, "another one");
        let (within, told): (Vec<_>, Vec<_>) = held.into_iter().partition(|one| !one.is_surplus);
        drop(within);
        assert!(!caller.connection().unwrap().is_surplus, "those who are told keep no place");
        drop(told);
        assert!(Quotas::<u64>::new(Quota::default()).caller(7).unwrap().is_none(), "nothing to limit");
    }

    #[test]
    fn the_table_is_bounded_and_forgets_who_has_taken_nothing_lately() {
        let rate = RateLimit { interval: Duration::from_hours(1), burst: 1 };
        let quotas = Quotas::with(Quota { messages: Some(rate), ..Quota::default() }, 3);
        let caller = |key: u64| quotas.caller(key).map(|caller| caller.expect("a limit"));
        let busy = caller(1).unwrap();
        assert_eq!(busy.message(), Ok(()));
        drop(busy);
        let held = caller(2).unwrap();
        drop(caller(3).unwrap());
        // Only the third can be forgotten: one has used its rate, one is held.
        drop(caller(4).unwrap());
        assert_eq!(caller(5).unwrap_err(), Crowded, "swept a moment ago");
        assert!(caller(1).unwrap().message().is_err(), "still known");
        assert_eq!(lock(&quotas.table).places.len(), 3);
        drop(held);
    }
}
