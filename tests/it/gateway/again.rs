//! What is told by itself, of orders and of deadlines that are near, reaches who missed it, and each socket once.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fred::interfaces::{KeysInterface as _, SortedSetsInterface as _};
use seatlock::domain::Personal;
use seatlock::gateway::GatewayOptions;
use seatlock::ledger::{FeedItem, Ledger, Topic};
use serde_json::json;
use tokio::time::{Instant, timeout};

use super::eventually;
use crate::support::gateway::{Browser, Got, PATIENCE, Raw, lock, options, redis_ledger, replica, replica_on, token};
use crate::support::ledger::{completed, user};
use crate::support::node::Node;
use crate::support::proxy::{Path, Proxy};
use crate::support::redis::RedisServer;

/// Long enough for whatever would be told once too often.
const A_WHILE: Duration = Duration::from_millis(500);

/// The names of what comes for a while.
async fn names(client: &mut Raw) -> Vec<String> {
    let name = |got| match got {
        Got::Event(name, _) => name,
        got @ (Got::Ack(..) | Got::Refused(_) | Got::Connected | Got::Closed) => format!("{got:?}"),
    };
    client.within(A_WHILE).await.into_iter().map(name).collect()
}

/// Redis, a path to it that breaks, and two ledgers: one behind the path, one beside it.
struct Broken {
    _server: Node,
    path: Proxy,
    behind: Arc<dyn Ledger>,
    elsewhere: Arc<dyn Ledger>,
}

impl Broken {
    async fn new() -> Self {
        let server = Node::server(&[]).await;
        let path = Proxy::to(SocketAddr::from(([127, 0, 0, 1], server.port))).await;
        let behind = redis_ledger(format!("redis://{}", path.address()), Duration::from_secs(1));
        let elsewhere = redis_ledger(format!("redis://127.0.0.1:{}", server.port), Duration::from_secs(5));
        Self { _server: server, path, behind, elsewhere }
    }
}

/// An order is reported while its user's replica is cut off from Redis in each way in which paths break. The user, who
/// holds nothing, hears of it within seconds of the path being back, and once on each socket, also where what was sent
/// meanwhile arrives late.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_reported_during_a_cut_is_told_when_the_path_is_back() {
    let on = Broken::new().await;
    let replica = replica_on(Arc::clone(&on.behind), options()).await;
    let mut tabs = [replica.client(1).await, replica.client(1).await];
    let mut stranger = replica.client(2).await;
    for (order, broken) in (1..).zip([Path::Cut, Path::Frozen, Path::OnlyUp, Path::OnlyDown]) {
        on.path.set(broken);
        if broken != Path::Cut {
            // Longer than a subscription may be silent.
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        on.elsewhere.tell(user(1), &completed(&order.to_string(), 2)).await.expect("told");
        on.path.set(Path::Open);
        let back = Instant::now();
        for tab in &mut tabs {
            assert_eq!(tab.expect("order-completed").await["orderId"], order, "{broken:?}");
        }
        assert!(back.elapsed() < Duration::from_secs(8), "{broken:?}: {:?}", back.elapsed());
        for tab in &mut tabs {
            assert_eq!(names(tab).await, Vec::<String>::new(), "{broken:?}: once");
        }
    }
    assert_eq!(names(&mut stranger).await, Vec::<String>::new());
}

/// A user is between two connections while an order is reported, and hears of it at another replica, after `connected`.
/// What a living session has shown long ago is not told to the next one.
#[tokio::test(flavor = "multi_thread")]
async fn who_was_between_two_connections_is_told_of_orders() {
    let server = RedisServer::start().await;
    let ledger = || redis_ledger(server.url(), Duration::from_secs(5));
    let (one, two) = (replica_on(ledger(), options()).await, replica_on(ledger(), options()).await);
    let client = server.client().await;
    let here = async |count: usize| {
        let fields: Vec<String> =
            fred::interfaces::HashesInterface::hkeys(&client, "seatlock:{u:1}").await.expect("keys");
        fields.len() == 1 + count
    };
    one.client(1).await.leave().await;
    eventually("nobody is there", async || here(0).await).await;
    one.ledger.tell(user(1), &completed("1", 2)).await.expect("told");
    one.ledger.tell(user(1), &completed("2", 2)).await.expect("told");
    let mut back = two.client(1).await;
    for order in [1, 2] {
        assert_eq!(back.expect("order-completed").await["orderId"], order);
    }
    assert_eq!(names(&mut back).await, Vec::<String>::new());

    // As if that had been half a minute ago.
    let told: Vec<(String, f64)> =
        client.zrange("seatlock:{u:1}:told", 0, -1, None, false, None, true).await.expect("ZRANGE answers");
    let earlier: Vec<(f64, String)> = told.into_iter().map(|(text, at)| (at - 30_000.0, text)).collect();
    assert_eq!(earlier.len(), 2);
    let _: () = client.zadd("seatlock:{u:1}:told", None, None, false, false, earlier).await.expect("ZADD answers");
    let mut page = one.client(1).await;
    assert_eq!(names(&mut page).await, Vec::<String>::new(), "the other page is open");
    two.gateway.reassure();
    assert_eq!(names(&mut back).await, Vec::<String>::new(), "it was told");
    page.leave().await;
    back.leave().await;
    eventually("nobody is there", async || here(0).await).await;
    assert!(!client.exists::<bool, _>("seatlock:{u:1}:told").await.expect("EXISTS answers"), "all is shown");
    assert_eq!(names(&mut two.client(1).await).await, Vec::<String>::new());
}

