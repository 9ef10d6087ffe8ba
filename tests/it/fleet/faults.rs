//! What breaks, how long, and how it is mended.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::log::{Log, Road, now};
use super::stage::{Post, Stage};
use crate::audit::outside::{Seen, Span};
use crate::support::proxy::{Path, Proxy};

/// One thing that breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9` of a replica, which starts again.
    Kill(usize),
    /// SIGSTOP of a replica for so many seconds.
    Stop(usize, u64),
    /// SIGTERM to one replica after the other; each starts again.
    Rolling,
    /// `kill -9` of Redis, which starts again with its data.
    RedisKill,
    /// The same without its data.
    RedisLose,
    RedisStop(u64),
    /// A path from a replica, or from all of them, for so many seconds.
    Redis(Broken, Option<usize>, u64),
    /// The path from HAProxy to a replica.
    Front(Broken, usize, u64),
    /// `kill -9` of RabbitMQ, which starts again.
    RabbitKill,
    RabbitStop(u64),
    /// Somebody deletes the queue.
    QueueDelete,
    Rabbit(Broken, Option<usize>, u64),
    /// The events-service dies for so many seconds.
    ShopKill(u64),
    Shop(Broken, Option<usize>, u64),
}

/// How a path breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    Cut,
    Frozen,
    OnlyUp,
    OnlyDown,
    Delayed,
    Throttled,
}

