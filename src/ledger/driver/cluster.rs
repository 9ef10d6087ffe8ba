//! Which server has which key: the one there is, or on a cluster the master of the key's slot.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Driver;
use super::address::Server;
use super::command::Command;
use super::connection::{Connection, Failure};
use super::link::Link;
use super::reply::{Reply, Value};

/// How often the cluster is looked at, and how soon again when something is wrong with what was seen.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How many slots a cluster has.
const SLOTS: u16 = 16_384;

/// A slot that nobody has.
const NOBODY: u16 = u16::MAX;

/// The slots from the first to the last, and their master.
type Range = (u16, u16, Server);

/// The slot of a key: of what is in its first braces, where that is something. From the cluster's specification,
/// <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/>.
fn slot(key: &str) -> u16 {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    let hashed = tag.filter(|tag| !tag.is_empty()).unwrap_or(key);
    crc16::State::<crc16::XMODEM>::calculate(hashed.as_bytes()) % SLOTS
}

/// Which server has which key.
#[derive(Default)]
pub(super) struct Route {
    /// The servers.
    pub(super) links: Vec<Arc<Link>>,
    /// For each slot of a cluster the index of its master; empty where one server has everything.
    slots: Vec<u16>,
}

impl Route {
    /// Everything on one server.
    pub(super) fn one(link: Arc<Link>) -> Self {
        Self { links: vec![link], slots: Vec::new() }
    }

    /// The server of a key or channel.
    pub(super) fn link(&self, key: &str) -> Option<&Arc<Link>> {
        if self.slots.is_empty() {
            return self.links.first();
        }
        let slot = usize::from(slot(key));
        self.slots.get(slot).and_then(|index| self.links.get(usize::from(*index)))
    }

    fn servers(&self) -> impl Iterator<Item = &Server> {
        self.links.iter().filter_map(|link| link.server.as_ref())
    }

    /// For each slot the index of its master among `masters`.
    fn table(seen: &[Range], masters: &[Server]) -> Vec<u16> {
        let mut slots = vec![NOBODY; usize::from(SLOTS)];
        for (first, last, master) in seen {
            let index = masters.iter().position(|server| server == master);
            let index = index.and_then(|index| u16::try_from(index).ok()).unwrap_or(NOBODY);
            if let Some(part) = slots.get_mut(usize::from(*first)..=usize::from(*last)) {
                part.fill(index);
            }
        }
        slots
    }
}

/// Keeps the driver's route as the cluster is, until the driver ends.
///
/// One node is asked again and again. When it fails, or something is in doubt, the next one is: a node that is cut off
/// from the others goes on to tell what it knew.
pub(super) async fn follow(driver: Arc<Driver>, seeds: Vec<Server>) {
    let mut scout: Option<Connection> = None;
    let mut turn = 0;
    let mut complained = false;
    loop {
        if scout.is_none() {
            let nodes = candidates(&driver, &seeds);
            scout = connect(&driver, &nodes[turn % nodes.len()]).await;
        }
        let seen = match &scout {
            Some(connection) => look(connection).await.ok(),
            None => None,
        };
        let is_good = seen.is_some_and(|seen| adopt(&driver, &seen));
        if !is_good && !complained {
            tracing::warn!("the Redis cluster cannot be looked at; trying its other nodes");
        }
        complained = !is_good;
        let is_doubted = tokio::select! {
            () = driver.stop.cancelled() => return,
            () = driver.doubt.notified() => true,
            () = tokio::time::sleep(if is_good { LOOK_EVERY } else { LOOK_AGAIN }) => !is_good,
        };
        if is_doubted {
            scout = None;
            turn += 1;
            tokio::time::sleep(LOOK_AGAIN).await;
        } else {
            turn = 0;
        }
    }
}

/// Whom to ask, best first: the masters whose connection stands, the others, those that the URL names.
fn candidates(driver: &Driver, seeds: &[Server]) -> Vec<Server> {
    let route = driver.route.borrow();
    let mut links: Vec<&Arc<Link>> = route.links.iter().collect();
    links.sort_by_key(|link| !link.is_up.load(Ordering::Relaxed));
    links.into_iter().filter_map(|link| link.server.clone()).chain(seeds.iter().cloned()).collect()
}

async fn connect(driver: &Driver, server: &Server) -> Option<Connection> {
    match Connection::to(&driver.address, server, &driver.address.login, None).await {
        Ok(connection) => Some(connection),
        Err(failure) => {
            tracing::debug!(%server, error = failure.text(), "this node cannot be asked for the cluster's slots");
            None
        }
    }
}