/// A socket that vanished without a word stands open for a while, and an order is reported then: its client, who has come
/// back by another connection, is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_only_seems_open_has_shown_nothing() {
    let replica = replica(options()).await;
    let vanished = replica.client(1).await;
    replica.ledger.tell(user(1), &completed("1", 2)).await.expect("told");
    let mut back = replica.client(1).await;
    assert_eq!(back.expect("order-completed").await["orderId"], 1);
    drop(vanished);
}

/// The real client loses its connection, an order is reported, and it is told when it has come back by itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_real_client_is_told_after_it_has_come_back() {
    let replica = replica(options()).await;
    for (id, transport) in (1..).zip(["websocket", "polling"]) {
        // Away for at least half a second.
        let options = json!({
            "auth": { "token": token(id) }, "transports": [transport], "reconnectionDelay": 1000, "reconnectionDelayMax": 1000
        });
        let mut browser = Browser::open(&replica, &options).await;
        browser.report("connect").await;
        browser.event("connected").await;
        browser.order(&json!({ "do": "drop" })).await;
        browser.report("disconnect").await;
        replica.ledger.tell(user(id), &completed("7", 2)).await.expect("told");
        browser.report("connect").await;
        assert_eq!(browser.event("order-completed").await["orderId"], 7, "{transport}");
    }
}

/// The orders-service reports twice, and sessions enter again for other reasons: a socket is told once.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_heard_is_not_told_again() {
    let server = RedisServer::start().await;
    let replica = replica_on(redis_ledger(server.url(), Duration::from_secs(5)), options()).await;
    let mut client = replica.client(1).await;
    replica.ledger.tell(user(1), &completed("1", 2)).await.expect("told");
    assert_eq!(client.expect("order-completed").await["orderId"], 1);
    replica.gateway.reassure();
    replica.ledger.tell(user(1), &completed("1", 2)).await.expect("told");
    assert_eq!(names(&mut client).await, Vec::<String>::new());
}

/// The warning is published while the owner's replica is cut off: the owner is warned when the path is back, once.
#[tokio::test(flavor = "multi_thread")]
async fn a_warning_published_during_a_cut_is_told_afterwards() {
    let on = Broken::new().await;
    let short = GatewayOptions { lock_ttl: Duration::from_secs(62), ..options() };
    let replica = replica_on(Arc::clone(&on.behind), short).await;
    let mut owner = replica.client(1).await;
    let granted = owner.ask("lock-tickets", &lock(1, 1, 2)).await;
    assert_eq!(granted["success"], true, "{granted}");
    on.path.set(Path::Cut);
    let mut feed = on.elsewhere.feed().expect("taken once");
    on.elsewhere.subscribe(Topic::User(user(1))).await.expect("subscribed");
    let published = async {
        loop {
            on.elsewhere.sweep().await.expect("swept");
            if let Ok(Some(FeedItem::Personal(_, Personal::Expiring { .. }))) =
                timeout(Duration::from_millis(20), feed.recv()).await
            {
                return;
            }
        }
    };
    timeout(PATIENCE, published).await.expect("the warning goes by");
    on.path.set(Path::Open);
    let told = owner.expect("lock-expiring").await;
    assert_eq!((&told["lockId"], &told["expiresAt"]), (&granted["lockId"], &granted["expiresAt"]));
    let left = told["remainingMs"].as_u64().expect("a number");
    assert!((50_000..60_000).contains(&left), "{left}");
    replica.gateway.reassure();
    assert_eq!(names(&mut owner).await, Vec::<String>::new(), "once");
}

/// A page that is opened when a deadline is near is warned of it; the one that was there before is not warned again.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_page_is_warned_of_a_deadline_that_is_near() {
    let short = GatewayOptions { lock_ttl: Duration::from_secs(61), ..options() };
    let replica = replica(short).await;
    let mut first = replica.client(1).await;
    let granted = first.ask("lock-tickets", &lock(1, 1, 2)).await;
    assert_eq!(names(&mut replica.client(1).await).await, Vec::<String>::new(), "it is not near yet");
    first.expect("lock-expiring").await;
    let mut second = replica.client(1).await;
    assert_eq!(second.expect("lock-expiring").await["lockId"], granted["lockId"]);
    replica.gateway.reassure();
    assert_eq!((names(&mut first).await, names(&mut second).await), (Vec::new(), Vec::new()), "once");
}
