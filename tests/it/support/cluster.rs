//! Three masters that share the slots, each with one Redis replica.

use std::time::Duration;

use fred::types::cluster::ClusterRouting;

use super::free_port;
use super::node::{Node, until};

const SLOTS: u16 = 16_384;

pub struct Cluster {
    /// The first three begin as masters; the one three further on follows each.
    pub nodes: Vec<Node>,
    scheme: &'static str,
}

/// The slot of a key.
pub fn slot(key: &str) -> u16 {
    ClusterRouting::hash_key(key.as_bytes())
}

impl Cluster {
    /// Starts the nodes, joins them and waits until all agree that everything is there.
    pub async fn start() -> Self {
        Self::start_with("redis-cluster", &[]).await
    }

    /// The same with more settings for every node, for an address of this scheme.
    pub async fn start_with(scheme: &'static str, more: &[&str]) -> Self {
        let mut nodes = Vec::new();
        let mut buses = Vec::new();
        for _ in 0..6 {
            let bus = free_port().to_string();
            let settings = [
                ["--cluster-enabled", "yes"],
                ["--cluster-port", &bus],
                ["--cluster-node-timeout", "1000"],
                // The other masters go on while one is missing.
                ["--cluster-require-full-coverage", "no"],
            ];
            nodes.push(Node::server(&[settings.as_flattened(), more].concat()).await);
            buses.push(bus);
        }
        let all = Self { nodes, scheme };
        for (index, node) in all.nodes.iter().enumerate() {
            node.ask(&["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()]).await;
            node.ask(&["CLUSTER", "MEET", "127.0.0.1", &all.nodes[0].port.to_string(), &buses[0]]).await;
        }
        for (index, first) in [0, 5_461, 10_923].into_iter().enumerate() {
            let last = [5_460, 10_922, SLOTS - 1][index];
            all.nodes[index].ask(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]).await;
        }
        for node in &all.nodes {
            until("the nodes know each other", Duration::from_secs(30), async || {
                let said = node.ask(&["CLUSTER", "NODES"]).await;
                said.lines().count() == 6 && !said.contains("handshake")
            })
            .await;
        }
        for index in 0..3 {
            let id = all.nodes[index].ask(&["CLUSTER", "MYID"]).await;
            until("a node follows its master", Duration::from_secs(10), async || {
                all.nodes[index + 3].ask(&["CLUSTER", "REPLICATE", &id]).await == "OK"
            })
            .await;
        }
        all.whole().await;
        all
    }

    /// Waits until all nodes call the cluster well and each of three masters has a Redis replica that follows it.
    pub async fn whole(&self) {
        until("the cluster is whole", Duration::from_secs(30), async || {
            let mut followed = 0;
            for node in &self.nodes {
                let cluster = node.ask(&["CLUSTER", "INFO"]).await;
                let nodes = node.ask(&["CLUSTER", "NODES"]).await;
                let slots = node.ask(&["CLUSTER", "SLOTS"]).await;
                let replication = node.ask(&["INFO", "replication"]).await;
                if !cluster.contains("cluster_state:ok") || nodes.contains("fail") || slots.is_empty() {
                    return false;
                }
                followed += usize::from(replication.contains("role:master") && replication.contains("state=online"));
            }
            followed == 3
        })
        .await;
    }

    /// The address for the ledger: any two nodes, because it finds the others.
    pub fn url(&self) -> String {
        let [one, another] = [0, 4].map(|index| self.nodes[index].port);
        format!("{}://127.0.0.1:{one}?node=127.0.0.1:{another}", self.scheme)
    }

    /// Moves a slot with its keys from one master to another.
    pub async fn move_slot(&self, slot: u16, from: usize, to: usize) {
        let slot = slot.to_string();
        let (source, target) = (&self.nodes[from], &self.nodes[to]);
        let (source_id, target_id) = (source.ask(&["CLUSTER", "MYID"]).await, target.ask(&["CLUSTER", "MYID"]).await);
        assert_eq!(target.ask(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &source_id]).await, "OK");
        assert_eq!(source.ask(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &target_id]).await, "OK");
        let keys = source.ask(&["CLUSTER", "GETKEYSINSLOT", &slot, "1000"]).await;
        let port = target.port.to_string();
        for key in keys.lines() {
            assert_eq!(source.ask(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]).await, "OK");
        }
        for node in [target, source] {
            assert_eq!(node.ask(&["CLUSTER", "SETSLOT", &slot, "NODE", &target_id]).await, "OK");
        }
    }

    /// Which node is the master of a key's slot, as a living node sees it; `None` while there is none.
    pub async fn master(&self, key: &str, asked: usize) -> Option<usize> {
        let said = self.nodes[asked].ask(&["CLUSTER", "NODES"]).await;
        let wanted = slot(key);
        let owns = |range: &str| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            matches!((first.parse(), last.parse()), (Ok(first), Ok(last)) if (first..=last).contains(&wanted))
        };
        let line = said
            .lines()
            .find(|line| line.contains("master") && !line.contains("fail") && line.split(' ').skip(8).any(owns));
        let address = line?.split(' ').nth(1)?;
        let port: u16 = address.split(['@', ':']).nth(1)?.parse().ok()?;
        self.nodes.iter().position(|node| node.port == port)
    }
}