impl Broken {
    const fn path(self) -> Path {
        match self {
            Self::Cut => Path::Cut,
            Self::Frozen => Path::Frozen,
            Self::OnlyUp => Path::OnlyUp,
            Self::OnlyDown => Path::OnlyDown,
            Self::Delayed => Path::Delayed(Duration::from_millis(150)),
            Self::Throttled => Path::Throttled(40_000),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Every kind of fault of each lane, with replicas chosen by `pick`. Faults of one lane happen one after the other; those
/// of different lanes meet.
pub fn lanes(mut pick: impl FnMut(usize) -> usize) -> [Vec<Fault>; 3] {
    let mut one = || pick(3);
    let main = vec![
        Fault::Kill(one()),
        Fault::Kill(one()),
        Fault::Kill(one()),
        // Longer than the lease, and longer than pings may stay away.
        Fault::Stop(one(), 8),
        Fault::Stop(one(), 22),
        Fault::Rolling,
        Fault::RedisKill,
        Fault::RedisKill,
        Fault::RedisLose,
        Fault::RedisLose,
        Fault::RedisStop(7),
        Fault::Redis(Broken::Cut, None, 4),
        Fault::Redis(Broken::Cut, Some(one()), 7),
        Fault::Redis(Broken::Cut, Some(one()), 30),
        Fault::Redis(Broken::Frozen, None, 4),
        Fault::Redis(Broken::Frozen, Some(one()), 7),
        Fault::Redis(Broken::OnlyUp, Some(one()), 5),
        Fault::Redis(Broken::OnlyDown, Some(one()), 5),
        Fault::Redis(Broken::Delayed, None, 4),
        Fault::Redis(Broken::Throttled, Some(one()), 4),
        Fault::Front(Broken::Cut, one(), 3),
        Fault::Front(Broken::Frozen, one(), 6),
        Fault::Front(Broken::OnlyUp, one(), 5),
        Fault::Front(Broken::OnlyDown, one(), 5),
        Fault::Front(Broken::Delayed, one(), 4),
        Fault::Front(Broken::Throttled, one(), 4),
    ];
    let rabbit = vec![
        Fault::RabbitKill,
        Fault::RabbitStop(12),
        Fault::QueueDelete,
        Fault::Rabbit(Broken::Cut, None, 4),
        Fault::Rabbit(Broken::Frozen, Some(one()), 9),
        Fault::Rabbit(Broken::OnlyUp, Some(one()), 9),
        Fault::Rabbit(Broken::OnlyDown, Some(one()), 9),
        Fault::Rabbit(Broken::Delayed, None, 5),
    ];
    let shop = vec![
        // Longer than known stock may decide.
        Fault::ShopKill(16),
        Fault::ShopKill(3),
        Fault::Shop(Broken::Cut, Some(one()), 8),
        Fault::Shop(Broken::Frozen, None, 8),
        Fault::Shop(Broken::OnlyUp, Some(one()), 8),
        Fault::Shop(Broken::OnlyDown, Some(one()), 8),
        Fault::Shop(Broken::Delayed, None, 8),
    ];
    [main, rabbit, shop]
}

/// How long a replica may be out of touch with the fleet before its users' locks may be gone: its lease, the time to
/// notice it, and the grace, less a margin.
const OUT_OF_TOUCH: u64 = 12;

/// A replica that Redis does not hear of for so many seconds is given up.
const LEASE: u64 = 5;

/// From the end of a fault until requests on a road surely have their usual times again.
const RECOVERY: Duration = Duration::from_secs(4);
/// The same for the broker: two missed heartbeats of two seconds each, and the longest pause between attempts.
const BROKER_RECOVERY: Duration = Duration::from_secs(10);

async fn seconds(count: u64) {
    sleep(Duration::from_secs(count)).await;
}

impl Fault {
    /// How long nothing of its kind breaks after it. A replica that was given up enters its sessions again, and an
    /// events-service is asked: when it breaks once more before that, it was broken all the time, for longer than the rules
    /// here know of.
    pub const fn rest(&self) -> Duration {
        let gives_up = matches!(self, Self::Redis(_, Some(_), time) | Self::RedisStop(time) | Self::Stop(_, time) if *time >= LEASE);
        if gives_up || matches!(self, Self::ShopKill(_) | Self::Shop(..)) {
            Duration::from_secs(3)
        } else {
            Duration::ZERO
        }
    }
}

pub struct Breaker {
    pub stage: Arc<Stage>,
    pub log: Arc<Log>,
    /// Held by faults of the events-service, and by those that need it.
    pub shop_whole: tokio::sync::Mutex<()>,
}

impl Breaker {
    /// Breaks it, waits, and mends it.
    pub async fn run(&self, fault: Fault) {
        let stage = &self.stage;
        let began = now();
        match fault {
            Fault::Kill(index) => {
                let post = &stage.posts[index];
                stage.kill(post).await;
                sleep(Duration::from_millis(500)).await;
                stage.launch(post).await;
                stage.ready(post).await;
                self.log.disturb(Road::Front, began, RECOVERY);
                self.log.disturb(Road::Broker, began, BROKER_RECOVERY);
            }
            Fault::Stop(index, time) => {
                let post = &stage.posts[index];
                stage.signal(post, "STOP").await;
                seconds(time).await;
                stage.signal(post, "CONT").await;
                self.log.disturb(Road::Front, began, RECOVERY);
                self.log.disturb(Road::Broker, began, BROKER_RECOVERY);
                self.out_of_touch(began, time);
            }
            Fault::Rolling => {
                for post in &stage.posts {
                    let code = stage.drain(post).await;
                    if code != 0 {
                        self.log.complain(format!("replica {} drained with exit code {code}", post.name));
                    }
                    stage.launch(post).await;
                    stage.ready(post).await;
                }
            }
            Fault::RedisKill => {
                let mut redis = stage.redis.lock().await;
                redis.kill();
                redis.restart(&[]).await;
            }
            Fault::RedisLose => {
                let _whole = self.shop_whole.lock().await;
                let began = now();
                {
                    let mut redis = stage.redis.lock().await;
                    redis.kill();
                    redis.forget();
                    redis.restart(&[]).await;
                }
                // Noticed within two seconds; for five more nobody new is granted anything, and locks come back.
                seconds(9).await;
                self.log.note(Span { began, ended: now() }, Seen::DataLost);
            }
            Fault::RedisStop(time) => {
                stage.redis.lock().await.signal("STOP");
                seconds(time).await;
                stage.redis.lock().await.signal("CONT");
            }
            Fault::Redis(broken, index, time) => {
                self.path(|post| &post.redis, broken, index, time).await;
                if index.is_some() {
                    self.out_of_touch(began, time);
                }
            }
            Fault::Front(broken, index, time) => {
                self.path(|post| &post.front, broken, Some(index), time).await;
                self.log.disturb(Road::Front, began, RECOVERY);
            }
            Fault::RabbitKill => {
                let mut rabbit = stage.rabbit.lock().await;
                rabbit.kill();
                rabbit.restart().await;
                self.log.disturb(Road::Broker, began, BROKER_RECOVERY);
            }
            Fault::RabbitStop(time) => {
                stage.rabbit.lock().await.signal("STOP");
                seconds(time).await;
                stage.rabbit.lock().await.signal("CONT");
                self.log.disturb(Road::Broker, began, BROKER_RECOVERY);
            }
            Fault::QueueDelete => {
                let url = stage.rabbit.lock().await.url();
                super::orders::delete_queue(&url).await;
                self.log.disturb(Road::Broker, began, BROKER_RECOVERY);
            }
            Fault::Rabbit(broken, index, time) => {
                self.path(|post| &post.rabbit, broken, index, time).await;
                self.log.disturb(Road::Broker, began, BROKER_RECOVERY);
            }
            Fault::ShopKill(time) => {
                let _whole = self.shop_whole.lock().await;
                let mut shop = stage.shop.lock().await;
                shop.kill().await;
                seconds(time).await;
                shop.reopen();
            }
            Fault::Shop(broken, index, time) => {
                let _whole = self.shop_whole.lock().await;
                self.path(|post| &post.shop, broken, index, time).await;
            }
        }
    }

    async fn path(&self, of: fn(&Post) -> &Proxy, broken: Broken, index: Option<usize>, time: u64) {
        let set = |path| match index {
            Some(index) => of(&self.stage.posts[index]).set(path),
            None => self.stage.all(of, path),
        };
        set(broken.path());
        seconds(time).await;
        set(Path::Open);
    }

    /// A replica that nobody hears of for so long is given up by the fleet. Who its users are is not known here.
    fn out_of_touch(&self, began: u64, time: u64) {
        if time >= OUT_OF_TOUCH {
            self.log.note(Span { began, ended: now() + 5_000 }, Seen::AwayAll);
        }
    }
}
