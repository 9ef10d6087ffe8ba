//! Which server has which key: the one there is, or on a cluster the master of the key's slot.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fred::clients::Client;
use fred::error::Error;
use fred::interfaces::{ClientLike, ClusterInterface};
use fred::types::Value;
use fred::types::cluster::ClusterRouting;
use fred::types::config::Server;

use super::Driver;
use super::link::{self, Link};

/// How often the cluster is looked at, and how soon again when something is wrong with what was seen.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A slot that nobody has.
const NOBODY: u16 = u16::MAX;

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
        let slot = usize::from(ClusterRouting::hash_key(key.as_bytes()));
        self.slots.get(slot).and_then(|index| self.links.get(usize::from(*index)))
    }

    fn servers(&self) -> impl Iterator<Item = &Server> {
        self.links.iter().filter_map(|link| link.server.as_ref())
    }

    /// For each slot the index of its master among `masters`.
    fn table(seen: &ClusterRouting, masters: &[Server]) -> Vec<u16> {
        let mut slots = vec![NOBODY; 16_384];
        for range in seen.slots() {
            let index = masters.iter().position(|server| *server == range.primary);
            let index = index.and_then(|index| u16::try_from(index).ok()).unwrap_or(NOBODY);
            if let Some(part) = slots.get_mut(usize::from(range.start)..=usize::from(range.end)) {
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
    let mut scout: Option<(Server, Client)> = None;
    let mut turn = 0;
    let mut complained = false;
    loop {
        if scout.is_none() {
            let nodes = candidates(&driver, &seeds);
            scout = connect(&driver, &nodes[turn % nodes.len()]).await;
        }
        let seen = match &scout {
            Some((server, client)) => look(server, client).await.ok(),
            None => None,
        };
        let is_good = seen.is_some_and(|seen| adopt(&driver, &seen));
        if !is_good && !complained {
            tracing::warn!("the Redis cluster cannot be looked at; trying its other nodes");
        }
        complained = !is_good;
        let is_doubted = tokio::select! {
            () = driver.stop.cancelled() => {
                retire(scout);
                return;
            }
            () = driver.doubt.notified() => true,
            () = tokio::time::sleep(if is_good { LOOK_EVERY } else { LOOK_AGAIN }) => !is_good,
        };
        if is_doubted {
            retire(scout.take());
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

async fn connect(driver: &Driver, server: &Server) -> Option<(Server, Client)> {
    let builder = link::builder(&driver.config, Some(server), Duration::from_secs(1));
    let client = builder.build().ok()?;
    match client.init().await {
        Ok(_) => Some((server.clone(), client)),
        Err(error) => {
            tracing::debug!(%server, error = %error.details(), "this node cannot be asked for the cluster's slots");
            None
        }
    }
}

async fn look(server: &Server, client: &Client) -> Result<ClusterRouting, Error> {
    let reply: Value = client.cluster_slots().await?;
    ClusterRouting::from_cluster_slots(reply, server.host.clone())
}

fn retire(scout: Option<(Server, Client)>) {
    if let Some((_, client)) = scout {
        // Nothing waits for its goodbye.
        tokio::spawn(async move { client.quit().await.ok() });
    }
}

/// Takes over what was seen. False when it cannot be the whole truth: no master at all, or a client that does not start.
fn adopt(driver: &Arc<Driver>, seen: &ClusterRouting) -> bool {
    let masters = seen.unique_primary_nodes();
    if masters.is_empty() {
        return false;
    }
    let slots = Route::table(seen, &masters);
    let old = Arc::clone(&driver.route.borrow());
    if old.slots == slots && old.servers().eq(&masters) {
        return true;
    }
    let mut links = Vec::with_capacity(masters.len());
    for server in &masters {
        let known = old.links.iter().find(|link| link.server.as_ref() == Some(server));
        match known.map_or_else(|| Link::start(driver, Some(server.clone())), |link| Ok(Arc::clone(link))) {
            Ok(link) => links.push(link),
            Err(error) => {
                tracing::warn!(%server, error = %error.details(), "a master of the Redis cluster cannot be used");
                return false;
            }
        }
    }
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