async fn look(connection: &Connection) -> Result<Vec<Range>, Failure> {
    let reply = connection.ask(Command::new("CLUSTER", &["SLOTS"])).await?;
    let asked = connection.server.as_ref().map_or("", |server| &server.host);
    ranges(&reply, asked).ok_or_else(|| Failure::Lost("the node does not tell the cluster's slots".to_owned()))
}

/// Reads `CLUSTER SLOTS`: for each range its ends and its nodes, the master first, each with host and port. A node that
/// does not know its own host is the one that was asked.
fn ranges(reply: &Reply, asked: &str) -> Option<Vec<Range>> {
    let number = |part: Option<Value>| part?.text()?.parse::<u16>().ok();
    let range = |line: Value| {
        let mut parts = line.parts()?;
        let (first, last) = (number(parts.next())?, number(parts.next())?);
        let mut master = parts.next()?.parts()?;
        let host = Some(master.next()?).filter(|host| *host != Value::Nothing).map_or(Some(""), Value::text)?;
        let host = if host.is_empty() { asked } else { host }.to_owned();
        Some((first, last, Server { host, port: number(master.next())? }))
    };
    // A master whose name the cluster does not know yet is written "?".
    let known = |range: &Range| range.2.host != "?";
    let ranges: Option<Vec<Range>> = reply.value().parts()?.map(range).collect();
    Some(ranges?.into_iter().filter(known).collect())
}

/// Takes over what was seen. False when it cannot be the whole truth: no master at all.
fn adopt(driver: &Arc<Driver>, seen: &[Range]) -> bool {
    let mut masters: Vec<Server> = seen.iter().map(|(_, _, master)| master.clone()).collect();
    masters.sort();
    masters.dedup();
    if masters.is_empty() {
        return false;
    }
    let slots = Route::table(seen, &masters);
    let old = Arc::clone(&driver.route.borrow());
    if old.slots == slots && old.servers().eq(&masters) {
        return true;
    }
    let link = |server: &Server| {
        let known = old.links.iter().find(|link| link.server.as_ref() == Some(server));
        known.map_or_else(|| Link::start(driver, Some(server.clone())), Arc::clone)
    };
    let links = masters.iter().map(link).collect();
    let names: Vec<String> = masters.iter().map(ToString::to_string).collect();
    tracing::info!(masters = names.join(" "), "the Redis cluster's slots are known anew");
    let new = Arc::new(Route { links, slots });
    driver.route.send_replace(Arc::clone(&new));
    for link in &new.links {
        link.renew.notify_one();
    }
    for gone in old.links.iter().filter(|link| !masters.iter().any(|server| link.server.as_ref() == Some(server))) {
        gone.close();
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first two are from the specification.
    #[test]
    fn a_key_has_the_slot_that_redis_says() {
        for (key, expected) in [
            ("123456789", 12_739),
            ("{user1000}.following", slot("user1000")),
            ("foo{}{bar}", crc16::State::<crc16::XMODEM>::calculate(b"foo{}{bar}") % SLOTS),
            ("foo{{bar}}zap", slot("{bar")),
            ("foo{bar}{zap}", slot("bar")),
            ("", 0),
        ] {
            assert_eq!(slot(key), expected, "{key:?}");
        }
    }

    #[test]
    fn slots_are_read_as_they_are_told() {
        let reply = |text: &'static str| Reply::of(text).expect("a reply");
        let told = reply(
            "*3\r\n*4\r\n:0\r\n:5\r\n*3\r\n$1\r\na\r\n:1\r\n$2\r\nid\r\n*3\r\n$1\r\nb\r\n:2\r\n$2\r\nid\r\n\
             *3\r\n:6\r\n:9\r\n*3\r\n_\r\n:3\r\n$2\r\nid\r\n\
             *3\r\n:10\r\n:11\r\n*3\r\n$1\r\n?\r\n:4\r\n$2\r\nid\r\n",
        );
        let server = |host: &str, port| Server { host: host.to_owned(), port };
        let expected = vec![(0, 5, server("a", 1)), (6, 9, server("asked", 3))];
        assert_eq!(ranges(&told, "asked"), Some(expected.clone()));
        let slots = Route::table(&expected, &[server("asked", 3), server("a", 1)]);
        assert_eq!(slots[..12], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, NOBODY, NOBODY]);
        for wrong in ["_\r\n", "*1\r\n:1\r\n", "*1\r\n*2\r\n:0\r\n:70000\r\n", "*1\r\n*2\r\n:0\r\n:7\r\n"] {
            assert_eq!(ranges(&reply(wrong), "asked"), None, "{wrong:?}");
        }
        // Ends that are no slots change nothing.
        assert!(
            Route::table(&[(9, 3, server("a", 1)), (0, 60_000, server("a", 1))], &[server("a", 1)])
                .iter()
                .all(|index| *index == NOBODY)
        );
    }
}
